"""Seconds of a GRPO step of TRL's GRPOTrainer over transformers, with random weights, as JSON; part of
gpu_check. Weights, moments and gradients are bf16, one backward pass takes all samples: the fastest that
it does.

    gpu_check_trl.py DEVICE SHAPE TOKENIZER_DIR PROMPTS SAMPLES NEW_TOKENS STEPS
"""
import contextlib
import json
import statistics
import sys
import tempfile
import time

from gpu_check_transformers import settings


def measure(device, shape, tokenizer, prompts, samples, new, steps):
    import torch
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(1)
    config = transformers.Qwen2Config(**settings(shape))
    model = transformers.Qwen2ForCausalLM(config).to(device, torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    class Clock(transformers.TrainerCallback):
        times = []

        def mark(self, *_, **__):
            if device == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

        on_train_begin = on_step_end = mark

    parts = {"generate": [], "train": []}

    def timed(name, part):
        method = getattr(GRPOTrainer, name)

        def wrapper(self, *args, **others):
            began = time.perf_counter()
            result = method(self, *args, **others)
            if device == "cuda":
                torch.cuda.synchronize()
            parts[part].append(time.perf_counter() - began)
            return result

        setattr(GRPOTrainer, name, wrapper)

    timed("_generate_and_score_completions", "generate")
    timed("compute_loss", "train")
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=device == "cpu", bf16=False, fp16=False, report_to=[],
        per_device_train_batch_size=prompts * samples, gradient_accumulation_steps=1, num_generations=samples,
        max_completion_length=new, temperature=1.0, top_p=1.0, top_k=0, beta=0.0,
        generation_kwargs={"min_new_tokens": new}, max_steps=steps, logging_steps=1000, learning_rate=1e-6,
        optim="adamw_torch_fused" if device == "cuda" else "adamw_torch", save_strategy="no",
        gradient_checkpointing=False, disable_tqdm=True,
    )
    # A reward that differs within every group, so that every group teaches.
    reward = lambda completion_ids, **_: [float(sum(ids) % 97) for ids in completion_ids]
    texts = [f"{index % 10}+{index % 7}" for index in range(prompts * steps)]
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, args=config, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": texts}), callbacks=[Clock()],
    )
    trainer.train()
    times = [later - earlier for earlier, later in zip(Clock.times, Clock.times[1:])][1:]
    answer = {
        "seconds": statistics.median(times), "steps": times, "generate": statistics.median(parts["generate"][1:]),
        "loss_forward": statistics.median(parts["train"][1:]), "samples": prompts * samples, "new_tokens": new,
    }
    if device == "cuda":
        answer["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return answer


def main():
    device, shape, tokenizer = sys.argv[1:4]
    try:
        import trl
    except ImportError as error:
        print(json.dumps({"skipped": str(error)}))
        return
    # It prints what it logs.
    with contextlib.redirect_stdout(sys.stderr):
        answer = measure(device, shape, tokenizer, *map(int, sys.argv[4:8]))
    print(json.dumps({"trl": trl.__version__, **answer}))


if __name__ == "__main__":
    main()
