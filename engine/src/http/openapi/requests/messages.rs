//! Conversations, and the tools that are offered in them.

use super::{Properties, boolean, object, properties, text};
use crate::http::neutral::schema as neutral;
use serde_json::{Value, json};

pub fn messages() -> Properties {
    properties(json!({ "messages": conversation() }))
}

/// A list of messages.
pub fn conversation() -> Value {
    json!({
        "type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/ChatMessage"},
        "example": [{"role": "user", "content": "What is 3+5?"}],
    })
}

/// How a conversation becomes a prompt; see `prompt::take_chat`.
pub fn template() -> Properties {
    properties(json!({
        "add_generation_prompt": boolean("Begin the assistant's turn", true),
        "continue_final_message": boolean("Go on with the last message", false),
        "chat_template_kwargs": template_kwargs(),
        "documents": {"description": "For the chat template, which shows title and text",
            "type": "array", "example": [{"title": "a", "text": "b"}],
            "items": {"type": "object", "additionalProperties": {"type": "string"}}},
    }))
}

pub fn template_kwargs() -> Value {
    json!({"description": "For the chat template", "type": "object", "example": {}})
}

/// See `prompt::parse_message`.
pub fn message() -> Value {
    let role = |roles: &[&str]| properties(json!({"role": {"type": "string", "enum": roles}}));
    let content = || properties(json!({"content": content()}));
    let mut optional = properties(json!({"reasoning_content": {"type": "string"}}));
    optional.extend(neutral::message());

    let mut speaker = role(&["system", "developer", "user"]);
    speaker.extend(content());
    let mut spoken = optional.clone();
    spoken.insert("tool_calls".into(), json!({"const": []}));

    let mut assistant = optional;
    assistant.extend(content());
    let calls = json!({"type": "array", "items": tool_call()});
    assistant.insert("tool_calls".into(), calls);
    let mut answered = object(&role(&["assistant"]), assistant);
    // Calls may stand for the content.
    answered["anyOf"] = json!([
        {"required": ["content"], "properties": {"content": {"type": ["string", "array"]}}},
        {"required": ["tool_calls"],
            "properties": {"tool_calls": {"type": "array", "minItems": 1}}},
    ]);

    let mut tool = role(&["tool"]);
    tool.extend(content());
    let mut told = spoken.clone();
    told.extend(properties(json!({
        "tool_call_id": text("The call that this answers", "call-1"),
        "name": text("The function that was called", "add"),
    })));
    json!({ "oneOf": [object(&speaker, spoken), answered, object(&tool, told)] })
}

fn content() -> Value {
    let text = json!({"type": "object", "required": ["type", "text"], "additionalProperties": false,
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}}});
    json!({"anyOf": [{"type": "string"}, {"type": "array", "items": text}]})
}

/// See `prompt::tool_call`.
fn tool_call() -> Value {
    let name = properties(json!({"name": {"type": "string"}}));
    let arguments = properties(json!({"arguments": {
        "description": "A JSON object, or the text of one",
        "anyOf": [{"type": "string"}, {"type": "object"}],
    }}));
    let function = properties(json!({"function": object(&name, arguments)}));
    let optional = json!({
        "id": {"type": "string"},
        "type": {"const": "function"},
        "index": {"type": "integer", "minimum": 0, "maximum": u64::MAX},
    });
    object(&function, properties(optional))
}

pub fn tools() -> Value {
    json!({
        "description": "Functions that the model may call",
        "type": "array", "maxItems": 128, "items": {"$ref": "#/components/schemas/Tool"},
        "example": [],
    })
}

/// See `tools::parse_tool`.
pub fn tool() -> Value {
    let name = properties(json!({
        "name": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$", "example": "add"},
    }));
    let function = properties(json!({
        "description": {"type": "string"},
        "strict": {"type": "boolean"},
        "parameters": {"description": "A JSON schema", "type": "object"},
    }));
    let required = properties(json!({
        "type": {"const": "function"},
        "function": object(&name, function),
    }));
    object(&required, Properties::new())
}
