//! Prompts: text, token ids and conversations become token ids.

use super::{AppState, body::Fields, error::ApiError, fields::check_ids, neutral};
use crate::chat::{Chat, ChatError};
use serde_json::{Map, Value, json};
use std::collections::HashMap;

const SHAPES: &str =
    "must be a string, a list of strings, a list of token ids, or a list of lists of token ids";
const ROLES: &str = "must be \"system\", \"developer\", \"user\", \"assistant\" or \"tool\"";

/// One prompt of `/v1/completions`.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// Text, still to be tokenized.
    Text(String),
    /// Token ids as they are.
    Tokens(Vec<u32>),
}

impl Prompt {
    /// Takes the field `prompt`, which may hold many.
    ///
    /// # Errors
    /// 400 if it is absent, empty, of another shape, or holds more prompts than are allowed.
    pub fn take_all(fields: &mut Fields, state: &AppState) -> Result<Vec<Prompt>, ApiError> {
        let value = fields.require("prompt")?;
        let prompts = parse(value).ok_or_else(|| ApiError::invalid("prompt", SHAPES))?;
        let most = state.limits.prompts;
        if prompts.is_empty() || prompts.len() > most {
            let rule = format!("must hold 1 to {most} prompts, not {}", prompts.len());
            return Err(ApiError::invalid("prompt", rule));
        }
        Ok(prompts)
    }

    /// The prompt's token ids; `special` adds what the tokenizer puts before a text.
    ///
    /// # Errors
    /// 400 if there is no token, or an id that the model does not have.
    pub fn encode(&self, special: bool, state: &AppState) -> Result<Vec<u32>, ApiError> {
        let ids = match self {
            Prompt::Text(text) if special => {
                state.tokenizer.encode_prompt(text).map_err(refused)?
            }
            Prompt::Text(text) => state.tokenizer.encode(text).map_err(refused)?,
            Prompt::Tokens(ids) => ids.clone(),
        };
        check_ids("prompt", &ids, &state.info)?;
        Ok(ids)
    }
}

fn refused(error: ChatError) -> ApiError {
    ApiError::invalid("prompt", format!("could not be tokenized: {error}"))
}

fn parse(value: Value) -> Option<Vec<Prompt>> {
    let list = match value {
        Value::String(text) => return Some(vec![Prompt::Text(text)]),
        Value::Array(list) => list,
        _ => return None,
    };
    match list.first() {
        Some(Value::Number(_)) => Some(vec![Prompt::Tokens(ids(&list)?)]),
        _ => list.into_iter().map(parse_one).collect(),
    }
}

fn parse_one(value: Value) -> Option<Prompt> {
    match value {
        Value::String(text) => Some(Prompt::Text(text)),
        Value::Array(list) => Some(Prompt::Tokens(ids(&list)?)),
        _ => None,
    }
}

fn ids(list: &[Value]) -> Option<Vec<u32>> {
    let id = |id: &Value| match id.as_u64() {
        Some(id) => u32::try_from(id).ok(),
        None => id.as_f64().filter(|id| *id == f64::from(*id as u32)).map(|id| id as u32),
    };
    list.iter().map(id).collect()
}

/// Takes a conversation: `messages` and how the chat template is to be applied.
///
/// # Errors
/// 400 naming what is wrong.
pub fn take_chat(fields: &mut Fields) -> Result<Chat, ApiError> {
    let messages: Vec<Value> = fields.require("messages")?;
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "must hold at least one message"));
    }
    let messages = messages.into_iter().enumerate().map(|(i, message)| {
        let path = format!("messages[{i}]");
        parse_message(Fields::of(message, &path)?)
    });
    let messages = messages.collect::<Result<_, _>>()?;
    let continue_final_message = fields.take_or("continue_final_message", false)?;
    let add_generation_prompt = fields.take_or("add_generation_prompt", !continue_final_message)?;
    if continue_final_message && add_generation_prompt {
        let rule = "cannot be combined with add_generation_prompt";
        return Err(ApiError::invalid("continue_final_message", rule));
    }
    let kwargs = fields.take_or("chat_template_kwargs", serde_json::Map::new())?;
    let documents = documents(fields)?;
    let tools = None;
    Ok(Chat { messages, tools, documents, add_generation_prompt, continue_final_message, kwargs })
}

/// Documents, each an object of texts; templates show `title` and `text`.
fn documents(fields: &mut Fields) -> Result<Option<Value>, ApiError> {
    let documents: Vec<HashMap<String, String>> = fields.take_or("documents", Vec::new())?;
    Ok((!documents.is_empty()).then(|| json!(documents)))
}

/// The conversation's token ids.
///
/// # Errors
/// 400 with what the chat template says.
pub fn encode_chat(chat: &Chat, state: &AppState) -> Result<Vec<u32>, ApiError> {
    let ids = state.tokenizer.encode_chat(chat).map_err(|error| match error {
        ChatError::Invalid { field, reason } => ApiError::invalid(field, reason),
        other => ApiError::invalid("messages", other.to_string()),
    })?;
    check_ids("messages", &ids, &state.info)?;
    Ok(ids)
}

/// A message as chat templates read it: role, content as one string, and the reasoning if there
/// is some. A developer speaks with the system's role, which is the one that templates know.
fn parse_message(mut fields: Fields) -> Result<Value, ApiError> {
    let role = match fields.require::<String>("role")?.as_str() {
        "system" | "developer" => "system",
        "user" => "user",
        "assistant" => "assistant",
        "tool" => "tool",
        "function" => {
            let rule = "functions are the older form of tools; send the role \"tool\"";
            return Err(ApiError::invalid(fields.path("role"), rule));
        }
        _ => return Err(ApiError::invalid(fields.path("role"), ROLES)),
    };
    let calls = tool_calls(&mut fields, role)?;
    let path = fields.path("content");
    let content = match fields.take_value("content") {
        None if calls.is_some() => String::new(),
        None => return Err(ApiError::invalid(path, "is required")),
        Some(value) => content(value, &path)?,
    };
    let mut message = json!({ "role": role, "content": content });
    if let Some(calls) = calls {
        message["tool_calls"] = calls;
    }
    if role == "tool" {
        for name in ["tool_call_id", "name"] {
            if let Some(text) = fields.take::<String>(name)? {
                message[name] = text.into();
            }
        }
    }
    if let Some(reasoning) = fields.take::<String>("reasoning_content")? {
        message["reasoning_content"] = reasoning.into();
    }
    neutral::check_message(&mut fields)?;
    fields.finish()?;
    Ok(message)
}

/// The calls that an assistant made, as chat templates read them: arguments are objects.
fn tool_calls(fields: &mut Fields, role: &str) -> Result<Option<Value>, ApiError> {
    let calls: Vec<Value> = fields.take_or("tool_calls", Vec::new())?;
    let path = fields.path("tool_calls");
    if calls.is_empty() {
        return Ok(None);
    }
    if role != "assistant" {
        return Err(ApiError::invalid(path, "only an assistant makes calls"));
    }
    let calls = calls.into_iter().enumerate();
    let calls = calls.map(|(i, call)| tool_call(Fields::of(call, &format!("{path}[{i}]"))?));
    Ok(Some(Value::Array(calls.collect::<Result<_, _>>()?)))
}

fn tool_call(mut fields: Fields) -> Result<Value, ApiError> {
    let id: Option<String> = fields.take("id")?;
    let kind = fields.take_or("type", "function".to_string())?;
    if kind != "function" {
        return Err(ApiError::invalid(fields.path("type"), "must be \"function\""));
    }
    // Its place, as streams have it.
    fields.take::<usize>("index")?;
    let path = fields.path("function");
    let mut function = Fields::of(fields.require("function")?, &path)?;
    fields.finish()?;
    let name: String = function.require("name")?;
    let path = function.path("arguments");
    let arguments = arguments(function.take_value("arguments"), &path)?;
    function.finish()?;
    let mut call = json!({ "type": kind, "function": { "name": name, "arguments": arguments } });
    if let Some(id) = id {
        call["id"] = id.into();
    }
    Ok(call)
}

/// OpenAI has the arguments of a call as JSON in a string.
fn arguments(value: Option<Value>, path: &str) -> Result<Map<String, Value>, ApiError> {
    let parsed = match value {
        None => Ok(Map::new()),
        Some(Value::Object(map)) => Ok(map),
        Some(Value::String(text)) if text.trim().is_empty() => Ok(Map::new()),
        Some(Value::String(text)) => serde_json::from_str(&text).map_err(|error| error.to_string()),
        Some(_) => Err("it is neither a string nor an object".to_string()),
    };
    parsed.map_err(|why| ApiError::invalid(path, format!("must be a JSON object: {why}")))
}

/// Text parts are joined by line breaks.
fn content(value: Value, path: &str) -> Result<String, ApiError> {
    let parts = match value {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        _ => return Err(ApiError::invalid(path, "must be a string or a list of text parts")),
    };
    let texts = parts.into_iter().enumerate().map(|(i, part)| {
        let mut part = Fields::of(part, &format!("{path}[{i}]"))?;
        if part.require::<String>("type")? != "text" {
            return Err(ApiError::invalid(part.path("type"), "only \"text\" is supported"));
        }
        let text = part.require::<String>("text")?;
        part.finish()?;
        Ok(text)
    });
    Ok(texts.collect::<Result<Vec<_>, _>>()?.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_come_in_four_shapes() {
        let text = |s: &str| Prompt::Text(s.into());
        assert_eq!(parse(json!("a")), Some(vec![text("a")]));
        assert_eq!(parse(json!(["a", "b"])), Some(vec![text("a"), text("b")]));
        assert_eq!(parse(json!([1, 2])), Some(vec![Prompt::Tokens(vec![1, 2])]));
        let two = vec![Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])];
        assert_eq!(parse(json!([[1], [2, 3]])), Some(two));
        for wrong in [json!(1), json!({}), json!([1, "a"]), json!([1.5]), json!([-1])] {
            assert_eq!(parse(wrong.clone()), None, "{wrong}");
        }
        for wrong in [json!([[1], ["a"]]), json!([[[1]]]), json!([4294967296u64]), json!([true])] {
            assert_eq!(parse(wrong.clone()), None, "{wrong}");
        }
    }

    #[test]
    fn messages_become_plain() {
        let parse = |value| parse_message(Fields::of(value, "messages[0]")?);
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let got = parse(json!({"role": "developer", "content": parts, "tool_calls": []})).unwrap();
        assert_eq!(got, json!({"role": "system", "content": "a\nb"}));
        let refusals = [
            (json!({"role": "user"}), "messages[0].content"),
            (json!({"role": "function", "content": "a"}), "messages[0].role"),
            (json!({"role": "tool"}), "messages[0].content"),
            (json!({"role": "user", "content": "a", "tool_calls": [{}]}), "messages[0].tool_calls"),
            (
                json!({"role": "assistant", "tool_calls": [{"function": {"name": "f",
                    "arguments": "{"}}]}),
                "messages[0].tool_calls[0].function.arguments",
            ),
            (json!({"role": "user", "content": "a", "name": "b"}), "messages[0].name"),
            (json!({"role": "user", "content": 1}), "messages[0].content"),
            (json!("hello"), "messages[0]"),
            (
                json!({"role": "user", "content": [{"type": "image_url"}]}),
                "messages[0].content[0].type",
            ),
        ];
        for (value, param) in refusals {
            assert_eq!(parse(value).unwrap_err().param.as_deref(), Some(param));
        }
    }
}
