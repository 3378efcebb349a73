"""What schemathesis checks beside its own: a body that the schema allows is refused only for a rule
between fields that no schema tells, and the refusal says which."""

import ast
import functools
import threading

import schemathesis


def one_at_a_time(function):
    """CPython 3.11 counts how deep `ast.parse` is for all threads together, and errs where two parse."""
    lock = threading.RLock()

    @functools.wraps(function)
    def locked(*args, **kwargs):
        with lock:
            return function(*args, **kwargs)

    return locked


# hypothesis parses in each worker: https://github.com/python/cpython/issues/106905
ast.parse = one_at_a_time(ast.parse)

# What the refusal of a body that fits the schema may be about.
BETWEEN_FIELDS = (
    "at least one token",  # a prompt of spaces has none for a tokenizer of words
    "the model's context is",
    "needs \"stream\": true",
    "needs \"logprobs\": true",
    "must be equal to n",
    "must not be more than max_tokens",
    "differs from max_tokens",
    "cannot be combined with",
    "there is no token",
    "are not streamed",
    "does not show documents",
    "must not hold an empty word",
    "must be above 0",  # the smallest numbers are 0 in 32 bits
    "needs tools",
    "there is no tool named",
    "is the name of an earlier tool",
    "the form in which this model's chat template writes calls is not known",
    "must be a JSON object",  # the arguments of a call, as text
    "must be one, or one for each prompt",
    "must be below the prompt's length",
    "needs \"return_logprob\": true",
    "must be true for stop strings",
    "must be 1 for a stream and 2 for a whole answer",
    "continue_final_message",
    "chat_template_kwargs",
    "samples; one request may ask for",
    "KV blocks",
    "1024 bytes long",
    "shorten the prompt",
)

# Fields whose text is in a language of its own: a grammar, an expression, a schema.
LANGUAGES = ("response_format", "structured_outputs", "guided_", "json_schema", "regex")


@schemathesis.check
def refusals_are_about_rules_between_fields(ctx, response, case):
    mode = case.meta.generation.mode if case.meta else None
    if response.status_code != 400 or mode is None or not mode.is_positive:
        return
    message, param = (response.json()["error"][name] for name in ("message", "param"))
    if any(language in (param or "") for language in LANGUAGES):
        return
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
