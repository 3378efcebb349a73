//! Sleep and wake-up: vLLM's levels and tags.

use super::answers::{IsSleeping, Status};
use super::{arguments::Arguments, command};
use crate::http::{AppState, Shared, error::ApiError, openapi::errors};
use axum::extract::State;
use axum::routing::{get, post};
use axum::{Json, Router};
use onpolicy_plugin_api::{Memory, Sleep};
use std::sync::Arc;

pub(super) fn router() -> Router<Arc<AppState>> {
    Router::new()
        .route("/sleep", post(sleep))
        .route("/wake_up", post(wake_up))
        .route("/is_sleeping", get(is_sleeping))
}

const LEVELS: [(&str, Sleep); 3] =
    [("1", Sleep::KvCache), ("0", Sleep::Paused), ("2", Sleep::Weights)];

/// `POST /sleep?level=`: 0 takes no steps, 1 gives back the pages of K and V, 2 the weights too.
/// What runs is aborted.
#[utoipa::path(
    post, path = "/sleep", operation_id = "sleep", tag = "control",
    responses((status = 200, description = "The memory is given back", body = Status), errors::Command),
)]
pub async fn sleep(State(state): Shared, mut given: Arguments) -> Result<Json<Status>, ApiError> {
    let depth = given.choice("level", &LEVELS)?;
    let drain = given.choice("mode", &[("abort", false), ("wait", true)])?;
    given.finish()?;
    command(&state, move |engine| {
        if !drain {
            return engine.sleep(depth);
        }
        let paused = engine.is_paused();
        engine.pause(onpolicy_plugin_api::PauseMode::Wait, false)?;
        let slept = engine.sleep(depth);
        if paused { slept } else { engine.resume().and(slept) }
    })
    .await?;
    Ok(Json(Status { status: "sleeping" }))
}

/// `POST /wake_up?tags=`: `weights`, `kv_cache`, `scheduling`; all of them if none is named.
#[utoipa::path(
    post, path = "/wake_up", operation_id = "wake_up", tag = "control",
    responses((status = 200, description = "The memory is taken again", body = Status), errors::Command),
)]
pub async fn wake_up(State(state): Shared, mut given: Arguments) -> Result<Json<Status>, ApiError> {
    let tags = given.list("tags")?;
    given.finish()?;
    let memory = memory_of(tags, "scheduling")?;
    command(&state, move |engine| engine.wake_up(&memory)).await?;
    let status = if state.engine.is_sleeping() { "sleeping" } else { "awake" };
    Ok(Json(Status { status }))
}

/// The memory that tags name; `other` is a tag that names none. Without tags, all of it.
pub(super) fn memory_of(tags: Option<Vec<String>>, other: &str) -> Result<Vec<Memory>, ApiError> {
    let Some(tags) = tags.filter(|tags| !tags.is_empty()) else {
        return Ok(vec![Memory::Weights, Memory::KvCache]);
    };
    let mut memory = Vec::new();
    for tag in tags {
        match tag.as_str() {
            "weights" => memory.push(Memory::Weights),
            "kv_cache" => memory.push(Memory::KvCache),
            tag if tag == other => {}
            tag => {
                let rule = format!("'{tag}' is none of weights, kv_cache, {other}");
                return Err(ApiError::invalid("tags", rule));
            }
        }
    }
    Ok(memory)
}

/// `GET /is_sleeping`.
#[utoipa::path(
    get, path = "/is_sleeping", operation_id = "is_sleeping", tag = "control",
    responses((status = 200, description = "Whether memory has been given back", body = IsSleeping), errors::Controlled),
)]
pub async fn is_sleeping(State(state): Shared) -> Json<IsSleeping> {
    Json(IsSleeping { is_sleeping: state.engine.is_sleeping() })
}
