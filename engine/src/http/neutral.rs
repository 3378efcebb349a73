//! Fields that clients may send but that have no meaning here: each is accepted at the value that
//! changes nothing and refused at any other, so that nothing is silently ignored.

pub mod schema;

use super::{body::Fields, error::ApiError};
use serde_json::Value;

/// What a field may be.
#[derive(Clone, Copy)]
pub(super) enum Only {
    Zero,
    One,
    True,
    False,
    Empty,
    Bool,
    Word(&'static [&'static str]),
    Nothing,
}

impl Only {
    fn allows(self, value: &Value) -> bool {
        match self {
            Only::Zero => value.as_f64() == Some(0.0),
            Only::One => value.as_f64() == Some(1.0),
            Only::True => *value == true,
            Only::False => *value == false,
            Only::Bool => value.is_boolean(),
            Only::Empty => match value {
                Value::Array(list) => list.is_empty(),
                Value::Object(map) => map.is_empty(),
                Value::String(text) => text.is_empty(),
                _ => false,
            },
            Only::Word(words) => value.as_str().is_some_and(|w| words.contains(&w)),
            Only::Nothing => false,
        }
    }

    fn advice(self) -> String {
        let or = match self {
            Only::Zero => "send 0",
            Only::One => "send 1",
            Only::True => "send true",
            Only::False => "send false",
            Only::Bool => "send a boolean",
            Only::Empty => "send it empty",
            Only::Word(words) => {
                return format!("leave it out or send \"{}\"", words.join("\" or \""));
            }
            Only::Nothing => return "leave it out".into(),
        };
        format!("leave it out or {or}")
    }
}

pub(super) type Rule = (&'static str, Only);

/// No tokenizer here puts spaces between special tokens: both values of that field are neutral.
const SHARED: [Rule; 5] = [
    ("length_penalty", Only::One),
    ("use_beam_search", Only::False),
    ("spaces_between_special_tokens", Only::Bool),
    ("service_tier", Only::Word(&["auto", "default"])),
    ("store", Only::False),
];

const COMPLETIONS: [Rule; 1] = [("suffix", Only::Empty)];

const CHAT: [Rule; 12] = [
    ("metadata", Only::Empty),
    ("audio", Only::Nothing),
    ("prediction", Only::Nothing),
    ("reasoning_effort", Only::Word(&["none"])),
    ("verbosity", Only::Word(&["medium"])),
    ("web_search_options", Only::Nothing),
    ("moderation", Only::Nothing),
    ("prompt_cache_key", Only::Nothing),
    ("prompt_cache_retention", Only::Nothing),
    ("chat_template", Only::Nothing),
    ("add_special_tokens", Only::False),
    ("echo", Only::False),
];

const STREAM_OPTIONS: [Rule; 2] =
    [("include_obfuscation", Only::False), ("continuous_usage_stats", Only::False)];

const MESSAGE: [Rule; 5] = [
    ("name", Only::Nothing),
    ("refusal", Only::Nothing),
    ("audio", Only::Nothing),
    ("annotations", Only::Empty),
    ("function_call", Only::Nothing),
];

/// Takes the fields of the rules.
///
/// # Errors
/// 400 naming the first that is not neutral.
pub(super) fn check(fields: &mut Fields, rules: &[Rule]) -> Result<(), ApiError> {
    for (name, only) in rules {
        match fields.take_value(name) {
            Some(value) if !only.allows(&value) => return Err(refuse(fields, name, *only)),
            _ => {}
        }
    }
    Ok(())
}

fn refuse(fields: &Fields, name: &str, only: Only) -> ApiError {
    let rule = format!("this value is not supported yet; {}", only.advice());
    ApiError::invalid(fields.path(name), rule).with_code("unsupported_value")
}

/// Takes those that both generating routes have.
///
/// # Errors
/// 400 naming the first field that is not neutral, here and in the functions below.
pub fn check_shared(fields: &mut Fields) -> Result<(), ApiError> {
    check(fields, &SHARED)
}

/// Takes those of `/v1/completions`. `best_of` may be `n`.
pub fn check_completions(fields: &mut Fields, n: usize) -> Result<(), ApiError> {
    check(fields, &COMPLETIONS)?;
    match fields.take::<usize>("best_of")? {
        Some(best_of) if best_of != n => {
            let rule = "must be equal to n; choosing among samples is not supported yet";
            Err(ApiError::invalid("best_of", rule).with_code("unsupported_value"))
        }
        _ => Ok(()),
    }
}

/// Takes those of `/v1/chat/completions`.
pub fn check_chat(fields: &mut Fields) -> Result<(), ApiError> {
    check(fields, &CHAT)?;
    let Some(modalities) = fields.take_value("modalities") else { return Ok(()) };
    if modalities == serde_json::json!(["text"]) {
        return Ok(());
    }
    let rule = "only text is supported; leave it out or send [\"text\"]";
    Err(ApiError::invalid("modalities", rule).with_code("unsupported_value"))
}

/// Takes those of `/tokenize`.
pub fn check_tokenize(fields: &mut Fields) -> Result<(), ApiError> {
    check(fields, &[("chat_template", Only::Nothing)])
}

/// Takes those of `stream_options`.
pub fn check_stream_options(options: &mut Fields) -> Result<(), ApiError> {
    check(options, &STREAM_OPTIONS)
}

/// Takes those of one chat message.
pub fn check_message(message: &mut Fields) -> Result<(), ApiError> {
    check(message, &MESSAGE)
}
