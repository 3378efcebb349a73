//! The neutral fields as JSON schemas, from the rules that check them.

use super::{CHAT, COMPLETIONS, MESSAGE, Only, Rule, SHARED, STREAM_OPTIONS};
use serde_json::{Map, Value, json};

/// Properties of an object.
type Properties = Map<String, Value>;

impl Only {
    fn schema(self) -> Value {
        match self {
            Only::Zero => json!({"const": 0}),
            Only::One => json!({"const": 1}),
            Only::True => json!({"const": true}),
            Only::False => json!({"const": false}),
            Only::Bool => json!({"type": "boolean"}),
            Only::Empty => json!({"enum": [[], {}, ""]}),
            Only::Word(words) => json!({"enum": words}),
            Only::Nothing => json!({"type": "null"}),
        }
    }
}

/// Those of these rules.
pub(in crate::http) fn all(rules: &[Rule]) -> Properties {
    rules.iter().map(|(name, only)| ((*name).to_string(), only.schema())).collect()
}

/// Those of both generating routes.
pub fn shared() -> Properties {
    all(&SHARED)
}

/// Those of `/v1/completions`.
pub fn completions() -> Properties {
    all(&COMPLETIONS)
}

/// Those of `/v1/chat/completions`.
pub fn chat() -> Properties {
    let mut chat = all(&CHAT);
    chat.insert("modalities".into(), json!({"const": ["text"]}));
    // The older forms of tools; see `tools::refuse_older`.
    chat.insert("functions".into(), json!({"const": []}));
    chat.insert("function_call".into(), json!({"const": "none"}));
    chat
}

/// Those of `/tokenize`.
pub fn tokenize() -> Properties {
    all(&[("chat_template", Only::Nothing)])
}

/// Those of `stream_options`.
pub fn stream_options() -> Properties {
    all(&STREAM_OPTIONS)
}

/// Those of one chat message.
pub fn message() -> Properties {
    all(&MESSAGE)
}
