//! Whether the server serves: `/health`, `/ping`, `/health_generate` and `/load`.

use super::Shared;
use super::error::ApiError;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use onpolicy_plugin_api::{EngineError, Event, Request, SamplingParams, Sink};
use serde_json::{Value, json};
use tokio::sync::oneshot;

/// `GET /health` and `/ping`: the engine takes requests.
///
/// # Errors
/// 503 once the engine has stopped.
pub async fn health(State(state): Shared) -> Result<Json<Value>, ApiError> {
    state.engine.health()?;
    Ok(Json(json!({ "status": "ok" })))
}

/// `GET /health_generate`: the engine makes a token.
///
/// # Errors
/// The engine's refusal, or 503 if no token comes in time.
pub async fn generate(State(state): Shared) -> Result<Json<Value>, ApiError> {
    let (sender, token) = oneshot::channel();
    let params = SamplingParams { max_tokens: 1, temperature: 0.0, ..SamplingParams::default() };
    // An id that every vocabulary has.
    let request = Request::new(vec![0], params);
    state.engine.submit(request, Box::new(FirstToken(Some(sender))))?;
    match tokio::time::timeout(state.limits.health_time, token).await {
        Ok(Ok(Ok(()))) => Ok(Json(json!({ "status": "ok" }))),
        Ok(Ok(Err(error))) => Err(error.into()),
        Ok(Err(_)) => Err(ApiError::internal("the engine dropped the request")),
        Err(_) => {
            let message = format!("no token came within {:?}", state.limits.health_time);
            Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message))
        }
    }
}

/// Tells of the first token, or of the failure. Once told, or not waited for, it is closed.
struct FirstToken(Option<oneshot::Sender<Result<(), EngineError>>>);

impl Sink for FirstToken {
    fn send(&mut self, event: Event) -> bool {
        let news = match event {
            Event::Token { .. } => Ok(()),
            Event::Failed { error } => Err(error),
            Event::Prompt { .. } | Event::Finished { .. } => return !self.is_closed(),
        };
        self.0.take().is_some_and(|sender| sender.send(news).is_ok())
    }

    fn is_closed(&self) -> bool {
        self.0.as_ref().is_none_or(oneshot::Sender::is_closed)
    }
}

/// `GET /load`: generating requests that are not over.
pub async fn load(State(state): Shared) -> Json<Value> {
    let running = state.limits.concurrent_requests - state.places.available_permits();
    Json(json!({ "server_load": running }))
}
