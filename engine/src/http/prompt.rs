//! Prompts: text, token ids and conversations become token ids.

use super::{AppState, body::Fields, error::ApiError, fields::check_ids, neutral};
use crate::chat::{Chat, ChatError};
use serde_json::{Value, json};

const SHAPES: &str =
    "must be a string, a list of strings, a list of token ids, or a list of lists of token ids";
const ROLES: &str = "must be \"system\", \"developer\", \"user\" or \"assistant\"";

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
    list.iter().map(|id| u32::try_from(id.as_u64()?).ok()).collect()
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
    Ok(Chat { messages, tools: None, add_generation_prompt, continue_final_message, kwargs })
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
        "tool" | "function" => {
            return Err(ApiError::invalid(fields.path("role"), "tools are not supported yet"));
        }
        _ => return Err(ApiError::invalid(fields.path("role"), ROLES)),
    };
    let path = fields.path("content");
    let mut message =
        json!({ "role": role, "content": content(fields.require("content")?, &path)? });
    if let Some(reasoning) = fields.take::<String>("reasoning_content")? {
        message["reasoning_content"] = reasoning.into();
    }
    neutral::check_message(&mut fields)?;
    fields.finish()?;
    Ok(message)
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
            (json!({"role": "tool", "content": "a"}), "messages[0].role"),
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
