"""Draws rollouts with verifiers' client for training, through /inference/v1/generate.

Usage: python verifiers_client.py http://127.0.0.1:8000 TOKENIZER
TOKENIZER is a folder with the served model's tokenizer, in Hugging Face's form.
Prints one line per check; exits with 1 at the first that fails.
"""

import asyncio
import sys

import httpx
import verifiers.v1 as vf

ROLLOUTS = 4
MAX_TOKENS = 24


class Sum(vf.Task):
    """Is the sum in the last answer?"""

    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float("8" in (trace.last_reply or ""))


def agent_config(url, tokenizer, model):
    client = vf.TrainClientConfig(
        base_url=f"{url}/v1", api_key_var="NO_KEY", renderer_model_name=tokenizer
    )
    return vf.AgentConfig(
        harness={"id": "two_turns"},
        runtime=vf.SubprocessConfig(),
        model=model,
        client=client,
        sampling=vf.SamplingConfig(temperature=1.0, max_tokens=MAX_TOKENS),
        timeout={"rollout": 120.0},
    )


async def rollouts(url, tokenizer, model):
    task = Sum(vf.TaskData(prompt="What is 3+5?"))
    async with vf.Agent(agent_config(url, tokenizer, model)) as agent:
        return await asyncio.gather(*(agent.run(task) for _ in range(ROLLOUTS)))


def score(url, model, token_ids):
    """What the served model thinks of each token, as prime-rl asks for it; 0 for the first."""
    sampling = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "prompt_logprobs": 0}
    body = {"model": model, "token_ids": token_ids, "sampling_params": sampling}
    answer = httpx.post(f"{url}/inference/v1/generate", json=body, timeout=60)
    entries = answer.raise_for_status().json()["prompt_logprobs"]
    assert entries[0] is None and len(entries) == len(token_ids)
    return [0.0] + [entry[str(id)]["logprob"] for id, entry in zip(token_ids[1:], entries[1:])]


def check_trace(trace):
    """Two turns that ended well and were judged."""
    assert trace.ok, trace.errors
    assert trace.num_turns == 2 and trace.rewards["right"].value in (0.0, 1.0)
    for call in trace.calls:
        assert call.error is None and call.endpoint
        assert call.finish_reason in ("stop", "length")
        assert 0 < call.usage.completion_tokens <= MAX_TOKENS


def check_branch(url, model, branch):
    """Training input: the drawn tokens have the log-probs that the model gives them, in place."""
    ids, drawn, logprobs = branch.token_ids, branch.sampled_mask, branch.logprobs
    assert len(ids) == len(drawn) == len(logprobs) and any(drawn)
    scores = score(url, model, ids)
    for is_drawn, logprob, expected in zip(drawn, logprobs, scores):
        assert logprob <= 0 and abs(logprob - (expected if is_drawn else 0.0)) < 1e-3


def main(url, tokenizer):
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    traces = asyncio.run(rollouts(url, tokenizer, model))
    assert len(traces) == ROLLOUTS
    for trace in traces:
        check_trace(trace)
    print(f"{len(traces)} rollouts: ok")
    branches = [branch for trace in traces for branch in trace.branches]
    for branch in branches:
        check_branch(url, model, branch)
    print(f"{len(branches)} training sequences: ok")
    assert len({tuple(branch.token_ids) for branch in branches}) > 1, "all samples are the same"
    print("all checks passed")


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"), sys.argv[2])
