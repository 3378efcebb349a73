//! What the bodies of requests may hold, as JSON schemas. The parsers (`fields`, `sampling`,
//! `structured`, `tools`, `prompt`, and the routes) decide; the tests compare.
//!
//! # Layout
//! - `openai`: OpenAI's routes, and those about tokens; `generate`: the shapes of other servers.
//! - `common`: what all generating routes have; `messages`: conversations and tools.
//! - [`control`]: the arguments of commands.

mod common;
pub mod control;
mod generate;
mod messages;
mod openai;

use super::nullable;
use crate::http::Limits;
use onpolicy_plugin_api::ModelInfo;
use serde_json::{Map, Value, json};

/// Properties of a body or of an object in it.
type Properties = Map<String, Value>;

/// The schemas of all bodies, by name.
pub fn schemas(info: &ModelInfo, limits: &Limits) -> Vec<(&'static str, Value)> {
    let about = About { info, limits };
    vec![
        ("CompletionRequest", about.completion()),
        ("ChatCompletionRequest", about.chat_completion()),
        ("TokenizeRequest", about.tokenize()),
        ("DetokenizeRequest", about.detokenize()),
        ("TokensRequest", about.vllm()),
        ("SglangRequest", about.sglang()),
        ("TrlPromptsRequest", about.trl_prompts()),
        ("TrlChatsRequest", about.trl_chats()),
        ("ChatMessage", messages::message()),
        ("Tool", messages::tool()),
    ]
}

/// What the limits are those of.
struct About<'a> {
    info: &'a ModelInfo,
    limits: &'a Limits,
}

/// An object of these properties and no others; what is not required may be null.
fn object(required: &Properties, optional: Properties) -> Value {
    let names: Vec<&String> = required.keys().collect();
    let optional = optional.into_iter().map(|(name, schema)| (name, nullable(schema)));
    let all: Properties = required.clone().into_iter().chain(optional).collect();
    json!({ "type": "object", "required": names, "properties": all, "additionalProperties": false })
}

fn properties(of: Value) -> Properties {
    match of {
        Value::Object(map) => map,
        _ => Properties::new(),
    }
}

fn boolean(says: &str, default: bool) -> Value {
    json!({"description": says, "type": "boolean", "example": default})
}

fn integer(says: &str, low: usize, high: usize) -> Value {
    json!({"description": says, "type": "integer", "minimum": low, "maximum": high, "example": low})
}

fn number(says: &str, low: f64, high: f64) -> Value {
    json!({"description": says, "type": "number", "minimum": low, "maximum": high, "example": high})
}

fn text(says: &str, example: &str) -> Value {
    json!({"description": says, "type": "string", "example": example})
}

fn texts(says: &str, example: &str) -> Value {
    json!({"description": says, "type": "array", "items": {"type": "string"}, "example": [example]})
}

fn word(says: &str, words: &[&str]) -> Value {
    json!({"description": says, "type": "string", "enum": words, "example": words[0]})
}
