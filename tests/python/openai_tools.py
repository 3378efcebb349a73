"""Checks tool calls and structured outputs of a running server with the unmodified openai package.

Usage: python openai_tools.py http://127.0.0.1:8000
The served model is small: what it says is not checked, only that it has the form asked for.
Prints one line per check; exits with 1 at the first that fails.
"""

import json
import re
import sys

import openai
from openai import OpenAI

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
TIME = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "string", "maxLength": 8}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}
QUESTION = [{"role": "user", "content": "What is the weather in Paris, in celsius?"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def check_arguments(call):
    """A call of the weather tool, as its schema has it."""
    assert call.type == "function" and call.id
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "unit"}, arguments
    assert arguments["unit"] in ("celsius", "fahrenheit")


def check_named_tool(client, model):
    """A tool that is named is called, with arguments that its schema allows."""
    answer = client.chat.completions.create(
        model=model,
        messages=QUESTION,
        tools=[WEATHER, TIME],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        temperature=0,
        max_tokens=96,
    )
    choice = answer.choices[0]
    assert choice.finish_reason in ("tool_calls", "stop"), choice
    (call,) = choice.message.tool_calls
    check_arguments(call)
    return call


def check_streamed_tool(client, model, whole):
    """A streamed call adds up to the whole one."""
    stream = client.chat.completions.create(
        model=model,
        messages=QUESTION,
        tools=[WEATHER, TIME],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        temperature=0,
        max_tokens=96,
        stream=True,
    )
    name, arguments, ids = "", "", []
    for chunk in stream:
        for call in (chunk.choices[0].delta.tool_calls or []) if chunk.choices else []:
            assert call.index == 0
            ids += [call.id] if call.id else []
            name += (call.function.name or "") if call.function else ""
            arguments += (call.function.arguments or "") if call.function else ""
    assert len(ids) == 1 and name == whole.function.name
    assert json.loads(arguments) == json.loads(whole.function.arguments)


def check_required_tool(client, model):
    """One of the tools is called where one must be."""
    answer = client.chat.completions.create(
        model=model,
        messages=QUESTION,
        tools=[WEATHER, TIME],
        tool_choice="required",
        temperature=0,
        max_tokens=128,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls and all(call.function.name in ("get_weather", "get_time") for call in calls)
    for call in calls:
        json.loads(call.function.arguments)


def check_answered_tool(client, model, call):
    """A conversation goes on after a tool's answer; without tools wanted there is text."""
    messages = QUESTION + [
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 21}'},
    ]
    answer = client.chat.completions.create(
        model=model, messages=messages, tools=[WEATHER], tool_choice="none", max_tokens=16
    )
    message = answer.choices[0].message
    assert message.content and not message.tool_calls


def check_json_schema(client, model):
    """The text is JSON that the schema allows, whole and streamed."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Invent a person."}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": PERSON, "strict": True},
        },
        "temperature": 0,
        "max_tokens": 64,
    }
    answer = client.chat.completions.create(**body, logprobs=True)
    choice = answer.choices[0]
    assert choice.finish_reason == "stop", choice
    person = json.loads(choice.message.content)
    assert set(person) == {"name", "age"} and 0 <= person["age"] <= 120
    assert all(token.logprob <= 0 for token in choice.logprobs.content)
    stream = client.chat.completions.create(**body, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == choice.message.content


def check_json_object(client, model):
    """The text is some JSON object, or the beginning of one."""
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": 'Answer with {"ok": true}.'}],
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=48,
    )
    choice = answer.choices[0]
    assert choice.message.content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


def check_regex(client, model):
    """vLLM's extension: the text is one that a regular expression matches."""
    answer = client.completions.create(
        model=model,
        prompt="A date: ",
        max_tokens=24,
        extra_body={"structured_outputs": {"regex": "[0-9]{4}-[01][0-9]"}},
    )
    assert re.fullmatch("[0-9]{4}-[01][0-9]", answer.choices[0].text), answer


def check_refusals(client, model):
    """Schemas and tools that are wrong are refused, by name."""
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    for field, value in (("response_format", wrong), ("tools", [{"type": "nonsense"}])):
        try:
            client.chat.completions.create(model=model, messages=QUESTION, **{field: value})
            raise AssertionError(f"a wrong {field} was accepted")
        except openai.BadRequestError as error:
            assert error.param.startswith(field), error


def main(url):
    client = OpenAI(base_url=url.rstrip("/") + "/v1", api_key="none", timeout=60, max_retries=0)
    model = client.models.list().data[0].id
    call = check_named_tool(client, model)
    print("a named tool: ok")
    check_streamed_tool(client, model, call)
    print("a streamed tool: ok")
    check_required_tool(client, model)
    print("a required tool: ok")
    check_answered_tool(client, model, call)
    print("an answered tool: ok")
    check_json_schema(client, model)
    print("json_schema: ok")
    check_json_object(client, model)
    print("json_object: ok")
    check_regex(client, model)
    print("regex: ok")
    check_refusals(client, model)
    print("refusals: ok")
    print("all checks passed")


if __name__ == "__main__":
    main(sys.argv[1])
