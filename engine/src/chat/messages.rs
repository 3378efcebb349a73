//! The conversation that a prompt is made from.

use super::ChatError;
use onpolicy_plugin_api::Message;
use serde_json::{Map, Value, json};

/// A conversation in OpenAI's form, and how to render it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Chat {
    /// The messages: objects with `role`, `content` and whatever else the template reads.
    pub messages: Vec<Value>,
    /// The tools offered to the model, as OpenAI describes them.
    pub tools: Option<Value>,
    /// Documents that the model may draw on, as templates for retrieval read them.
    pub documents: Option<Value>,
    /// End with the beginning of an assistant turn.
    pub add_generation_prompt: bool,
    /// Leave the last message open, so that the model goes on with it.
    pub continue_final_message: bool,
    /// Further variables of the template, such as `enable_thinking`.
    pub kwargs: Map<String, Value>,
}

impl Chat {
    /// A conversation that the model is to answer.
    pub fn from_messages(messages: &[Message]) -> Self {
        let plain =
            |Message { role, content }: &Message| json!({ "role": role, "content": content });
        Self {
            messages: messages.iter().map(plain).collect(),
            add_generation_prompt: true,
            ..Self::default()
        }
    }

    /// The messages as templates expect them: content is one string, the arguments of tool calls
    /// are objects.
    pub(super) fn normalised(&self) -> Result<Vec<Value>, ChatError> {
        let numbered = self.messages.iter().enumerate();
        numbered.map(|(i, message)| normalise(message, &format!("messages[{i}]"))).collect()
    }
}

fn normalise(message: &Value, field: &str) -> Result<Value, ChatError> {
    let mut message = message.clone();
    let Some(keys) = message.as_object_mut() else {
        return Err(ChatError::invalid(field, "must be an object"));
    };
    if !keys.get("role").is_some_and(Value::is_string) {
        return Err(ChatError::invalid(format!("{field}.role"), "must be a string"));
    }
    if let Some(parts @ Value::Array(_)) = keys.get_mut("content") {
        *parts = Value::String(joined_text(parts, &format!("{field}.content"))?);
    }
    for call in keys.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
        parse_arguments(call, &format!("{field}.tool_calls"))?;
    }
    Ok(message)
}

/// The text of a content list, one part a line.
fn joined_text(parts: &Value, field: &str) -> Result<String, ChatError> {
    let text_of = |part: &Value| match (part, &part["type"], &part["text"]) {
        (Value::String(text), _, _) => Ok(text.clone()),
        (_, kind, Value::String(text)) if kind == "text" => Ok(text.clone()),
        (_, kind, _) => {
            let reason = format!("parts of type {kind} are not supported, only text");
            Err(ChatError::invalid(field, reason))
        }
    };
    let parts = parts.as_array().map(Vec::as_slice).unwrap_or_default();
    Ok(parts.iter().map(text_of).collect::<Result<Vec<_>, _>>()?.join("\n"))
}

/// OpenAI sends the arguments of a call as JSON in a string; templates print them as an object.
fn parse_arguments(call: &mut Value, field: &str) -> Result<(), ChatError> {
    let Some(arguments) = call.pointer_mut("/function/arguments") else { return Ok(()) };
    if let Value::String(text) = arguments {
        let parsed = serde_json::from_str(text).map_err(|error| {
            ChatError::invalid(field, format!("function.arguments is not JSON: {error}"))
        })?;
        *arguments = parsed;
    }
    Ok(())
}
