//! Who may do what: a key for the routes that use the model, another for those that control it.

use super::{AppState, error::ApiError};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use std::fmt;
use std::sync::Arc;
use subtle::ConstantTimeEq;

/// Routes that say no more than that the server is there: no key is asked for.
const OPEN: [&str; 4] = ["/health", "/health/", "/ping", "/liveness"];
/// The route that either key opens.
const METRICS: &str = "/metrics";

/// A key that a client must show. It is never written anywhere.
#[derive(Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(try_from = "String")]
pub struct Key(String);

impl TryFrom<String> for Key {
    type Error = &'static str;

    fn try_from(key: String) -> Result<Self, Self::Error> {
        Self::new(key)
    }
}

impl Key {
    /// A key; it must be made of visible ASCII characters, or no client could send it.
    ///
    /// # Errors
    /// It is empty or has other characters.
    pub fn new(key: impl Into<String>) -> Result<Self, &'static str> {
        let key = key.into();
        let visible = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic());
        visible.then_some(Self(key)).ok_or("must be one or more visible ASCII characters")
    }

    /// Compares in a time that does not depend on where the difference is.
    fn opens(&self, shown: &str) -> bool {
        self.0.as_bytes().ct_eq(shown.as_bytes()).into()
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

/// The keys, and whether the engine may be controlled at all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Access {
    /// What clients of the model show as `Authorization: Bearer`; none lets everybody in.
    pub api_key: Option<Key>,
    /// The same for those that control it.
    pub control_key: Option<Key>,
    /// Whether the control routes are on.
    pub control: bool,
}

/// Lets through who may use the model.
///
/// # Errors
/// 401.
pub async fn data(
    State(state): State<Arc<AppState>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let Access { api_key, control_key, .. } = &state.access;
    let path = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
    let keys = match path {
        path if OPEN.contains(&path) => return Ok(next.run(request).await),
        METRICS => [api_key, control_key],
        _ => [api_key, &None],
    };
    check(request.headers(), api_key.is_none(), &keys)?;
    Ok(next.run(request).await)
}

/// Lets through who may control the engine.
///
/// # Errors
/// 403 if the routes are off, or a browser asks without a key; 401.
pub async fn control(
    State(state): State<Arc<AppState>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let Access { control_key, control, .. } = &state.access;
    if !control {
        let message = "the control routes are off; start the server with server.control = \"on\" \
                       and a server.control_key (or ONPOLICY_CONTROL_KEY in its environment)";
        return Err(ApiError::new(StatusCode::FORBIDDEN, message).with_code("control_off"));
    }
    // A page that somebody visits can post to the loopback interface; browsers say who asks.
    if control_key.is_none() && request.headers().contains_key(header::ORIGIN) {
        let message = "web pages may not control the engine; set server.control_key to allow them";
        return Err(ApiError::new(StatusCode::FORBIDDEN, message).with_code("control_off"));
    }
    check(request.headers(), control_key.is_none(), &[control_key, &None])?;
    Ok(next.run(request).await)
}

/// Looks for one of the keys, unless `open`.
fn check(headers: &HeaderMap, open: bool, keys: &[&Option<Key>; 2]) -> Result<(), ApiError> {
    let shown = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let shown = shown.and_then(|value| {
        let (scheme, key) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
    });
    let fits = |shown: &str| keys.iter().any(|key| key.as_ref().is_some_and(|k| k.opens(shown)));
    if open || shown.is_some_and(fits) {
        return Ok(());
    }
    let message = match shown {
        Some(_) => "this key does not open this route",
        None => "this route needs a key: send Authorization: Bearer KEY",
    };
    Err(ApiError::new(StatusCode::UNAUTHORIZED, message).with_code("invalid_api_key"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_visible_compared_whole_and_not_shown() {
        let key = Key::new("sesame-7").unwrap();
        assert!(key.opens("sesame-7"));
        for other in ["", "sesame-", "sesame-77", "Sesame-7"] {
            assert!(!key.opens(other), "{other}");
        }
        assert_eq!(format!("{key:?}"), "Key(..)");
        for bad in ["", "a b", "é", "a\n"] {
            assert!(Key::new(bad).is_err(), "{bad:?}");
        }
    }
}
