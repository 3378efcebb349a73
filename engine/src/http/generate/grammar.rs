//! What a sample's text must be, as vLLM and SGLang write it.

use crate::http::body::Fields;
use crate::http::error::ApiError;
use crate::http::neutral::{self, Only, Rule};
use onpolicy_plugin_api::Grammar;
use serde_json::Value;

/// Options of vLLM's grammars that change nothing.
const OPTIONS: [Rule; 4] = [
    ("disable_any_whitespace", Only::False),
    ("disable_additional_properties", Only::False),
    ("whitespace_pattern", Only::Nothing),
    ("structural_tag", Only::Nothing),
];

/// Takes vLLM's `structured_outputs`: an object with one of `json`, `json_object`, `regex`,
/// `choice` and `grammar`.
///
/// # Errors
/// 400 naming what is wrong, or the second grammar.
pub fn structured_outputs(fields: &mut Fields) -> Result<Option<Grammar>, ApiError> {
    let Some(value) = fields.take_value("structured_outputs") else { return Ok(None) };
    let path = fields.path("structured_outputs");
    let mut fields = Fields::of(value, &path)?;
    neutral::check(&mut fields, &OPTIONS)?;
    let found = [
        json_schema(&mut fields, "json")?,
        fields.take_or("json_object", false)?.then_some(Grammar::JsonObject),
        fields.take("regex")?.map(Grammar::Regex),
        fields.take("choice")?.map(Grammar::Choice),
        fields.take("grammar")?.map(Grammar::Lark),
    ];
    fields.finish()?;
    match one_of(found, &path)? {
        None => Err(ApiError::invalid(
            path,
            "must hold one of json, json_object, regex, choice, grammar",
        )),
        grammar => Ok(grammar),
    }
}

/// Takes SGLang's `json_schema` and `regex`.
///
/// # Errors
/// 400 naming what is wrong, or the second grammar.
pub fn sglang(fields: &mut Fields) -> Result<Option<Grammar>, ApiError> {
    let schema = json_schema(fields, "json_schema")?;
    let regex = fields.take("regex")?.map(Grammar::Regex);
    let path = fields.path("regex");
    one_of([schema, regex], &path)
}

/// A JSON schema, as an object or as the text of one.
fn json_schema(fields: &mut Fields, name: &str) -> Result<Option<Grammar>, ApiError> {
    let wrong = |fields: &Fields| {
        ApiError::invalid(fields.path(name), "must be a JSON schema, as an object or as its text")
    };
    let schema = match fields.take_value(name) {
        None => return Ok(None),
        Some(Value::String(text)) => serde_json::from_str(&text).map_err(|_| wrong(fields))?,
        Some(value) => value,
    };
    match schema {
        Value::Object(_) | Value::Bool(_) => Ok(Some(Grammar::JsonSchema(schema))),
        _ => Err(wrong(fields)),
    }
}

fn one_of<const N: usize>(
    found: [Option<Grammar>; N],
    path: &str,
) -> Result<Option<Grammar>, ApiError> {
    let mut grammars = found.into_iter().flatten();
    match (grammars.next(), grammars.next()) {
        (grammar, None) => Ok(grammar),
        _ => Err(ApiError::invalid(path, "cannot be combined with another grammar")),
    }
}
