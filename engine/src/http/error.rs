//! The one error type of the routes, and how it looks on the wire (OpenAI's shape).

use crate::chat::ChatError;
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use onpolicy_plugin_api::EngineError;
use serde_json::{Value, json};

/// Seconds after which a refused client may try again.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// Why a request was not answered: an HTTP status and what the client reads.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiError {
    /// HTTP status of the answer.
    pub status: StatusCode,
    /// What is wrong, and what to do about it.
    pub message: String,
    /// The request field that is wrong, if it is one.
    pub param: Option<String>,
    /// A word for programs, such as `context_length_exceeded`.
    pub code: Option<&'static str>,
}

impl ApiError {
    /// An error without a field and code.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None }
    }

    /// 400: `field` of the request body breaks a rule.
    pub fn invalid(field: impl Into<String>, rule: impl AsRef<str>) -> Self {
        let field = field.into();
        let message = format!("{field}: {}", rule.as_ref());
        Self { param: Some(field), ..Self::new(StatusCode::BAD_REQUEST, message) }
    }

    /// 500.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// Adds the word for programs.
    #[must_use]
    pub fn with_code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// The body of the answer, also sent as an event when a stream fails half-way.
    pub fn body(&self) -> Value {
        json!({ "error": {
            "message": self.message,
            "type": self.kind(),
            "param": self.param,
            "code": self.code,
        }})
    }

    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::SERVICE_UNAVAILABLE => "service_unavailable_error",
            status if status.is_server_error() => "internal_server_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            _ => "invalid_request_error",
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if self.status.is_server_error() {
            tracing::error!(status = self.status.as_u16(), "{}", self.message);
        }
        let mut response = (self.status, Json(self.body())).into_response();
        if self.status == StatusCode::TOO_MANY_REQUESTS {
            response.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER);
        }
        response
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        let message = error.to_string();
        match error {
            EngineError::Invalid { field, reason } => Self::invalid(field, reason),
            EngineError::Overloaded { .. } => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, message).with_code("overloaded")
            }
            EngineError::Stopped => Self::new(StatusCode::SERVICE_UNAVAILABLE, message),
            EngineError::Unavailable(_) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, message).with_code("unavailable")
            }
            EngineError::Internal(_) => Self::internal(message),
            EngineError::Unsupported(_) => {
                Self::new(StatusCode::BAD_REQUEST, message).with_code("unsupported")
            }
        }
    }
}

/// Tokens that the engine made could not be turned into text.
impl From<ChatError> for ApiError {
    fn from(error: ChatError) -> Self {
        Self::internal(format!("detokenization failed: {error}"))
    }
}
