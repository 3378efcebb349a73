//! Typed access to the keys of a `config.json`.

use crate::model::loading::LoadError;
use serde_json::Value;

/// The keys of one JSON object. An absent key and `null` read alike.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a>(pub &'a Value);

impl<'a> Keys<'a> {
    /// The value of a key that is there and not null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    /// True if the key is there, even as null.
    pub fn has(&self, key: &str) -> bool {
        self.0.get(key).is_some()
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, LoadError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = || LoadError::config(key, format!("must be {expected}, but is {value}"));
        read(value).map(Some).ok_or_else(wrong)
    }

    /// A whole number above 0, if given.
    pub fn optional_count(&self, key: &str) -> Result<Option<usize>, LoadError> {
        // The bound keeps products of two dimensions far from overflow.
        let in_range = |n: &u64| (1..1 << 31).contains(n);
        self.typed(key, "a whole number from 1 to 2147483647", |value| {
            value.as_u64().filter(in_range).map(|n| n as usize)
        })
    }

    /// A whole number above 0.
    pub fn count(&self, key: &str) -> Result<usize, LoadError> {
        self.optional_count(key)?.ok_or_else(|| missing(key))
    }

    /// A finite number above 0, if given.
    pub fn optional_positive(&self, key: &str) -> Result<Option<f64>, LoadError> {
        let in_range = |x: &f64| x.is_finite() && *x > 0.0;
        self.typed(key, "a number above 0", |value| value.as_f64().filter(in_range))
    }

    /// A finite number above 0.
    pub fn positive(&self, key: &str) -> Result<f64, LoadError> {
        self.optional_positive(key)?.ok_or_else(|| missing(key))
    }

    /// A number that may also be 0 (which Python code reads as "not given"), if given.
    pub fn optional_nonzero(&self, key: &str) -> Result<Option<f64>, LoadError> {
        let value = self.typed(key, "a number", |value| value.as_f64().filter(|x| *x >= 0.0))?;
        Ok(value.filter(|x| *x > 0.0))
    }

    /// True or false, if given.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, LoadError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A string, if given.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>, LoadError> {
        self.typed(key, "a string", Value::as_str)
    }

    /// A token id or a list of them, if given.
    pub fn token_ids(&self, key: &str) -> Result<Option<Vec<u32>>, LoadError> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        self.typed(key, "a token id or a list of token ids", |value| match value {
            Value::Array(ids) => ids.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        })
    }
}

/// The error for a key that must be there.
fn missing(key: &str) -> LoadError {
    LoadError::config(key, "is missing from config.json, and has no default")
}
