"""Tokens a second of transformers' generate() with random weights, as JSON; part of gpu_check.

    gpu_check_transformers.py DEVICE SHAPE BATCH,... PROMPT_TOKENS NEW_TOKENS
"""
import json
import sys
import time


def qwen2(hidden, inner, layers, heads, kv_heads, vocab, tied):
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": tied,
    }


# As src/bench/shapes.rs has them.
SHAPES = {
    "qwen2.5-0.5b": qwen2(896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": qwen2(1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-7b": qwen2(3584, 18944, 28, 28, 4, 152064, False),
    "tiny": qwen2(128, 352, 2, 2, 1, 512, True),
}


def settings(shape):
    """What transformers' Qwen2Config takes."""
    return {key: value for key, value in SHAPES[shape].items() if key != "architectures"}


def measure(device, shape, batches, prompt, new):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    config = Qwen2Config(**settings(shape))
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen2ForCausalLM(config).eval()
    torch.set_default_dtype(previous)

    def seconds(ids, count):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, min_new_tokens=count, max_new_tokens=count, pad_token_id=0)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    rates = {}
    for batch in batches:
        ids = torch.randint(1, config.vocab_size, (batch, prompt), device=device)
        seconds(ids, 2)  # warms up
        best = max(batch * new / max(seconds(ids, new + 1) - seconds(ids, 1), 1e-6) for _ in range(2))
        rates[str(batch)] = best
    return rates


def main():
    device, shape, batches, prompt, new = sys.argv[1:6]
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        print(json.dumps({"skipped": str(error)}))
        return
    batches = [int(batch) for batch in batches.split(",")]
    rates = measure(device, shape, batches, int(prompt), int(new))
    print(json.dumps({"transformers": transformers.__version__, "tokens_per_second": rates}))


if __name__ == "__main__":
    main()
