//! The bodies of OpenAI's routes, and of those about tokens.

use super::messages::{messages, template, tools};
use super::{About, boolean, integer, object, properties};
use crate::http::neutral::schema as neutral;
use onpolicy_plugin_api::sampling::MAX_TOP_LOGPROBS;
use serde_json::{Value, json};

impl About<'_> {
    pub fn completion(&self) -> Value {
        let mut optional = self.common();
        optional.extend(properties(json!({
            "echo": boolean("Put the prompt before the text", false),
            "logprobs": integer("Report log-probs, and this many of the likeliest tokens", 0, MAX_TOP_LOGPROBS),
            "add_special_tokens": boolean("Add what the tokenizer puts before a text", true),
            "best_of": integer("May be n", 1, self.info.max_samples),
        })));
        optional.extend(neutral::completions());
        object(&properties(json!({ "prompt": self.prompts() })), optional)
    }

    pub fn chat_completion(&self) -> Value {
        let mut optional = self.common();
        optional.extend(template());
        optional.extend(properties(json!({
            "max_completion_tokens": self.max_tokens(),
            "logprobs": boolean("Report log-probs", false),
            "top_logprobs": integer("Report this many of the likeliest tokens; needs logprobs", 0, MAX_TOP_LOGPROBS),
            "tools": tools(),
            "tool_choice": tool_choice(),
            "parallel_tool_calls": boolean("An answer may make several calls", true),
        })));
        optional.extend(neutral::chat());
        object(&messages(), optional)
    }

    pub fn tokenize(&self) -> Value {
        let mut shared = properties(json!({
            "model": self.model(),
            "return_token_strs": boolean("Report the text of each token", false),
        }));
        let mut chat = shared.clone();
        chat.extend(template());
        chat.extend(neutral::tokenize());
        chat.insert("tools".into(), tools());
        chat.insert("add_special_tokens".into(), json!({"const": false}));
        let special = boolean("Add what the tokenizer puts before a text", true);
        shared.insert("add_special_tokens".into(), special);
        let text = properties(json!({"prompt": {"type": "string", "example": "hello"}}));
        json!({ "oneOf": [object(&text, shared), object(&messages(), chat)] })
    }

    pub fn detokenize(&self) -> Value {
        let tokens = properties(json!({ "tokens": self.ids(0) }));
        object(&tokens, properties(json!({ "model": self.model() })))
    }
}

/// See `tools::take_choice`.
fn tool_choice() -> Value {
    let name = properties(json!({"name": {"type": "string"}}));
    let named = properties(json!({
        "type": {"const": "function"},
        "function": object(&name, properties(json!({}))),
    }));
    json!({
        "description": "Whether a call is wanted; one by name, or auto where there are tools",
        "anyOf": [{"enum": ["none", "auto", "required"]}, object(&named, properties(json!({})))],
        "example": "none",
    })
}
