//! vLLM's routes that pause the engine, end requests, and forget their KV.

use super::answers::{Aborted, Done, IsPaused, Status};
use super::{arguments::Arguments, command};
use crate::http::{AppState, Shared, error::ApiError, openapi::errors};
use axum::extract::State;
use axum::routing::{get, post};
use axum::{Json, Router};
use onpolicy_plugin_api::PauseMode;
use std::sync::Arc;

pub(super) fn router() -> Router<Arc<AppState>> {
    Router::new()
        .route("/pause", post(pause))
        .route("/resume", post(resume))
        .route("/is_paused", get(is_paused))
        .route("/abort_requests", post(abort_requests))
        .route("/reset_prefix_cache", post(reset_prefix_cache))
        .route("/reset_prefix_cache/", post(reset_prefix_cache))
}

const MODES: [(&str, PauseMode); 3] =
    [("abort", PauseMode::Abort), ("wait", PauseMode::Wait), ("keep", PauseMode::Keep)];

/// `POST /pause?mode=&clear_cache=`. A pause that keeps running samples keeps the cache too, unless
/// it is told otherwise.
#[utoipa::path(
    post, path = "/pause", operation_id = "pause", tag = "control",
    responses((status = 200, description = "The engine takes no steps", body = Status), errors::Command),
)]
pub async fn pause(State(state): Shared, mut given: Arguments) -> Result<Json<Status>, ApiError> {
    let wait = given.flag("wait_for_inflight_requests")?.unwrap_or(false);
    let mode = given.choice("mode", &MODES)?;
    let mode = if wait && mode == PauseMode::Abort { PauseMode::Wait } else { mode };
    let clear_cache = given.flag("clear_cache")?.unwrap_or(mode != PauseMode::Keep);
    given.finish()?;
    command(&state, move |engine| engine.pause(mode, clear_cache)).await?;
    Ok(Json(Status { status: "paused" }))
}

/// `POST /resume`. An engine that is not paused goes on as before.
#[utoipa::path(
    post, path = "/resume", operation_id = "resume", tag = "control",
    responses((status = 200, description = "The engine takes steps", body = Status), errors::Command),
)]
pub async fn resume(State(state): Shared, given: Arguments) -> Result<Json<Status>, ApiError> {
    given.finish()?;
    command(&state, |engine| engine.resume()).await?;
    Ok(Json(Status { status: "resumed" }))
}

/// `GET /is_paused`.
#[utoipa::path(
    get, path = "/is_paused", operation_id = "is_paused", tag = "control",
    responses((status = 200, description = "Whether the engine is paused", body = IsPaused), errors::Controlled),
)]
pub async fn is_paused(State(state): Shared) -> Json<IsPaused> {
    Json(IsPaused { is_paused: state.engine.is_paused() })
}

/// `POST /abort_requests`: those of the given names, or all.
#[utoipa::path(
    post, path = "/abort_requests", operation_id = "abort_requests", tag = "control",
    responses((status = 200, description = "The requests are ended", body = Aborted), errors::Command),
)]
pub async fn abort_requests(
    State(state): Shared,
    mut given: Arguments,
) -> Result<Json<Aborted>, ApiError> {
    let names = given.list("request_ids")?.unwrap_or_default();
    given.finish()?;
    let aborted = if names.is_empty() {
        abort_all(&state).await?
    } else {
        names.iter().map(|name| abort(&state, name)).sum()
    };
    Ok(Json(Aborted { status: "aborted", aborted }))
}

/// Aborts the generations of this name; says how many requests they have.
pub(super) fn abort(state: &AppState, name: &str) -> usize {
    let found = state.registry.find(name);
    found.iter().for_each(|id| state.engine.abort(*id, None));
    found.len()
}

/// Aborts all requests; says how many generations there were.
pub(super) async fn abort_all(state: &Arc<AppState>) -> Result<usize, ApiError> {
    let running = state.registry.len();
    command(state, |engine| engine.abort_all()).await?;
    Ok(running)
}

/// `POST /reset_prefix_cache`. Running requests keep their KV.
#[utoipa::path(
    post, path = "/reset_prefix_cache", operation_id = "reset_prefix_cache", tag = "control",
    responses((status = 200, description = "Later requests share no prefix with earlier ones", body = Done), errors::Command),
)]
pub async fn reset_prefix_cache(
    State(state): Shared,
    mut given: Arguments,
) -> Result<Json<Done>, ApiError> {
    given.only("reset_running_requests", false)?;
    given.only("reset_external", false)?;
    given.finish()?;
    command(&state, |engine| engine.reset_prefix_cache()).await?;
    Ok(Json(Done { success: true, message: "the prefix cache is reset" }))
}
