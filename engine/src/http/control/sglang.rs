//! SGLang's names for the same commands.

use super::answers::{AbortedRequest, Done, Message, Success, UpdatedFromDisk, WeightVersion};
use super::arguments::Arguments;
use super::command;
use super::memory::memory_of;
use super::pausing::{abort, abort_all};
use super::version::Wanted;
use super::weights::{admit, load, version};
use crate::http::{AppState, Shared, error::ApiError, openapi::errors};
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use axum::{Json, Router};
use onpolicy_plugin_api::{Memory, PauseMode, Sleep};
use serde_json::{Value, json};
use std::sync::Arc;

pub(super) fn router() -> Router<Arc<AppState>> {
    Router::new()
        .route("/update_weights_from_disk", post(update_weights_from_disk))
        .route("/pause_generation", post(pause_generation))
        .route("/continue_generation", post(continue_generation))
        .route("/flush_cache", get(flush_cache).post(flush_cache))
        .route("/abort_request", post(abort_request))
        .route("/release_memory_occupation", any(release_memory))
        .route("/resume_memory_occupation", any(resume_memory))
        .route("/get_weight_version", get(weight_version))
        .route("/weight_version", get(weight_version))
        .route("/get_model_info", get(model_info))
        .route("/model_info", get(model_info))
        .route("/get_server_info", get(server_info))
        .route("/server_info", get(server_info))
}

/// `POST /update_weights_from_disk`. Running requests wait for the update, as `engine.on_update`
/// says; `abort_all_requests` ends them first.
#[utoipa::path(
    post, path = "/update_weights_from_disk", operation_id = "update_weights_from_disk", tag = "control",
    responses((status = 200, description = "The engine draws from the new weights", body = UpdatedFromDisk), errors::Command),
)]
pub async fn update_weights_from_disk(
    State(state): Shared,
    mut given: Arguments,
) -> Result<Response, ApiError> {
    let dir = given.text("model_path")?;
    let wanted = given.word("weight_version")?.map(Wanted::new);
    let abort = given.flag("abort_all_requests")?.unwrap_or(false);
    given.choice("load_format", &[("auto", ()), ("safetensors", ())])?;
    for (name, allowed) in [
        ("is_async", false),
        ("torch_empty_cache", false),
        ("keep_pause", false),
        ("recapture_cuda_graph", false),
        // KV of older weights is never used again.
        ("flush_cache", true),
    ] {
        given.only(name, allowed)?;
    }
    given.finish()?;
    let dir = admit(&state, "model_path", dir)?;
    if abort {
        abort_all(&state).await?;
    }
    match load(&state, "model_path", dir, wanted).await {
        Ok(version) => {
            let message = format!("Succeeded to update model weights, now version {version}.");
            let weight_version = version;
            let answer =
                UpdatedFromDisk { success: true, message, num_paused_requests: 0, weight_version };
            Ok(Json(answer).into_response())
        }
        Err(error) if error.status == StatusCode::BAD_REQUEST => {
            let mut answer = error.body();
            answer["success"] = false.into();
            answer["message"] = error.message.clone().into();
            Ok((error.status, Json(answer)).into_response())
        }
        Err(error) => Err(error),
    }
}

/// `POST /pause_generation {mode}`. A request that SGLang would retract, and compute again later,
/// stays where it is.
#[utoipa::path(
    post, path = "/pause_generation", operation_id = "pause_generation", tag = "control",
    responses((status = 200, description = "The engine takes no steps", body = Message), errors::Command),
)]
pub async fn pause_generation(
    State(state): Shared,
    mut given: Arguments,
) -> Result<Json<Message>, ApiError> {
    let modes =
        [("abort", PauseMode::Abort), ("in_place", PauseMode::Keep), ("retract", PauseMode::Keep)];
    let mode = given.choice("mode", &modes)?;
    given.finish()?;
    command(&state, move |engine| engine.pause(mode, false)).await?;
    Ok(Json(Message { message: "Generation paused successfully.", status: "ok" }))
}

/// `POST /continue_generation`.
#[utoipa::path(
    post, path = "/continue_generation", operation_id = "continue_generation", tag = "control",
    responses((status = 200, description = "The engine takes steps", body = Message), errors::Command),
)]
pub async fn continue_generation(
    State(state): Shared,
    mut given: Arguments,
) -> Result<Json<Message>, ApiError> {
    given.only("torch_empty_cache", false)?;
    given.finish()?;
    command(&state, |engine| engine.resume()).await?;
    Ok(Json(Message { message: "Generation continued successfully.", status: "ok" }))
}

/// `/flush_cache`, by GET or POST.
#[utoipa::path(
    post, path = "/flush_cache", operation_id = "flush_cache", tag = "control",
    responses((status = 200, description = "Later requests share no prefix with earlier ones", body = Done), errors::Command),
)]
pub async fn flush_cache(
    State(state): Shared,
    mut given: Arguments,
) -> Result<Json<Done>, ApiError> {
    // The longest time to wait for running requests. They need not end: they keep their KV, and
    // later ones do not use it.
    given.seconds("timeout")?;
    given.finish()?;
    command(&state, |engine| engine.reset_prefix_cache()).await?;
    Ok(Json(Done { success: true, message: "Cache flushed." }))
}

/// `POST /abort_request {rid}` or `{abort_all}`.
#[utoipa::path(
    post, path = "/abort_request", operation_id = "abort_request", tag = "control",
    responses((status = 200, description = "The requests are ended", body = AbortedRequest), errors::Command),
)]
pub async fn abort_request(
    State(state): Shared,
    mut given: Arguments,
) -> Result<Json<AbortedRequest>, ApiError> {
    let rid = given.text("rid")?.filter(|rid| !rid.is_empty());
    let all = given.flag("abort_all")?.unwrap_or(false);
    given.finish()?;
    let aborted = match (all, rid) {
        (true, _) => abort_all(&state).await?,
        (false, Some(rid)) => abort(&state, &rid),
        (false, None) => return Err(ApiError::invalid("rid", "is required unless abort_all")),
    };
    Ok(Json(AbortedRequest { success: true, aborted }))
}

/// `POST /release_memory_occupation {tags}`: `weights`, `kv_cache`; both if none is named.
#[utoipa::path(
    post, path = "/release_memory_occupation", operation_id = "release_memory_occupation", tag = "control",
    responses((status = 200, description = "The memory is given back", body = Success), errors::Command),
)]
pub async fn release_memory(
    State(state): Shared,
    mut given: Arguments,
) -> Result<Json<Success>, ApiError> {
    let tags = given.list("tags")?;
    given.finish()?;
    let memory = memory_of(tags, "cuda_graph")?;
    command(&state, move |engine| {
        let (weights, kv) = (memory.contains(&Memory::Weights), memory.contains(&Memory::KvCache));
        match (weights, kv) {
            (false, false) => Ok(()),
            (false, true) => engine.sleep(Sleep::KvCache),
            (true, true) => engine.sleep(Sleep::Weights),
            // K and V of weights that are gone are worth nothing; their pages are at hand again.
            (true, false) => {
                engine.sleep(Sleep::Weights).and_then(|()| engine.wake_up(&[Memory::KvCache]))
            }
        }
    })
    .await?;
    Ok(Json(Success { success: true }))
}

/// `POST /resume_memory_occupation {tags}`.
#[utoipa::path(
    post, path = "/resume_memory_occupation", operation_id = "resume_memory_occupation", tag = "control",
    responses((status = 200, description = "The memory is taken again", body = Success), errors::Command),
)]
pub async fn resume_memory(
    State(state): Shared,
    mut given: Arguments,
) -> Result<Json<Success>, ApiError> {
    let tags = given.list("tags")?;
    given.finish()?;
    let memory = memory_of(tags, "cuda_graph")?;
    command(&state, move |engine| engine.wake_up(&memory)).await?;
    Ok(Json(Success { success: true }))
}

/// `GET /get_weight_version`.
#[utoipa::path(
    get, path = "/get_weight_version", operation_id = "get_weight_version", tag = "control",
    responses((status = 200, description = "What the weights are called", body = WeightVersion), errors::Controlled),
)]
pub async fn weight_version(State(state): Shared) -> Json<WeightVersion> {
    Json(WeightVersion { weight_version: version(&state) })
}

/// `GET /get_model_info`.
#[utoipa::path(
    get, path = "/get_model_info", operation_id = "get_model_info", tag = "control",
    responses((status = 200, description = "The model", body = Object), errors::Controlled),
)]
pub async fn model_info(State(state): Shared) -> Json<Value> {
    let name = &state.info.name;
    Json(json!({
        "model_path": name,
        "tokenizer_path": name,
        "is_generation": true,
        "preferred_sampling_params": null,
        "weight_version": version(&state),
    }))
}

/// `GET /get_server_info`.
#[utoipa::path(
    get, path = "/get_server_info", operation_id = "get_server_info", tag = "control",
    responses((status = 200, description = "The server", body = Object), errors::Controlled),
)]
pub async fn server_info(State(state): Shared) -> Json<Value> {
    let info = &state.info;
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "served_model_name": info.name,
        "context_length": info.max_model_len,
        "max_running_requests": info.max_samples,
        "tp_size": 1,
        "dp_size": 1,
        "pp_size": 1,
        "weight_version": version(&state),
        "status": if state.engine.is_sleeping() { "sleeping" } else { "ready" },
    }))
}
