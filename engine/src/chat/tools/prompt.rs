//! Tools and calls in messages, for chat templates that know neither: in the form of Hermes, which
//! models have seen most of.

use super::ToolFormat;
use crate::chat::python;
use serde_json::{Value, json};

/// The form that is spelled out.
pub const FORMAT: ToolFormat = ToolFormat::Hermes;

/// Messages in which system, user and assistant say all that is to be said about tools.
pub fn spelled_out(messages: Vec<Value>, tools: Option<&Value>) -> Vec<Value> {
    let mut plain: Vec<Value> = Vec::with_capacity(messages.len() + 1);
    let mut after_result = false;
    for message in messages {
        let is_result = message["role"] == "tool";
        match plain.last_mut().filter(|_| is_result && after_result) {
            // Results that follow one another are one turn.
            Some(last) => append(last, &format!("\n{}", result(&message))),
            None if is_result => plain.push(json!({ "role": "user", "content": result(&message) })),
            None => plain.push(with_calls(message)),
        }
        after_result = is_result;
    }
    if let Some(tools) = tools.and_then(Value::as_array).filter(|tools| !tools.is_empty()) {
        offer(&mut plain, tools);
    }
    plain
}

fn append(message: &mut Value, text: &str) {
    let content = message["content"].as_str().unwrap_or_default();
    message["content"] = format!("{content}{text}").into();
}

fn result(message: &Value) -> String {
    let content = message["content"].as_str().unwrap_or_default();
    format!("<tool_response>\n{content}\n</tool_response>")
}

/// An assistant's message whose calls stand in its text.
fn with_calls(mut message: Value) -> Value {
    let Some(calls) = message.as_object_mut().and_then(|map| map.shift_remove("tool_calls")) else {
        return message;
    };
    for call in calls.as_array().into_iter().flatten() {
        let function = &call["function"];
        let call = json!({ "name": function["name"], "arguments": function["arguments"] });
        let space = if message["content"].as_str().is_none_or(str::is_empty) { "" } else { "\n" };
        append(
            &mut message,
            &format!("{space}<tool_call>\n{}\n</tool_call>", python::dumps(&call)),
        );
    }
    message
}

/// Says in the system's message what tools there are and how they are called.
fn offer(messages: &mut Vec<Value>, tools: &[Value]) {
    let tools: Vec<String> = tools.iter().map(python::dumps).collect();
    let text = format!(
        "You can call tools. These are their signatures, one a line, as JSON schemas:\n<tools>\n{}\n\
         </tools>\nTo call a tool, answer with its name and arguments:\n<tool_call>\n\
         {{\"name\": <name>, \"arguments\": <arguments as a JSON object>}}\n</tool_call>\n\
         Its result comes back within <tool_response></tool_response>.",
        tools.join("\n")
    );
    match messages.first_mut().filter(|first| first["role"] == "system") {
        Some(system) => append(system, &format!("\n\n{text}")),
        None => messages.insert(0, json!({ "role": "system", "content": text })),
    }
}
