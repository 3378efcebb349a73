//! One HTTP request: keys, limits, and what went wrong.

use super::options::RemoteOptions;
use onpolicy_plugin_api::EngineError;
use reqwest::{RequestBuilder, Response, StatusCode};
use serde_json::Value;
use std::{error::Error, time::Duration};

/// Longest answer that is read, in bytes.
const MAX_ANSWER: usize = 512 << 20;
/// How much of an unexpected answer an error quotes, in characters.
const QUOTED: usize = 300;

/// Why a request brought nothing.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Fault {
    /// No answer, or none that makes sense; another server may do better.
    Broken(String),
    /// No connection.
    Gone(String),
    /// The server has too much to do.
    Busy(String),
    /// The server refuses what was asked; every server would.
    Refused { status: u16, param: Option<String>, message: String },
    /// The server ended samples that nobody here wanted to end.
    Aborted,
    /// The server holds other weights than it was given.
    Stale(String),
}

impl Fault {
    /// What went wrong, in words.
    pub fn reason(&self) -> String {
        match self {
            Self::Broken(reason)
            | Self::Gone(reason)
            | Self::Busy(reason)
            | Self::Stale(reason) => reason.clone(),
            Self::Refused { status, message, .. } => format!("HTTP {status}: {message}"),
            Self::Aborted => "it ended the samples".into(),
        }
    }

    /// True if the server does not know the route, or not with this body.
    pub fn is_unknown_route(&self) -> bool {
        matches!(self, Self::Refused { status: 400 | 404 | 405 | 422 | 501, .. })
    }

    /// What a caller of the engine is told.
    pub fn into_error(self, url: &str) -> EngineError {
        match self {
            Self::Refused { status: 400 | 422, param: Some(field), message } => {
                EngineError::invalid(field, format!("{url}: {message}"))
            }
            Self::Refused { status: status @ (401 | 403), message, .. } => EngineError::Internal(
                format!("{url}: HTTP {status}: {message}; see api_key_env and control_key_env"),
            ),
            fault => EngineError::Internal(format!("{url}: {}", fault.reason())),
        }
    }
}

/// Whose key a request carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plane {
    Data,
    Control,
}

/// Connections, and the keys.
pub(super) struct Client {
    http: reqwest::Client,
    data_key: Option<String>,
    control_key: Option<String>,
}

impl Client {
    pub fn new(options: &RemoteOptions) -> Result<Self, EngineError> {
        let http = reqwest::Client::builder()
            .connect_timeout(options.connect_timeout())
            .tcp_nodelay(true)
            .build()
            .map_err(|e| EngineError::Internal(format!("cannot set up HTTP: {}", chain(&e))))?;
        let data_key = key("api_key_env", options.api_key_env.as_deref())?;
        let control_key = key("control_key_env", options.control_key_env.as_deref())?;
        let control_key = control_key.or_else(|| data_key.clone());
        Ok(Self { http, data_key, control_key })
    }

    /// What the route answers to a GET; null if it says nothing.
    pub async fn get(&self, url: &str, plane: Plane, limit: Duration) -> Result<Value, Fault> {
        let bytes = self.send(self.http.get(url), plane, limit).await?;
        Ok(value(&bytes))
    }

    /// What a control route answers to a POST; null if it says nothing.
    pub async fn control(
        &self,
        url: &str,
        body: Option<&Value>,
        limit: Duration,
    ) -> Result<Value, Fault> {
        let request = self.http.post(url);
        let request = match body {
            Some(body) => request.json(body),
            None => request,
        };
        let answer = value(&self.send(request, Plane::Control, limit).await?);
        if answer["success"] == Value::Bool(false) {
            let message = answer["message"].as_str().unwrap_or("it did not succeed");
            return Err(Fault::Broken(message.to_string()));
        }
        Ok(answer)
    }

    /// What a generating route answers.
    pub async fn generate(
        &self,
        url: &str,
        body: &Value,
        limit: Duration,
    ) -> Result<Vec<u8>, Fault> {
        self.send(self.http.post(url).json(body), Plane::Data, limit).await
    }

    async fn send(
        &self,
        request: RequestBuilder,
        plane: Plane,
        limit: Duration,
    ) -> Result<Vec<u8>, Fault> {
        let key = match plane {
            Plane::Data => &self.data_key,
            Plane::Control => &self.control_key,
        };
        let request = match key {
            Some(key) => request.bearer_auth(key),
            None => request,
        };
        let late = |_| Fault::Broken(format!("no answer within {:.1} s", limit.as_secs_f64()));
        tokio::time::timeout(limit, answer(request)).await.map_err(late)?
    }
}

fn key(option: &str, variable: Option<&str>) -> Result<Option<String>, EngineError> {
    let Some(variable) = variable else { return Ok(None) };
    match std::env::var(variable) {
        Ok(key) if !key.is_empty() => Ok(Some(key)),
        _ => {
            let reason = format!("the environment variable {variable} is not set");
            Err(EngineError::invalid(option, reason))
        }
    }
}

async fn answer(request: RequestBuilder) -> Result<Vec<u8>, Fault> {
    let answer = request.send().await.map_err(broken)?;
    let status = answer.status();
    let text = read(answer).await?;
    if status.is_success() { Ok(text) } else { Err(fault(status, &text)) }
}

async fn read(mut answer: Response) -> Result<Vec<u8>, Fault> {
    let mut text = Vec::new();
    while let Some(piece) = answer.chunk().await.map_err(broken)? {
        text.extend_from_slice(&piece);
        if text.len() > MAX_ANSWER {
            return Err(Fault::Broken(format!("the answer is longer than {MAX_ANSWER} bytes")));
        }
    }
    Ok(text)
}

/// What an answer other than 2xx means. OpenAI's servers put their reason into `error`, FastAPI's
/// into `detail`.
fn fault(status: StatusCode, text: &[u8]) -> Fault {
    let answer = value(text);
    let message = [&answer["error"]["message"], &answer["message"], &answer["detail"]];
    let message = message.into_iter().find_map(Value::as_str);
    let message = message.map_or_else(|| quote(text), |message| message.to_string());
    let param = answer["error"]["param"].as_str().map(String::from);
    let status = status.as_u16();
    let reason = format!("HTTP {status}: {message}");
    match status {
        429 | 503 => Fault::Busy(reason),
        408 | 500.. => Fault::Broken(reason),
        _ => Fault::Refused { status, param, message },
    }
}

fn value(text: &[u8]) -> Value {
    serde_json::from_slice(text).unwrap_or(Value::Null)
}

/// The beginning of an unexpected answer.
pub(super) fn quote(text: &[u8]) -> String {
    String::from_utf8_lossy(text).chars().take(QUOTED).collect()
}

fn broken(error: reqwest::Error) -> Fault {
    let gone = error.is_connect();
    let reason = chain(&error.without_url());
    if gone { Fault::Gone(reason) } else { Fault::Broken(reason) }
}

/// An error and what it came from.
fn chain(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_tell_what_to_do_next() {
        let of =
            |status: u16, text: &str| fault(StatusCode::from_u16(status).unwrap(), text.as_bytes());
        let openai = r#"{"error": {"message": "too long", "param": "max_tokens"}}"#;
        let refused = Fault::Refused {
            status: 400,
            param: Some("max_tokens".into()),
            message: "too long".into(),
        };
        assert_eq!(of(400, openai), refused);
        assert_eq!(
            refused.into_error("http://a"),
            EngineError::invalid("max_tokens", "http://a: too long")
        );
        assert_eq!(of(429, "later"), Fault::Busy("HTTP 429: later".into()));
        assert_eq!(of(500, r#"{"detail": "no"}"#), Fault::Broken("HTTP 500: no".into()));
        assert!(of(404, "").is_unknown_route() && of(422, "").is_unknown_route());
        assert!(!of(401, "").is_unknown_route());
        let text = of(401, "who").into_error("http://a").to_string();
        assert!(text.contains("HTTP 401: who") && text.contains("api_key_env"), "{text}");
    }
}
