//! Grammars as llguidance reads them, and its errors as users read them.

use llguidance::api::TopLevelGrammar;
use onpolicy_plugin_api::Grammar;
use serde_json::json;
use std::fmt::Display;

/// Longest text of a grammar, in bytes; of a JSON schema, that of its JSON.
const MAX_BYTES: usize = 256 << 10;
/// Longest regular expression, in bytes.
const MAX_REGEX_BYTES: usize = 4 << 10;
/// Longest reason that is given, in characters.
const MAX_REASON: usize = 400;
/// Most texts to choose from.
const MAX_CHOICES: usize = 1024;

/// The grammar in llguidance's form.
///
/// # Errors
/// It is too large, or empty.
pub fn of(grammar: &Grammar) -> Result<TopLevelGrammar, String> {
    match grammar {
        Grammar::JsonObject => Ok(TopLevelGrammar::from_json_schema(json!({ "type": "object" }))),
        Grammar::JsonSchema(schema) => {
            check_size("the JSON schema", schema.to_string().len(), MAX_BYTES)?;
            Ok(TopLevelGrammar::from_json_schema(schema.clone()))
        }
        Grammar::Regex(regex) => {
            check_size("the regular expression", regex.len(), MAX_REGEX_BYTES)?;
            if regex.is_empty() {
                return Err("must not be an empty regular expression".into());
            }
            Ok(TopLevelGrammar::from_regex(regex))
        }
        Grammar::Choice(texts) => choice(texts),
        Grammar::Lark(text) => {
            check_size("the grammar", text.len(), MAX_BYTES)?;
            Ok(TopLevelGrammar::from_lark(text.clone()))
        }
    }
}

fn check_size(what: &str, bytes: usize, most: usize) -> Result<(), String> {
    if bytes <= most {
        return Ok(());
    }
    Err(format!("{what} has {bytes} bytes; at most {most} are taken"))
}

fn choice(texts: &[String]) -> Result<TopLevelGrammar, String> {
    if texts.is_empty() || texts.len() > MAX_CHOICES {
        return Err(format!(
            "must be 1 to {MAX_CHOICES} texts to choose from, not {}",
            texts.len()
        ));
    }
    if texts.iter().any(String::is_empty) {
        return Err("a text to choose from must not be empty".into());
    }
    check_size("the list of texts", texts.iter().map(String::len).sum(), MAX_BYTES)?;
    let regex: Vec<String> = texts.iter().map(|text| literal(text)).collect();
    Ok(TopLevelGrammar::from_regex(&format!("({})", regex.join("|"))))
}

/// A regular expression for exactly this text.
fn literal(text: &str) -> String {
    let mut regex = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            c if c.is_alphanumeric() || c == ' ' => regex.push(c),
            c => regex.push_str(&format!("\\u{{{:x}}}", c as u32)),
        }
    }
    regex
}

/// Why a grammar was refused, and what may help.
pub fn reason(grammar: &Grammar, error: impl Display) -> String {
    let reason = plain(error);
    match grammar {
        Grammar::Lark(text) if text.contains("::=") => {
            format!(
                "{reason} (rules are written in Lark's notation, `name: ...`, not `name ::= ...`)"
            )
        }
        _ => reason,
    }
}

/// An error of llguidance in one line.
pub fn plain(error: impl Display) -> String {
    let text = error.to_string();
    let text = text.split("\n<").next().unwrap_or_default();
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(MAX_REASON).collect()
}
