//! From text and flags to a typed configuration.

use super::{Config, ConfigError, Plugin};
use serde::de::DeserializeOwned;
use toml::{Table, Value};

const SECTIONS: &[&str] = &[
    "model", "engine", "server", "task", "verifier", "gate", "rollout", "train", "eval", "output",
];

/// Keys that name a plug-in.
const PLUGINS: [&str; 3] = ["task.name", "verifier.name", "gate.name"];

/// The key that names an engine.
const ENGINE: &str = "engine.kind";

/// Keys of `[engine]` that belong to one kind of engine alone.
const OF_THE_KIND: [&str; 4] = ["urls", "remote", "options", "transfer_dir"];

pub(super) fn read(text: &str) -> Result<Table, ConfigError> {
    text.parse().map_err(|e: toml::de::Error| ConfigError::Syntax(e.to_string().trim().into()))
}

/// Whether a flag says which plug-in or engine is meant.
pub(super) fn is_name(flag: &str) -> bool {
    let key = flag.split_once('=').map_or("", |(key, _)| key);
    key == ENGINE || PLUGINS.contains(&key)
}

/// Sets one key to the value of a flag `section.key=value`. Naming another plug-in starts from that
/// plug-in's defaults: the options of the one before go.
pub(super) fn lay_over(table: &mut Table, flag: &str) -> Result<(), ConfigError> {
    let wrong = |reason: &str| ConfigError::Flag { flag: flag.into(), reason: reason.into() };
    let (path, value) = flag.split_once('=').ok_or_else(|| wrong("write section.key=value"))?;
    let mut keys: Vec<&str> = path.split('.').map(str::trim).collect();
    let last = keys.pop().filter(|_| !keys.is_empty() && !path.trim().is_empty());
    let last = last.ok_or_else(|| wrong("write section.key=value"))?;
    if last.is_empty() || keys.iter().any(|key| key.is_empty()) {
        return Err(wrong("a key is empty; write section.key=value"));
    }
    let mut place = table;
    for key in keys {
        let next = place.entry(key).or_insert_with(|| Value::Table(Table::new()));
        place = next.as_table_mut().ok_or_else(|| wrong(&format!("'{key}' is not a section")))?;
    }
    let value = flag_value(value);
    if last == "name" && PLUGINS.contains(&path) && place.get("name") != Some(&value) {
        // The options beside the old name are those of another plug-in.
        place.clear();
    }
    if path == ENGINE && place.get("kind") != Some(&value) {
        OF_THE_KIND.iter().for_each(|key| drop(place.remove(*key)));
    }
    place.insert(last.into(), value);
    Ok(())
}

/// The TOML value that a text stands for, or the text itself.
fn flag_value(text: &str) -> Value {
    let parsed = format!("value = {text}").parse::<Table>().ok();
    let alone = parsed.filter(|table| table.len() == 1).and_then(|mut table| table.remove("value"));
    alone.unwrap_or_else(|| Value::String(text.into()))
}

/// Reads every section into its type.
pub(super) fn resolve(mut table: Table) -> Result<Config, ConfigError> {
    if let Some(unknown) = table.keys().find(|key| !SECTIONS.contains(&key.as_str())) {
        return Err(ConfigError::Unknown {
            key: unknown.clone(),
            hint: hint("", unknown, SECTIONS),
        });
    }
    Ok(Config {
        model: section(&mut table, "model")?,
        engine: section(&mut table, "engine")?,
        server: section(&mut table, "server")?,
        task: plugin(&mut table, "task", "sum")?,
        verifier: plugin(&mut table, "verifier", "last_integer")?,
        gate: plugin(&mut table, "gate", "clip_b")?,
        rollout: section(&mut table, "rollout")?,
        train: section(&mut table, "train")?,
        eval: section(&mut table, "eval")?,
        output: section(&mut table, "output")?,
    })
}

/// Takes a section out of the table; one that is missing is empty.
fn take(table: &mut Table, name: &str) -> Result<Table, ConfigError> {
    match table.remove(name) {
        None => Ok(Table::new()),
        Some(Value::Table(section)) => Ok(section),
        Some(other) => Err(ConfigError::Shape {
            key: name.into(),
            reason: format!("must be a section, [{name}]; it is of type {}", other.type_str()),
        }),
    }
}

fn section<T: DeserializeOwned>(table: &mut Table, name: &str) -> Result<T, ConfigError> {
    let section = take(table, name)?;
    Value::Table(section).try_into().map_err(|e| explain(name, &e))
}

fn plugin(table: &mut Table, name: &str, default: &str) -> Result<Plugin, ConfigError> {
    let mut section = take(table, name)?;
    section.entry("name").or_insert_with(|| default.into());
    Value::Table(section).try_into().map_err(|e| explain(name, &e))
}

/// Says in terms of keys what serde says in terms of fields.
fn explain(section: &str, error: &toml::de::Error) -> ConfigError {
    let text = error.to_string();
    let (reason, place) = text.trim().rsplit_once("\nin `").unwrap_or((text.trim(), ""));
    let place = place.trim_end_matches('`');
    let dot = if place.is_empty() { "" } else { "." };
    let path = format!("{section}{dot}{place}");
    let quoted: Vec<&str> = reason.split('`').skip(1).step_by(2).collect();
    if let (true, [unknown, known @ ..]) = (reason.starts_with("unknown field"), &quoted[..]) {
        let key = format!("{path}.{unknown}");
        return ConfigError::Unknown { key, hint: hint(&path, unknown, known) };
    }
    ConfigError::Shape { key: path, reason: reason.into() }
}

/// Names the known key nearest to an unknown one, or all of them.
fn hint(section: &str, unknown: &str, known: &[&str]) -> String {
    let dot = if section.is_empty() { "" } else { "." };
    let nearest = known.iter().min_by_key(|key| edits(unknown, key));
    match nearest.filter(|key| edits(unknown, key) <= unknown.len().min(key.len()).div_ceil(3)) {
        Some(key) => format!("; did you mean '{section}{dot}{key}'?"),
        None => format!("; known are: {}", known.join(", ")),
    }
}

/// Levenshtein distance: how many letters must be added, taken away or changed.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edit_distances() {
        assert_eq!(edits("kitten", "sitting"), 3);
        assert_eq!(edits("", "abc"), 3);
        assert_eq!(edits("same", "same"), 0);
    }

    #[test]
    fn values_of_flags() {
        assert_eq!(flag_value("2e-5"), Value::Float(2e-5));
        assert_eq!(flag_value("[1, 2]"), Value::Array(vec![1.into(), 2.into()]));
        assert_eq!(flag_value("/models/a"), Value::String("/models/a".into()));
        assert_eq!(flag_value("\"5\""), Value::String("5".into()));
        assert_eq!(flag_value("127.0.0.1"), Value::String("127.0.0.1".into()));
        assert_eq!(flag_value("1\nother = 2"), Value::String("1\nother = 2".into()));
        assert_eq!(flag_value(""), Value::String(String::new()));
    }
}
