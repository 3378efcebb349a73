"""Checks tools and structured outputs of a running server with the unmodified openai package.

Usage: python openai_tools.py http://127.0.0.1:8000
The model may be a small one: only what is forced is looked at. Prints one line per check; exits
with 1 at the first that fails.
"""

import json
import sys
from typing import Literal

import openai
from openai import OpenAI
from pydantic import BaseModel, Field

N = 4
ASKED = [{"role": "user", "content": "What is the weather in Paris?"}]


class Weather(BaseModel):
    """Tells the weather of a city."""

    city: Literal["Paris", "London"]
    unit: Literal["celsius", "fahrenheit"]


class Person(BaseModel):
    age: int = Field(ge=1, le=99)
    colour: Literal["red", "green"]


def tools():
    """The first as the package makes it of a class, the second without parameters."""
    now = {"type": "function", "function": {"name": "now", "description": "Tells the time."}}
    return [openai.pydantic_function_tool(Weather), now]


def check_arguments(call):
    """The call's arguments are JSON as its schema has it."""
    arguments = json.loads(call.function.arguments)
    if call.function.name == "now":
        assert arguments == {}, arguments
        return
    assert call.function.name == "Weather"
    Weather.model_validate(arguments)
    assert set(arguments) == {"city", "unit"}


def check_schema(client, model):
    """A class as response format: every sample is one of it."""
    answer = client.chat.completions.parse(
        model=model,
        messages=[{"role": "user", "content": "Invent a person."}],
        response_format=Person,
        n=N,
        max_tokens=200,
        seed=1,
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop", choice.message.content
        assert 1 <= choice.message.parsed.age <= 99
    text = client.completions.create(
        model=model, prompt="Colour:", n=N, max_tokens=20, extra_body={"guided_choice": ["red", "green"]}
    )
    assert all(choice.text in ("red", "green") for choice in text.choices)


def check_forced(client, model):
    """Required and named calls."""
    ask = {"model": model, "messages": ASKED, "tools": tools(), "max_tokens": 200, "n": N, "seed": 2}
    answer = client.chat.completions.create(
        **ask, tool_choice="required", parallel_tool_calls=False
    )
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        (call,) = choice.message.tool_calls
        check_arguments(call)
    named = {"type": "function", "function": {"name": "Weather"}}
    answer = client.chat.completions.create(**ask, tool_choice=named)
    for choice in answer.choices:
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "stop" and call.function.name == "Weather"
        check_arguments(call)
    return answer.choices[0].message


def check_streamed(client, model):
    """A streamed call says the same as a whole one."""
    named = {"type": "function", "function": {"name": "Weather"}}
    ask = {"model": model, "messages": ASKED, "tools": tools(), "max_tokens": 200, "temperature": 0}
    whole = client.chat.completions.create(**ask, tool_choice=named)
    name, arguments, ends = None, "", []
    for chunk in client.chat.completions.create(**ask, tool_choice=named, stream=True):
        (choice,) = chunk.choices
        assert not choice.delta.content
        for call in choice.delta.tool_calls or []:
            assert call.index == 0 and (name is None) == (call.id is not None)
            name = name or call.function.name
            arguments += call.function.arguments
        ends += [choice.finish_reason] if choice.finish_reason else []
    function = whole.choices[0].message.tool_calls[0].function
    assert (name, arguments, ends) == (function.name, function.arguments, ["stop"])


def check_round_trip(client, model, message):
    """An answer's calls and their results go back as they came; the model may call again or not."""
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    messages = [*ASKED, message.model_dump(exclude_none=True), result]
    answer = client.chat.completions.create(
        model=model, messages=messages, tools=tools(), max_tokens=24
    )
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")


def check_errors(client, model):
    """What cannot be followed is refused, by the field's name."""
    wrong = {"name": "x", "schema": {"type": "colour"}}
    try:
        client.chat.completions.create(
            model=model,
            messages=ASKED,
            response_format={"type": "json_schema", "json_schema": wrong},
        )
        raise AssertionError("a schema that is none was accepted")
    except openai.BadRequestError as error:
        assert error.param == "response_format", error


def main(url):
    client = OpenAI(base_url=url.rstrip("/") + "/v1", api_key="none", timeout=60, max_retries=0)
    model = client.models.list().data[0].id
    check_schema(client, model)
    print("schema: ok")
    message = check_forced(client, model)
    print("forced calls: ok")
    check_streamed(client, model)
    print("streamed call: ok")
    check_round_trip(client, model, message)
    print("round trip: ok")
    check_errors(client, model)
    print("errors: ok")
    print("all checks passed")


if __name__ == "__main__":
    main(sys.argv[1])
