//! What the bodies of requests may hold, as JSON schemas. The parsers (`fields`, `prompt`,
//! `completions`, `chat_completions`, `tokens`) decide; the tests compare.

use super::nullable;
use crate::http::{Limits, neutral::schema as neutral};
use onpolicy_plugin_api::{ModelInfo, sampling::MAX_TOP_LOGPROBS};
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
        ("ChatMessage", message()),
    ]
}

struct About<'a> {
    info: &'a ModelInfo,
    limits: &'a Limits,
}

impl About<'_> {
    fn completion(&self) -> Value {
        let (text, ids) = (json!({"type": "string", "minLength": 1}), self.ids(1));
        let (most, token) = (self.limits.prompts, self.id());
        let prompt = json!({
            "description": "Text, token ids, or a list of either",
            "anyOf": [
                text, ids,
                {"type": "array", "items": text, "minItems": 1, "maxItems": most},
                {"type": "array", "items": {"type": "array", "items": token, "minItems": 1},
                    "minItems": 1, "maxItems": most},
            ],
            "example": "2+2 =",
        });
        let mut optional = self.common();
        optional.extend(properties(json!({
            "echo": boolean("Put the prompt before the text", false),
            "logprobs": integer("Report log-probs, and this many of the likeliest tokens", 0, MAX_TOP_LOGPROBS),
            "add_special_tokens": boolean("Add what the tokenizer puts before a text", true),
            "best_of": integer("May be n", 1, self.info.max_samples),
        })));
        optional.extend(neutral::completions());
        object(&properties(json!({ "prompt": prompt })), optional)
    }

    fn chat_completion(&self) -> Value {
        let mut optional = self.common();
        optional.extend(self.template());
        optional.extend(properties(json!({
            "max_completion_tokens": self.max_tokens(),
            "logprobs": boolean("Report log-probs", false),
            "top_logprobs": integer("Report this many of the likeliest tokens; needs logprobs", 0, MAX_TOP_LOGPROBS),
        })));
        optional.extend(neutral::chat());
        object(&messages(), optional)
    }

    fn tokenize(&self) -> Value {
        let mut shared = properties(json!({
            "model": self.model(),
            "return_token_strs": boolean("Report the text of each token", false),
        }));
        let mut chat = shared.clone();
        chat.extend(self.template());
        chat.extend(neutral::tokenize());
        chat.insert("add_special_tokens".into(), json!({"const": false}));
        let special = boolean("Add what the tokenizer puts before a text", true);
        shared.insert("add_special_tokens".into(), special);
        let text = properties(json!({"prompt": {"type": "string", "example": "hello"}}));
        json!({ "oneOf": [object(&text, shared), object(&messages(), chat)] })
    }

    fn detokenize(&self) -> Value {
        let tokens = properties(json!({ "tokens": self.ids(0) }));
        object(&tokens, properties(json!({ "model": self.model() })))
    }

    /// Fields of both generating routes; see `fields::Common`.
    fn common(&self) -> Properties {
        let mut common = properties(json!({
            "model": self.model(),
            "n": integer("Samples of each prompt", 1, self.info.max_samples),
            "max_tokens": self.max_tokens(),
            "min_tokens": integer("No sample ends before", 0, self.info.max_model_len),
            "temperature": number("0 is greedy", 0.0, 100.0),
            "top_k": {"description": "Keep the likeliest; -1 and 0 keep all", "type": "integer",
                "minimum": -1, "maximum": i64::MAX, "example": 40},
            "top_p": {"description": "Keep the likeliest up to this probability", "type": "number",
                "exclusiveMinimum": 0, "maximum": 1, "example": 0.9},
            "min_p": number("Leave out tokens less likely than this share of the likeliest", 0.0, 1.0),
            "seed": {"description": "Same seed, same weights, same tokens", "type": "integer",
                "minimum": i64::MIN, "maximum": u64::MAX, "example": 7},
            "stop": self.stop(),
            "stop_token_ids": self.ids(0),
            "include_stop_str_in_output": boolean("Leave what stopped a sample in its text", false),
            "ignore_eos": boolean("Go on past end-of-sequence tokens", false),
            "skip_special_tokens": boolean("Leave special tokens out of the text", true),
            "return_token_ids": boolean("Report token ids", false),
            "return_tokens_as_token_ids": boolean("Name tokens token_id:7 in log-probs", false),
            "stream": boolean("Answer with server-sent events", false),
            "stream_options": stream_options(),
            "request_id": {"description": "The client's name for the request", "type": "string",
                "pattern": "^[!-~]{1,128}$", "example": "mine"},
            "user": {"type": "string", "example": "someone"},
            "safety_identifier": {"type": "string", "example": "someone"},
        }));
        common.extend(neutral::shared());
        common
    }

    /// How a conversation becomes a prompt; see `prompt::take_chat`.
    fn template(&self) -> Properties {
        properties(json!({
            "add_generation_prompt": boolean("Begin the assistant's turn", true),
            "continue_final_message": boolean("Go on with the last message", false),
            "chat_template_kwargs": {"description": "For the chat template", "type": "object",
                "example": {}},
        }))
    }

    fn model(&self) -> Value {
        json!({ "type": "string", "enum": [self.info.name] })
    }

    fn max_tokens(&self) -> Value {
        integer("Most new tokens of a sample", 1, self.info.max_model_len - 1)
    }

    fn stop(&self) -> Value {
        let text = json!({"type": "string", "minLength": 1});
        json!({
            "description": "Strings that end a sample",
            "anyOf": [text, {"type": "array", "items": text, "maxItems": self.limits.stop_strings}],
            "example": ["\n\n"],
        })
    }

    fn id(&self) -> Value {
        json!({"type": "integer", "minimum": 0, "maximum": self.info.vocab_size - 1})
    }

    fn ids(&self, least: usize) -> Value {
        json!({"type": "array", "items": self.id(), "minItems": least, "example": [5]})
    }
}

fn stream_options() -> Value {
    let mut options =
        properties(json!({"include_usage": boolean("End with a chunk about token counts", false)}));
    options.extend(neutral::stream_options());
    object(&Properties::new(), options)
}

fn messages() -> Properties {
    properties(json!({ "messages": {
        "type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/ChatMessage"},
        "example": [{"role": "user", "content": "What is 3+5?"}],
    }}))
}

/// See `prompt::parse_message`.
fn message() -> Value {
    let text = json!({"type": "object", "required": ["type", "text"], "additionalProperties": false,
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}}});
    let required = properties(json!({
        "role": {"type": "string", "enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": text}]},
    }));
    let mut optional = properties(json!({"reasoning_content": {"type": "string"}}));
    optional.extend(neutral::message());
    object(&required, optional)
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
