//! JSON and values printed as Python prints them, which is what chat templates were written for.

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Output, State, Value, escape_formatter, value::Kwargs};
use serde_json::Value as Json;
use std::fmt::Write;

/// How `json.dumps` lays out its output.
struct Layout {
    indent: Option<usize>,
    item_separator: String,
    key_separator: String,
    ensure_ascii: bool,
    sort_keys: bool,
}

/// The filter `tojson` as transformers defines it: `json.dumps` without HTML escapes.
pub(super) fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let (item_separator, key_separator) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => {
            let message = "tojson: separators must be two strings";
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
        None => (if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string()),
    };
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let layout = Layout {
        indent,
        item_separator,
        key_separator,
        ensure_ascii: ensure_ascii.unwrap_or(false),
        sort_keys: sort_keys.unwrap_or(false),
    };
    let mut out = String::new();
    layout.write(&mut out, &plain(value)?, 0);
    Ok(out)
}

/// A value as `json.dumps` writes it by default, but without ASCII escapes.
pub(super) fn dumps(value: &Json) -> String {
    let layout = Layout {
        indent: None,
        item_separator: ", ".into(),
        key_separator: ": ".into(),
        ensure_ascii: false,
        sort_keys: false,
    };
    let mut out = String::new();
    layout.write(&mut out, value, 0);
    out
}

/// A template value as JSON; an undefined value has none.
fn plain(value: &Value) -> Result<Json, Error> {
    if value.is_undefined() {
        let message = "an undefined value cannot be written as JSON";
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    serde_json::to_value(value)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
}

impl Layout {
    fn write(&self, out: &mut String, value: &Json, depth: usize) {
        match value {
            Json::Array(items) => {
                let write = |out: &mut String, item: &&Json| self.write(out, item, depth + 1);
                self.list(out, ('[', ']'), depth, items.iter().collect(), write);
            }
            Json::Object(entries) => {
                let mut entries: Vec<_> = entries.iter().collect();
                if self.sort_keys {
                    entries.sort_by_key(|(key, _)| key.as_str());
                }
                self.list(out, ('{', '}'), depth, entries, |out, (key, value)| {
                    self.string(out, key);
                    out.push_str(&self.key_separator);
                    self.write(out, value, depth + 1);
                });
            }
            Json::String(text) => self.string(out, text),
            scalar => out.push_str(&scalar.to_string()),
        }
    }

    fn list<T>(
        &self,
        out: &mut String,
        (open, close): (char, char),
        depth: usize,
        items: Vec<T>,
        write: impl Fn(&mut String, &T),
    ) {
        out.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.push_str(&self.item_separator);
            }
            self.line_break(out, depth + 1);
            write(out, item);
        }
        if !items.is_empty() {
            self.line_break(out, depth);
        }
        out.push(close);
    }

    fn line_break(&self, out: &mut String, depth: usize) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.push_str(&" ".repeat(indent * depth));
        }
    }

    fn string(&self, out: &mut String, text: &str) {
        let quoted = Json::String(text.to_string()).to_string();
        if !self.ensure_ascii {
            return out.push_str(&quoted);
        }
        for character in quoted.chars() {
            if character.is_ascii() {
                out.push(character);
            } else {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
        }
    }
}

/// Prints a value into the output as Python's `str` does.
pub(super) fn format_value(out: &mut Output, state: &State, value: &Value) -> Result<(), Error> {
    let text = match value.kind() {
        ValueKind::Bool | ValueKind::None | ValueKind::Seq | ValueKind::Map => {
            let mut text = String::new();
            repr(&mut text, &plain(value)?);
            text
        }
        _ => return escape_formatter(out, state, value),
    };
    out.write_str(&text).map_err(Error::from)
}

/// Writes a value as Python's `repr` does.
fn repr(out: &mut String, value: &Json) {
    match value {
        Json::Null => out.push_str("None"),
        Json::Bool(true) => out.push_str("True"),
        Json::Bool(false) => out.push_str("False"),
        Json::Number(number) => out.push_str(&number.to_string()),
        Json::String(text) => repr_string(out, text),
        Json::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr(out, item);
            }
            out.push(']');
        }
        Json::Object(entries) => {
            out.push('{');
            for (i, (key, item)) in entries.iter().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr_string(out, key);
                out.push_str(": ");
                repr(out, item);
            }
            out.push('}');
        }
    }
}

fn repr_string(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if c.is_control() => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}
