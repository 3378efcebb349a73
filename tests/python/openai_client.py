"""Checks a running server with the unmodified openai package.

Usage: python openai_client.py http://127.0.0.1:8000
Needs only that greedy answers repeat. Prints one line per check; exits with 1 at the first that fails.
"""

import math
import sys

import openai
from openai import OpenAI

PROMPT = "Two plus three is"
MESSAGES = [{"role": "user", "content": "Say a few words about numbers."}]
GREEDY = {"temperature": 0, "max_tokens": 24}
N = 4


def check_model(client):
    """The served model is listed and can be fetched by its id."""
    model = client.models.list().data[0]
    assert client.models.retrieve(model.id).id == model.id
    assert model.max_model_len > 0
    return model.id


def check_choices(answer, n):
    """Indices, ends and token counts of a whole answer."""
    assert [choice.index for choice in answer.choices] == list(range(n))
    assert all(choice.finish_reason in ("stop", "length") for choice in answer.choices)
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert answer.weight_version >= 0


def check_policy(choice, count):
    """The policy's statistics stand beside every token."""
    policy = choice.policy
    for name in ("entropy", "discriminator", "baseline", "weight_version"):
        assert len(policy[name]) == count, name
    assert all(entropy >= 0 for entropy in policy["entropy"])
    first, last = choice.weight_versions
    assert first == policy["weight_version"][0] and last == policy["weight_version"][-1]


def check_completions(client, model):
    """Whole text completions: n, log-probs, several prompts, stop strings, echo."""
    body = {"model": model, "prompt": PROMPT, **GREEDY}
    answer = client.completions.create(**body, n=N, logprobs=2)
    check_choices(answer, N)
    assert len({choice.text for choice in answer.choices}) == 1, "greedy samples differ"
    counted = 0
    for choice in answer.choices:
        logprobs = choice.logprobs
        count = len(logprobs.tokens)
        assert count == len(logprobs.token_logprobs) == len(logprobs.text_offset)
        assert all(value <= 0 and math.isfinite(value) for value in logprobs.token_logprobs)
        for name, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs):
            assert top[name] == value and 1 <= len(top) <= 3
        assert logprobs.text_offset == sorted(logprobs.text_offset)
        check_policy(choice, count)
        counted += count
    assert counted == answer.usage.completion_tokens

    text = answer.choices[0].text
    two = client.completions.create(model=model, prompt=[PROMPT, PROMPT], **GREEDY)
    check_choices(two, 2)
    assert [choice.text for choice in two.choices] == [text, text]
    echo = client.completions.create(**body, echo=True)
    assert echo.choices[0].text == PROMPT + text

    stop = text[len(text) // 2 :][:3]
    cut = client.completions.create(**body, stop=[stop])
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop" and cut.choices[0].stop_reason == stop
    return answer


def check_streamed_completions(client, model, whole):
    """Streamed text completions say the same as whole ones."""
    stream = client.completions.create(
        model=model,
        prompt=PROMPT,
        **GREEDY,
        n=N,
        logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, values, ends, usage = [""] * N, [[] for _ in range(N)], [None] * N, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert ends[choice.index] is None, "a chunk after the end"
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason
            if choice.logprobs:
                values[choice.index] += choice.logprobs.token_logprobs
    assert texts == [choice.text for choice in whole.choices]
    assert values == [choice.logprobs.token_logprobs for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def check_chat(client, model):
    """Whole chat completions: n, log-probs with bytes."""
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, **GREEDY, n=N, logprobs=True, top_logprobs=2
    )
    check_choices(answer, N)
    counted = 0
    for choice in answer.choices:
        assert choice.message.role == "assistant"
        tokens = choice.logprobs.content
        assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in tokens)
        said = b"".join(bytes(token.bytes) for token in tokens)
        assert said.decode("utf-8", "ignore").startswith(choice.message.content.rstrip("\ufffd"))
        check_policy(choice, len(tokens))
        counted += len(tokens)
    assert counted == answer.usage.completion_tokens
    assert len({choice.message.content for choice in answer.choices}) == 1
    return answer


def check_same_logprobs(ours, theirs):
    """The same tokens; log-probs equal but for the rounding of another batch."""
    assert [(t.token, t.bytes) for t in ours] == [(t.token, t.bytes) for t in theirs]
    for one, other in zip(ours, theirs):
        assert abs(one.logprob - other.logprob) < 1e-4
        assert [t.token for t in one.top_logprobs] == [t.token for t in other.top_logprobs]


def check_streamed_chat(client, model, whole):
    """Streamed chat completions say the same as whole ones."""
    stream = client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        **GREEDY,
        n=N,
        logprobs=True,
        top_logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, tokens, ends, usage = [""] * N, [[] for _ in range(N)], [None] * N, None
    roles = [None] * N
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            index, delta = choice.index, choice.delta
            assert roles[index] or delta.role == "assistant", "the role comes first"
            roles[index] = roles[index] or delta.role
            texts[index] += delta.content or ""
            ends[index] = choice.finish_reason
            tokens[index] += choice.logprobs.content if choice.logprobs else []
    assert texts == [choice.message.content for choice in whole.choices]
    for mine, choice in zip(tokens, whole.choices):
        check_same_logprobs(mine, choice.logprobs.content)
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def check_rules(client, model):
    """Biases, penalties and lists of tokens change what is said, as they say."""

    def said(extra=None, **rules):
        body = {"return_token_ids": True} | (extra or {})
        answer = client.completions.create(
            model=model, prompt=PROMPT, **GREEDY, **rules, extra_body=body
        )
        return answer.choices[0].token_ids

    plain = said()
    assert said(logit_bias={str(plain[0]): -100})[0] != plain[0]
    assert set(said({"allowed_token_ids": plain[1:3]})) <= set(plain[1:3])
    once = said({"repetition_penalty": 2.0}, presence_penalty=2, frequency_penalty=2)
    assert once != plain or len(set(plain)) == len(plain)
    assert said(presence_penalty=0, frequency_penalty=0) == plain


def check_tokens(client, model):
    """Token ids beside the text, whole and streamed; they go on as they are in a second turn."""
    extra = {"return_token_ids": True, "ignore_eos": True}
    body = {"model": model, "temperature": 0, "extra_body": extra}
    whole = client.completions.create(**body, prompt=PROMPT, max_tokens=24).choices[0]
    first = client.completions.create(**body, prompt=PROMPT, max_tokens=9).choices[0]
    assert first.token_ids == whole.token_ids[:9] and len(first.prompt_token_ids) > 0
    longer = first.prompt_token_ids + first.token_ids
    second = client.completions.create(**body, prompt=longer, max_tokens=15).choices[0]
    assert second.prompt_token_ids == longer
    assert first.token_ids + second.token_ids == whole.token_ids
    assert first.text + second.text == whole.text

    stream = client.completions.create(**body, prompt=PROMPT, max_tokens=24, stream=True)
    streamed = []
    for chunk in stream:
        streamed += getattr(chunk.choices[0], "token_ids", None) or []
    assert streamed == whole.token_ids
    chat = client.chat.completions.create(**body, messages=MESSAGES, max_tokens=4)
    assert len(chat.choices[0].token_ids) == chat.usage.completion_tokens
    assert len(chat.prompt_token_ids) == chat.usage.prompt_tokens


def check_errors(client, model):
    """Errors arrive as the package's own exceptions."""
    try:
        client.completions.create(model="no-such-model", prompt=PROMPT)
        raise AssertionError("an unknown model was accepted")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found" and error.param == "model"
    try:
        client.chat.completions.create(model=model, messages=MESSAGES, frequency_penalty=3)
        raise AssertionError("a value out of range was accepted")
    except openai.BadRequestError as error:
        assert error.param == "frequency_penalty"


def main(url):
    client = OpenAI(base_url=url.rstrip("/") + "/v1", api_key="none", timeout=60, max_retries=0)
    model = check_model(client)
    print("models: ok")
    whole = check_completions(client, model)
    print("completions: ok")
    check_streamed_completions(client, model, whole)
    print("streamed completions: ok")
    whole = check_chat(client, model)
    print("chat: ok")
    check_streamed_chat(client, model, whole)
    print("streamed chat: ok")
    check_rules(client, model)
    print("rules: ok")
    check_tokens(client, model)
    print("token ids: ok")
    check_errors(client, model)
    print("errors: ok")
    print("all checks passed")


if __name__ == "__main__":
    main(sys.argv[1])
