"""What schemathesis checks beside its own: a body that the schema allows is refused only for a rule
between fields that no schema tells, and the refusal says which."""

import schemathesis

# What the refusal of a body that fits the schema may be about.
BETWEEN_FIELDS = (
    "at least one token",  # a prompt of spaces has none for a tokenizer of words
    "the model's context is",
    "needs \"stream\": true",
    "needs \"logprobs\": true",
    "must be equal to n",
    "must not be more than max_tokens",
    "differs from max_tokens",
    "cannot be combined with add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "samples; one request may ask for",
    "KV blocks",
    "must be at most 1024 bytes long",
    "shorten the prompt",
)


@schemathesis.check
def refusals_are_about_rules_between_fields(ctx, response, case):
    mode = case.meta.generation.mode if case.meta else None
    if response.status_code != 400 or mode is None or not mode.is_positive:
        return
    message = response.json()["error"]["message"]
    assert any(rule in message for rule in BETWEEN_FIELDS), f"valid by the schema: {message}"


@schemathesis.check
def errors_have_one_shape(ctx, response, case):
    if response.status_code < 400:
        return
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert error["message"] and error["type"], error
    if response.status_code in (429, 503):
        assert response.headers["retry-after"], response.headers
