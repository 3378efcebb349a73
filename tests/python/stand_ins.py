"""Stand-ins for torch and vLLM, which TRL's client imports and, to generate, never calls.

Both are gigabytes. The client's own module stays as it was published: it finds the names that it
binds at import (types in annotations, functions of the weight transfer), and using one fails.
TRL's other modules of the same package, which generate inside of vLLM, are left alone.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType


def _module(name, **names):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__dict__.update(names)
    sys.modules[name] = module
    return module


def _absent(*args, **kwargs):
    raise NotImplementedError("this environment has only stand-ins for torch and vLLM")


def install():
    """Makes `import torch` and `import vllm` find the stand-ins; `trl.generation` loads by module."""
    nn = _module("torch.nn", Module=type("Module", (), {}))
    types = {name: type(name, (), {}) for name in ("Tensor", "device")}
    # A version of 0 tells transformers that there is no torch.
    _module("torch", __version__="0", nn=nn, **types)
    _module("vllm", __version__="0.25.0")
    _module("vllm.utils")
    _module("vllm.utils.network_utils", get_ip=_absent)
    _module("vllm.distributed")
    _module("vllm.distributed.weight_transfer")
    transfer = {"NCCLTrainerSendWeightsArgs": _absent, "NCCLWeightTransferEngine": _absent}
    _module("vllm.distributed.weight_transfer.nccl_engine", **transfer)
    import trl

    generation = _module("trl.generation")
    generation.__path__ = [f"{path}/generation" for path in trl.__path__]
