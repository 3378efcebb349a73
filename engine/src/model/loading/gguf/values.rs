//! The metadata of a GGUF file: typed values under dotted names.

use super::super::LoadError;
use std::collections::HashMap;

/// One value; integers and floats of every width are widened.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Integer(i64),
    Float(f64),
    Flag(bool),
    Text(String),
    List(Vec<Value>),
}

/// All values by name.
#[derive(Debug, Default)]
pub(super) struct Metadata(pub HashMap<String, Value>);

impl Metadata {
    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, LoadError> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        let wrong = || LoadError::config(key, format!("must be {expected} in a GGUF of this kind"));
        read(value).map(Some).ok_or_else(wrong)
    }

    /// A whole number that is not negative, if given.
    pub fn optional_count(&self, key: &str) -> Result<Option<usize>, LoadError> {
        self.typed(key, "a whole number", |value| match value {
            Value::Integer(n) => usize::try_from(*n).ok().filter(|n| *n < 1 << 31),
            _ => None,
        })
    }

    /// A whole number above 0.
    pub fn count(&self, key: &str) -> Result<usize, LoadError> {
        let count = self.optional_count(key)?.filter(|n| *n > 0);
        count.ok_or_else(|| missing(key))
    }

    /// A token id, if given.
    pub fn token_id(&self, key: &str) -> Result<Option<u32>, LoadError> {
        Ok(self.optional_count(key)?.map(|id| id as u32))
    }

    /// A finite number above 0, if given.
    pub fn positive(&self, key: &str) -> Result<Option<f64>, LoadError> {
        let number = self.typed(key, "a number", |value| match value {
            Value::Float(x) => Some(*x),
            Value::Integer(n) => Some(*n as f64),
            _ => None,
        })?;
        Ok(number.filter(|x| x.is_finite() && *x > 0.0))
    }

    /// True or false, if given.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, LoadError> {
        self.typed(key, "true or false", |value| match value {
            Value::Flag(flag) => Some(*flag),
            _ => None,
        })
    }

    /// A string, if given.
    pub fn text(&self, key: &str) -> Result<Option<&str>, LoadError> {
        self.typed(key, "a string", |value| match value {
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A list of strings, if given.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&str>>, LoadError> {
        self.typed(key, "a list of strings", |value| match value {
            Value::List(items) => items.iter().map(Value::as_text).collect(),
            _ => None,
        })
    }

    /// A list of whole numbers, if given.
    pub fn integers(&self, key: &str) -> Result<Option<Vec<i64>>, LoadError> {
        self.typed(key, "a list of whole numbers", |value| match value {
            Value::List(items) => items.iter().map(Value::as_integer).collect(),
            _ => None,
        })
    }
}

impl Value {
    fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    fn as_integer(&self) -> Option<i64> {
        match self {
            Self::Integer(n) => Some(*n),
            _ => None,
        }
    }
}

/// The error for a key that must be there.
pub(super) fn missing(key: &str) -> LoadError {
    LoadError::config(key, "is missing from the GGUF file's metadata")
}
