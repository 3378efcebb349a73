//! Whether the server serves: `/health`, `/ping`, `/health_generate` and `/load`.

use super::Shared;
use super::error::ApiError;
use super::openapi::errors;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use onpolicy_plugin_api::{EngineError, Event, Request, SamplingParams, Sink};
use serde::Serialize;
use tokio::sync::oneshot;
use utoipa::ToSchema;

/// The server serves.
#[derive(Debug, Serialize, ToSchema)]
pub struct Health {
    status: &'static str,
}

const OK: Health = Health { status: "ok" };

/// What is under way.
#[derive(Debug, Serialize, ToSchema)]
pub struct Load {
    /// Generating requests that are not over.
    server_load: usize,
}

/// `GET /health`: the engine takes requests.
///
/// # Errors
/// 503 once the engine has stopped.
#[utoipa::path(
    get, path = "/health", operation_id = "health", tag = "server",
    responses((status = 200, description = "The engine takes requests", body = Health), errors::Health),
)]
pub async fn health(State(state): Shared) -> Result<Json<Health>, ApiError> {
    state.engine.health()?;
    Ok(Json(OK))
}

/// `/ping`, by GET or POST: as [`health`].
///
/// # Errors
/// Those of [`health`].
#[utoipa::path(
    method(get, post), path = "/ping", operation_id = "ping", tag = "server",
    responses((status = 200, description = "The engine takes requests", body = Health), errors::Health),
)]
pub async fn ping(state: Shared) -> Result<Json<Health>, ApiError> {
    health(state).await
}

/// `GET /health_generate`: the engine makes a token.
///
/// # Errors
/// The engine's refusal, or 503 if no token comes in time.
#[utoipa::path(
    get, path = "/health_generate", operation_id = "health_generate", tag = "server",
    responses((status = 200, description = "The engine made a token", body = Health), errors::Health),
)]
pub async fn generate(State(state): Shared) -> Result<Json<Health>, ApiError> {
    let (sender, token) = oneshot::channel();
    let params = SamplingParams { max_tokens: 1, temperature: 0.0, ..SamplingParams::default() };
    // An id that every vocabulary has.
    let request = Request::new(vec![0], params);
    state.engine.submit(request, Box::new(FirstToken(Some(sender))))?;
    match tokio::time::timeout(state.limits.health_time, token).await {
        Ok(Ok(Ok(()))) => Ok(Json(OK)),
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
#[utoipa::path(
    get, path = "/load", operation_id = "load", tag = "server",
    responses((status = 200, description = "What is under way", body = Load), errors::Plain),
)]
pub async fn load(State(state): Shared) -> Json<Load> {
    let server_load = state.limits.concurrent_requests - state.places.available_permits();
    Json(Load { server_load })
}
