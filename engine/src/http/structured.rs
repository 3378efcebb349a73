//! What the text of an answer must be: `response_format`, `structured_outputs`, and the older
//! `guided_*` fields.

use super::{body::Fields, error::ApiError};
use onpolicy_plugin_api::Grammar;
use serde_json::{Value, json};

/// A grammar, and the field of the request that it is from.
#[derive(Debug, Clone, PartialEq)]
pub struct Structured {
    /// What the text must be.
    pub grammar: Grammar,
    /// The field's path.
    pub field: String,
}

/// Takes the fields; none if nothing is asked of the text.
///
/// # Errors
/// 400 naming the field that is wrong, or the second of two that ask for something.
pub fn take(fields: &mut Fields) -> Result<Option<Structured>, ApiError> {
    let mut found = Vec::new();
    found.extend(response_format(fields)?);
    found.extend(structured_outputs(fields)?);
    found.extend(guided(fields)?);
    let mut found = found.into_iter();
    let first = found.next();
    match (&first, found.next()) {
        (Some(first), Some(second)) => Err(both(&first.field, &second.field)),
        _ => Ok(first),
    }
}

fn both(first: &str, second: &str) -> ApiError {
    ApiError::invalid(second, format!("cannot be combined with {first}; send one of them"))
}

/// The engine's refusal of a grammar, in the name of the field that it is from.
pub fn named(error: ApiError, field: Option<&str>) -> ApiError {
    match (field, &error.param, error.message.split_once(": ")) {
        (Some(field), Some(param), Some((_, rule))) if param == "grammar" => {
            ApiError::invalid(field, rule)
        }
        _ => error,
    }
}

fn response_format(fields: &mut Fields) -> Result<Option<Structured>, ApiError> {
    const TYPES: &str = "must be \"text\", \"json_object\" or \"json_schema\"";
    let Some(format) = fields.take_value("response_format") else { return Ok(None) };
    let field = fields.path("response_format");
    let mut format = Fields::of(format, &field)?;
    let grammar = match format.require::<String>("type")?.as_str() {
        "text" => None,
        "json_object" => Some(Grammar::JsonObject),
        "json_schema" => {
            let schema = format.require("json_schema")?;
            Some(Grammar::JsonSchema(json_schema(schema, &format.path("json_schema"))?))
        }
        _ => return Err(ApiError::invalid(format.path("type"), TYPES)),
    };
    format.finish()?;
    Ok(grammar.map(|grammar| Structured { grammar, field }))
}

/// The schema out of OpenAI's wrapping. Every schema is followed strictly.
fn json_schema(value: Value, path: &str) -> Result<Value, ApiError> {
    let mut fields = Fields::of(value, path)?;
    fields.require::<String>("name")?;
    fields.take::<String>("description")?;
    fields.take::<bool>("strict")?;
    let schema = schema(fields.require("schema")?, &fields.path("schema"))?;
    fields.finish()?;
    Ok(schema)
}

/// A JSON schema, or the text of one.
fn schema(value: Value, path: &str) -> Result<Value, ApiError> {
    let value = match value {
        Value::String(text) => serde_json::from_str(&text)
            .map_err(|error| ApiError::invalid(path, format!("is not JSON: {error}")))?,
        value => value,
    };
    match value {
        Value::Object(_) | Value::Bool(true) => Ok(value),
        _ => Err(ApiError::invalid(path, "must be a JSON schema, an object")),
    }
}

fn structured_outputs(fields: &mut Fields) -> Result<Option<Structured>, ApiError> {
    let Some(value) = fields.take_value("structured_outputs") else { return Ok(None) };
    let path = fields.path("structured_outputs");
    let mut inner = Fields::of(value, &path)?;
    let tight = inner.take_or("disable_any_whitespace", false)?;
    // There is one way of doing it, and nothing to fall back to.
    inner.take::<bool>("disable_fallback")?;
    let mut found = kinds(&mut inner, "")?;
    if inner.take_or("json_object", false)? {
        let field = inner.path("json_object");
        found.push(Structured { grammar: Grammar::JsonObject, field });
    }
    inner.finish()?;
    if let [first, second, ..] = &found[..] {
        return Err(both(&first.field, &second.field));
    }
    let found = found.pop().ok_or_else(|| {
        ApiError::invalid(&path, "must have one of json, regex, choice, grammar, json_object")
    })?;
    Ok(Some(if tight { tightened(found, &path)? } else { found }))
}

/// Without white space between the parts of a JSON value.
fn tightened(found: Structured, path: &str) -> Result<Structured, ApiError> {
    let schema = match found.grammar {
        Grammar::JsonObject => json!({ "type": "object" }),
        Grammar::JsonSchema(schema @ Value::Object(_)) => schema,
        _ => {
            let field = format!("{path}.disable_any_whitespace");
            return Err(ApiError::invalid(field, "needs json or json_object"));
        }
    };
    let mut schema = schema;
    schema["x-guidance"] = json!({ "whitespace_flexible": false });
    Ok(Structured { grammar: Grammar::JsonSchema(schema), field: found.field })
}

/// The fields that vLLM had before `structured_outputs`.
fn guided(fields: &mut Fields) -> Result<Option<Structured>, ApiError> {
    let found = kinds(fields, "guided_")?;
    match &found[..] {
        [first, second, ..] => Err(both(&first.field, &second.field)),
        _ => Ok(found.into_iter().next()),
    }
}

fn kinds(fields: &mut Fields, prefix: &str) -> Result<Vec<Structured>, ApiError> {
    let mut found = Vec::new();
    let name = |kind: &str| format!("{prefix}{kind}");
    let mut add = |grammar, field| found.push(Structured { grammar, field });
    if let Some(value) = fields.take_value(&name("json")) {
        let field = fields.path(&name("json"));
        add(Grammar::JsonSchema(schema(value, &field)?), field);
    }
    if let Some(regex) = fields.take::<String>(&name("regex"))? {
        add(Grammar::Regex(regex), fields.path(&name("regex")));
    }
    if let Some(texts) = fields.take::<Vec<String>>(&name("choice"))? {
        add(Grammar::Choice(texts), fields.path(&name("choice")));
    }
    if let Some(lark) = fields.take::<String>(&name("grammar"))? {
        add(Grammar::Lark(lark), fields.path(&name("grammar")));
    }
    Ok(found)
}
