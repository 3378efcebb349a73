"""Checks a running server with TRL's own client for a vLLM server.

Usage: python trl_client.py http://127.0.0.1:8000
Prints one line per check; exits with 1 at the first that fails.
"""

import sys

import stand_ins

stand_ins.install()

from trl.generation.vllm_client import VLLMClient  # noqa: E402

PROMPTS = ["Two plus three is", "The first letters of the alphabet are a, b,"]
CHATS = [
    [{"role": "user", "content": "What is 3+5?"}],
    [
        {"role": "system", "content": "You answer with one word."},
        {"role": "user", "content": "Name a colour."},
    ],
]
N = 3


def check_round(answer, prompts, logprobs):
    """A group of samples per prompt; `logprobs` named tokens at each position, and the drawn one."""
    assert len(answer["prompt_ids"]) == prompts
    assert len(answer["completion_ids"]) == prompts * N
    for ids, values, names in zip(
        answer["completion_ids"], answer["logprobs"], answer["logprob_token_ids"], strict=True
    ):
        assert len(ids) == len(values) == len(names) > 0
        for token, value, name in zip(ids, values, names, strict=True):
            assert token in name and len(name) == len(value)
            assert max(1, logprobs) <= len(value) <= logprobs + 1
            assert all(logprob <= 0 for logprob in value)
            assert value == sorted(value, reverse=True), "likeliest first"


def check_generate(client):
    """Text prompts and token ids, with and without other tokens' log-probs."""
    answer = client.generate(PROMPTS, n=N, temperature=0.9, top_p=0.95, max_tokens=12)
    check_round(answer, len(PROMPTS), 0)
    prompt_ids = answer["prompt_ids"]
    check_round(client.generate(prompt_ids, n=N, max_tokens=8, logprobs=3), len(PROMPTS), 3)
    seeded = {"n": N, "max_tokens": 8, "generation_kwargs": {"seed": 7}}
    one, other = client.generate(prompt_ids, **seeded), client.generate(prompt_ids, **seeded)
    assert one["completion_ids"] == other["completion_ids"]
    bare = client.generate(prompt_ids, logprobs=None, max_tokens=4)
    assert bare["logprobs"] is None and len(bare["completion_ids"]) == len(PROMPTS)


def check_continuation(client):
    """Tokens that were drawn go on as they are: two turns are one."""
    (prompt,) = client.generate(PROMPTS[:1], temperature=0, max_tokens=1)["prompt_ids"]

    def greedy(prompt, count):
        kwargs = {"ignore_eos": True}
        answer = client.generate(
            [prompt], temperature=0, max_tokens=count, generation_kwargs=kwargs
        )
        assert answer["prompt_ids"] == [prompt]
        return answer["completion_ids"][0]

    whole, first = greedy(prompt, 24), greedy(prompt, 9)
    assert first + greedy(prompt + first, 15) == whole


def check_chat(client):
    """Conversations, several samples each."""
    answer = client.chat(CHATS, n=N, max_tokens=8, logprobs=2)
    check_round(answer, len(CHATS), 2)
    again = client.chat(CHATS, n=N, temperature=0, max_tokens=8)
    assert again["prompt_ids"] == answer["prompt_ids"]
    check_round(again, len(CHATS), 0)


def main(url):
    client = VLLMClient(base_url=url, connection_timeout=10)
    for check in (check_generate, check_continuation, check_chat):
        check(client)
        print(f"{check.__name__}: ok")
    print("all checks passed")


if __name__ == "__main__":
    main(sys.argv[1])
