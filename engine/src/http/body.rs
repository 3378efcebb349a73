//! Reading request bodies: JSON objects whose fields are taken one by one, so that every error
//! names its field and no field is left over.

use super::{AppState, error::ApiError};
use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::sync::Arc;

/// The raw bytes of a JSON body that is within the size and time limits.
pub struct JsonBytes(Bytes);

impl FromRequest<Arc<AppState>> for JsonBytes {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &Arc<AppState>) -> Result<Self, ApiError> {
        check_content_type(request.headers())?;
        let read = Bytes::from_request(request, state);
        let Ok(read) = tokio::time::timeout(state.limits.body_time, read).await else {
            let limit = state.limits.body_time;
            let message = format!("the body did not arrive within {limit:?}; send it faster");
            let error = ApiError::new(StatusCode::REQUEST_TIMEOUT, message);
            return Err(error.with_code("slow_body"));
        };
        read.map(Self).map_err(|rejection| {
            let status = rejection.status();
            if status != StatusCode::PAYLOAD_TOO_LARGE {
                return ApiError::new(status, rejection.body_text());
            }
            let limit = state.limits.body_bytes;
            ApiError::new(status, format!("the body is longer than {limit} bytes; send less"))
        })
    }
}

impl JsonBytes {
    #[cfg(test)]
    pub(super) fn of(body: &str) -> Self {
        Self(body.to_string().into())
    }

    /// Parses the body as one JSON object.
    pub fn fields(&self) -> Result<Fields, ApiError> {
        let value = serde_json::from_slice(&self.0).map_err(|error| {
            let message = format!("the body is not valid JSON: {error}");
            ApiError::new(StatusCode::BAD_REQUEST, message).with_code("invalid_json")
        })?;
        match value {
            Value::Object(map) => Ok(Fields { map, ..Fields::default() }),
            _ => Err(ApiError::new(StatusCode::BAD_REQUEST, "the body must be a JSON object")),
        }
    }
}

fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let value = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or("");
    let media = value.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    if media == "application/json" || media.ends_with("+json") {
        return Ok(());
    }
    let message = format!("the content type is '{media}'; send Content-Type: application/json");
    Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message))
}

/// Below it every whole number is one in 64 bits of floating point.
const EXACT: f64 = (1u64 << 53) as f64;

/// The fields of a JSON object that nobody has taken yet. A field that is null counts as absent.
#[derive(Default)]
pub struct Fields {
    map: Map<String, Value>,
    prefix: String,
    adopted: Paths,
}

/// Where the client wrote fields that have another name, or another place, here.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Paths(HashMap<String, String>);

impl Paths {
    /// The error as the client reads it: about the field that the client wrote.
    pub fn place(&self, mut error: ApiError) -> ApiError {
        let Some(name) = &error.param else { return error };
        let Some(path) = self.0.get(name) else { return error };
        if let Some(rule) = error.message.strip_prefix(&format!("{name}: ")) {
            error.message = format!("{path}: {rule}");
        }
        error.param = Some(path.clone());
        error
    }
}

impl Fields {
    /// The fields of a body that is parsed already.
    pub fn from_map(map: Map<String, Value>) -> Self {
        Self { map, ..Self::default() }
    }

    /// The fields of the object at `path` of the body.
    ///
    /// # Errors
    /// 400 if `value` is no object.
    pub fn of(value: Value, path: &str) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { map, prefix: format!("{path}."), ..Self::default() }),
            _ => Err(ApiError::invalid(path, "must be an object")),
        }
    }

    /// The full path of one of the fields.
    pub fn path(&self, name: &str) -> String {
        let adopted = self.adopted.0.get(name).cloned();
        adopted.unwrap_or_else(|| format!("{}{name}", self.prefix))
    }

    /// Moves the field `name` of another object here, where it is called `to`. If there is one of
    /// this name, the new one stands. Errors go on to name the field as the client did.
    pub fn adopt(&mut self, from: &mut Fields, name: &str, to: &str) {
        let path = from.path(name);
        let value = from.take_value(name);
        self.adopted.0.entry(to.to_string()).or_insert_with(|| path.clone());
        if let Some(value) = value {
            self.map.insert(to.to_string(), value);
            self.adopted.0.insert(to.to_string(), path);
        }
    }

    /// Adds a field, which the client has somewhere else under this name.
    pub fn put(&mut self, name: &str, value: Value) {
        self.adopted.0.insert(name.to_string(), name.to_string());
        self.map.insert(name.to_string(), value);
    }

    /// Where the client wrote the adopted fields.
    pub fn paths(&self) -> Paths {
        self.adopted.clone()
    }

    /// A field as it is, left where it is.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// True for a field that is there, and null.
    pub fn is_null(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(Value::is_null)
    }

    /// Takes a field as it is.
    pub fn take_value(&mut self, name: &str) -> Option<Value> {
        // Where fields are gathered for a parser, clients can send no others.
        #[cfg(test)]
        if self.adopted.0.is_empty() || self.adopted.0.contains_key(name) {
            asked::note(self.path(name));
        }
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// Takes a field.
    ///
    /// # Errors
    /// 400 naming the field if it is not a `T`.
    pub fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        let Some(mut value) = self.take_value(name) else { return Ok(None) };
        let parsed = match T::deserialize(&value) {
            Err(_) if make_whole(&mut value) => serde_json::from_value(value),
            parsed => parsed,
        };
        parsed.map(Some).map_err(|e| ApiError::invalid(self.path(name), plain(&e)))
    }

    /// Takes a field that has a default.
    ///
    /// # Errors
    /// As [`Fields::take`].
    pub fn take_or<T: DeserializeOwned>(&mut self, name: &str, or: T) -> Result<T, ApiError> {
        Ok(self.take(name)?.unwrap_or(or))
    }

    /// Takes a field that must be there.
    ///
    /// # Errors
    /// As [`Fields::take`], and 400 if the field is absent.
    pub fn require<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, ApiError> {
        self.take(name)?.ok_or_else(|| ApiError::invalid(self.path(name), "is required"))
    }

    /// Checks that nothing is left.
    ///
    /// # Errors
    /// 400 naming the first field that nobody took.
    pub fn finish(self) -> Result<(), ApiError> {
        match self.map.iter().find(|(_, value)| !value.is_null()) {
            None => Ok(()),
            Some((name, _)) => {
                let rule = "unknown field; check its spelling, or leave it out";
                Err(ApiError::invalid(self.path(name), rule).with_code("unknown_field"))
            }
        }
    }
}

/// The names that were asked for on this thread, whether or not a body had them.
#[cfg(test)]
pub(super) mod asked {
    use std::{cell::RefCell, collections::BTreeSet};

    thread_local! {
        static NAMES: RefCell<BTreeSet<String>> = const { RefCell::new(BTreeSet::new()) };
    }

    pub fn note(path: String) {
        NAMES.with_borrow_mut(|names| names.insert(path));
    }

    /// All of them since the last call.
    pub fn names() -> BTreeSet<String> {
        NAMES.take()
    }
}

/// Writes whole numbers such as 92.0, which are integers in JSON, as Rust's integers. True if there
/// was one.
fn make_whole(value: &mut Value) -> bool {
    match value {
        Value::Number(number) => match number.as_f64().filter(|_| number.is_f64()) {
            Some(float) if float.fract() == 0.0 && float.abs() < EXACT => {
                *value = (float as i64).into();
                true
            }
            _ => false,
        },
        Value::Array(list) => list.iter_mut().fold(false, |any, item| make_whole(item) | any),
        Value::Object(map) => map.values_mut().fold(false, |any, item| make_whole(item) | any),
        _ => false,
    }
}

/// What serde says of a wrong value, without the names of Rust's types.
fn plain(error: &serde_json::Error) -> String {
    const WORDS: [(&str, &str); 9] = [
        ("expected usize", "expected a non-negative integer"),
        ("expected u64", "expected a non-negative integer"),
        ("expected u32", "expected a non-negative integer below 2^32"),
        ("expected i64", "expected an integer"),
        ("expected i32", "expected an integer of 32 bits"),
        ("expected f32", "expected a number"),
        ("a borrowed string", "a string"),
        ("expected a sequence", "expected a list"),
        ("expected a map", "expected an object"),
    ];
    WORDS.iter().fold(error.to_string(), |text, (from, to)| text.replace(from, to))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(value: Value) -> Fields {
        JsonBytes(value.to_string().into()).fields().unwrap_or_else(|e| panic!("{e:?}"))
    }

    fn message<T>(result: Result<T, ApiError>) -> String {
        result.err().map(|e| e.message).unwrap_or_default()
    }

    #[test]
    fn takes_typed_fields_and_counts_null_as_absent() {
        let mut fields = fields(json!({"n": 3, "x": null, "stop": "a", "left": null}));
        assert_eq!(fields.take::<usize>("n").unwrap(), Some(3));
        assert_eq!(fields.take::<usize>("x").unwrap(), None);
        assert_eq!(fields.take_or("y", 7).unwrap(), 7);
        assert_eq!(fields.require::<String>("stop").unwrap(), "a");
        assert!(fields.finish().is_ok());
    }

    #[test]
    fn whole_numbers_are_integers() {
        let mut fields = fields(json!({"n": 3.0, "ids": [[1, 2.0]], "x": 2.0, "half": 0.5}));
        assert_eq!(fields.take::<usize>("n").unwrap(), Some(3));
        assert_eq!(fields.take::<Vec<Vec<u32>>>("ids").unwrap(), Some(vec![vec![1, 2]]));
        assert_eq!(fields.take::<f32>("x").unwrap(), Some(2.0));
        assert!(fields.take::<u32>("half").is_err());
    }

    #[test]
    fn errors_name_the_field() {
        let mut f = fields(json!({"n": "three", "m": -1, "t": [1.5], "odd": 1}));
        let wrong = "n: invalid type: string \"three\", expected a non-negative integer";
        assert_eq!(message(f.take::<usize>("n")), wrong);
        let negative = "m: invalid value: integer `-1`, expected a non-negative integer";
        assert_eq!(message(f.take::<usize>("m")), negative);
        assert_eq!(f.take::<Vec<u32>>("t").unwrap_err().param.as_deref(), Some("t"));
        assert_eq!(message(f.require::<usize>("gone")), "gone: is required");
        assert_eq!(f.finish().unwrap_err().param.as_deref(), Some("odd"));
        let inner = Fields::of(json!({"b": 1}), "a").unwrap().finish().unwrap_err();
        assert_eq!(inner.param.as_deref(), Some("a.b"));
    }

    #[test]
    fn adopted_fields_keep_the_clients_name() {
        let mut body =
            fields(json!({"rid": "a", "n": 1, "inner": {"max_new_tokens": "x", "n": 2}}));
        let mut inner = Fields::of(body.take_value("inner").unwrap(), "inner").unwrap();
        let mut common = Fields::default();
        common.adopt(&mut body, "rid", "request_id");
        common.adopt(&mut body, "n", "n");
        common.adopt(&mut inner, "n", "n");
        common.adopt(&mut inner, "max_new_tokens", "max_tokens");
        common.adopt(&mut inner, "min_new_tokens", "min_tokens");
        assert!(body.finish().is_ok() && inner.finish().is_ok());
        assert_eq!(common.take::<usize>("n").unwrap(), Some(2), "the later one stands");
        let error = common.take::<usize>("max_tokens").unwrap_err();
        assert_eq!(error.param.as_deref(), Some("inner.max_new_tokens"));
        assert_eq!(common.path("request_id"), "rid");
        let paths = common.paths();
        let placed = paths.place(ApiError::invalid("min_tokens", "is too large"));
        assert_eq!(placed.param.as_deref(), Some("inner.min_new_tokens"));
        assert_eq!(placed.message, "inner.min_new_tokens: is too large");
        let other = ApiError::invalid("other", "is odd");
        assert_eq!(paths.place(other.clone()), other);
    }

    #[test]
    fn refuses_what_is_no_json_object() {
        for body in ["", "{", "[1]", "{\"a\": NaN}", "{\"a\": 1e999}", "\u{feff}{}"] {
            let error = JsonBytes(body.to_string().into()).fields().err().expect(body);
            assert_eq!(error.status, StatusCode::BAD_REQUEST, "{body}");
        }
    }
}
