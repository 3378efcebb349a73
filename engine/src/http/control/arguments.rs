//! The arguments of a command: the query's pairs and the body's fields are one set. Clients send
//! either, and often no body at all.

use crate::http::{AppState, body::Fields, error::ApiError};
use axum::body::Bytes;
use axum::extract::{FromRequest, Query, Request};
use axum::http::StatusCode;
use serde_json::{Map, Value};
use std::sync::Arc;

/// The arguments that nobody has taken yet.
pub struct Arguments(Fields);

impl FromRequest<Arc<AppState>> for Arguments {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &Arc<AppState>) -> Result<Self, ApiError> {
        let bad = |message: String| ApiError::new(StatusCode::BAD_REQUEST, message);
        let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(request.uri())
            .map_err(|rejection| bad(rejection.body_text()))?;
        let read = Bytes::from_request(request, state);
        let read = tokio::time::timeout(state.limits.body_time, read).await;
        let late =
            |_| ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time");
        let body = read.map_err(late)?;
        let body = body.map_err(|r| ApiError::new(r.status(), r.body_text()))?;
        Self::new(pairs, &body)
    }
}

impl Arguments {
    fn new(pairs: Vec<(String, String)>, body: &[u8]) -> Result<Self, ApiError> {
        let mut map = if body.trim_ascii().is_empty() { Map::new() } else { object(body)? };
        let mut query: Map<String, Value> = Map::new();
        for (name, text) in pairs {
            if map.contains_key(&name) {
                return Err(ApiError::invalid(
                    name,
                    "is in the query and in the body; send it once",
                ));
            }
            match query.get_mut(&name) {
                Some(Value::Array(several)) => several.push(text.into()),
                Some(one) => *one = Value::Array(vec![one.take(), text.into()]),
                None => drop(query.insert(name, text.into())),
            }
        }
        map.extend(query);
        Ok(Self(Fields::from_map(map)))
    }

    /// Takes a text.
    ///
    /// # Errors
    /// 400 naming the argument if it is something else; the same below.
    pub fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        self.0.take(name)
    }

    /// Takes a truth value, also in the words that query strings have for it.
    pub fn flag(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        let Some(value) = self.0.take_value(name) else { return Ok(None) };
        let parsed = match &value {
            Value::Bool(flag) => Some(*flag),
            Value::String(text) => match text.to_ascii_lowercase().as_str() {
                "true" | "1" | "yes" | "on" => Some(true),
                "false" | "0" | "no" | "off" => Some(false),
                _ => None,
            },
            _ => None,
        };
        parsed.map(Some).ok_or_else(|| ApiError::invalid(name, "must be true or false"))
    }

    /// Takes a text or a number, as a text.
    pub fn word(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.0.take_value(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(Value::Number(number)) => Ok(Some(number.to_string())),
            Some(_) => Err(ApiError::invalid(name, "must be a string or a number")),
        }
    }

    /// Takes a number of seconds, also as a query string has it.
    pub fn seconds(&mut self, name: &str) -> Result<Option<f64>, ApiError> {
        let Some(word) = self.word(name)? else { return Ok(None) };
        let seconds = word.parse::<f64>().ok().filter(|s| s.is_finite() && *s >= 0.0);
        let rule = "must be a number of seconds, 0 or more";
        seconds.map(Some).ok_or_else(|| ApiError::invalid(name, rule))
    }

    /// Takes a list of texts; one text is a list of one.
    pub fn list(&mut self, name: &str) -> Result<Option<Vec<String>>, ApiError> {
        let Some(value) = self.0.take_value(name) else { return Ok(None) };
        let list = match value {
            Value::String(one) => Some(vec![one]),
            value => serde_json::from_value(value).ok(),
        };
        let rule = "must be a string or a list of strings";
        list.map(Some).ok_or_else(|| ApiError::invalid(name, rule))
    }

    /// Takes whatever it is.
    pub fn value(&mut self, name: &str) -> Option<Value> {
        self.0.take_value(name)
    }

    /// Takes one of several words, or the first of them if it is absent.
    pub fn choice<T: Copy>(&mut self, name: &str, words: &[(&str, T)]) -> Result<T, ApiError> {
        let Some(word) = self.word(name)? else { return Ok(words[0].1) };
        let found = words.iter().find(|(known, _)| *known == word);
        found.map(|(_, value)| *value).ok_or_else(|| {
            let known: Vec<&str> = words.iter().map(|(known, _)| *known).collect();
            ApiError::invalid(name, format!("'{word}' is none of {}", known.join(", ")))
        })
    }

    /// Takes an argument that has no meaning here, if it has the value that changes nothing.
    pub fn only(&mut self, name: &str, allowed: bool) -> Result<(), ApiError> {
        match self.flag(name)? {
            Some(value) if value != allowed => {
                let rule = format!("this value is not supported; leave it out or send {allowed}");
                Err(ApiError::invalid(name, rule).with_code("unsupported_value"))
            }
            _ => Ok(()),
        }
    }

    /// Checks that nothing is left.
    pub fn finish(self) -> Result<(), ApiError> {
        self.0.finish()
    }
}

fn object(body: &[u8]) -> Result<Map<String, Value>, ApiError> {
    let bad = |message: String| ApiError::new(StatusCode::BAD_REQUEST, message);
    match serde_json::from_slice(body) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(Value::Null) => Ok(Map::new()),
        Ok(_) => Err(bad("the body must be a JSON object, or empty".into())),
        Err(error) => {
            Err(bad(format!("the body is not valid JSON: {error}")).with_code("invalid_json"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(query: &[(&str, &str)], body: &str) -> Result<Arguments, ApiError> {
        let pairs = query.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Arguments::new(pairs, body.as_bytes())
    }

    #[test]
    fn query_and_body_are_one_set() {
        let query = [("mode", "keep"), ("tags", "a"), ("tags", "b"), ("on", "True"), ("n", "1")];
        let mut a = arguments(&query, r#"{"x": 7, "off": false, "y": null, "one": "z"}"#).unwrap();
        assert_eq!(a.choice("mode", &[("abort", 0), ("keep", 1)]).unwrap(), 1);
        assert_eq!(a.list("tags").unwrap().unwrap(), ["a", "b"]);
        assert_eq!(a.list("one").unwrap().unwrap(), ["z"]);
        assert_eq!((a.flag("on").unwrap(), a.flag("off").unwrap()), (Some(true), Some(false)));
        assert_eq!(a.word("x").unwrap().as_deref(), Some("7"));
        assert_eq!(a.word("n").unwrap().as_deref(), Some("1"));
        assert_eq!(a.flag("y").unwrap(), None);
        let mut a = arguments(&[("from_query", "2.5")], r#"{"s": 3, "none": null}"#).unwrap();
        assert_eq!(a.seconds("from_query").unwrap(), Some(2.5));
        assert_eq!((a.seconds("s").unwrap(), a.seconds("none").unwrap()), (Some(3.0), None));
        a.finish().unwrap();
        arguments(&[], " \n").unwrap().finish().unwrap();
        arguments(&[], "null").unwrap().finish().unwrap();
    }

    #[test]
    fn refusals_name_the_argument() {
        let param = |e: ApiError| e.param.unwrap_or_default();
        let twice = arguments(&[("a", "1")], r#"{"a": 1}"#).err().unwrap();
        assert_eq!(param(twice), "a");
        let mut a = arguments(&[("mode", "kept"), ("f", "2"), ("odd", "1")], "").unwrap();
        let error = a.choice("mode", &[("abort", 0), ("keep", 1)]).unwrap_err();
        assert_eq!(error.message, "mode: 'kept' is none of abort, keep");
        assert_eq!(param(a.flag("f").unwrap_err()), "f");
        for wrong in ["-1", "inf", "soon"] {
            let mut a = arguments(&[("timeout", wrong)], "").unwrap();
            assert_eq!(param(a.seconds("timeout").unwrap_err()), "timeout");
        }
        assert_eq!(param(a.finish().unwrap_err()), "odd");
        assert!(arguments(&[], "[1]").is_err());
        assert_eq!(arguments(&[], "{").err().unwrap().code, Some("invalid_json"));
    }
}
