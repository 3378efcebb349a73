//! What is served: `/v1/models`, `/version`, `/health`.

use super::error::ApiError;
use super::fields::unknown_model;
use super::{AppState, Shared};
use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

fn card(state: &AppState) -> Value {
    json!({
        "id": state.info.name,
        "object": "model",
        "created": state.created,
        "owned_by": "onpolicy",
        "max_model_len": state.info.max_model_len,
    })
}

/// `GET /v1/models`.
pub async fn list(State(state): Shared) -> Json<Value> {
    Json(json!({ "object": "list", "data": [card(&state)] }))
}

/// `GET /v1/models/{id}`; ids may have slashes.
///
/// # Errors
/// 404 for a model that is not served.
pub async fn get(State(state): Shared, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    if id == state.info.name {
        Ok(Json(card(&state)))
    } else {
        Err(unknown_model(&id, &state.info))
    }
}

/// `GET /version`: of the program and of the weights.
pub async fn version(State(state): Shared) -> Json<Value> {
    let weight_version = state.engine.weight_version();
    Json(json!({ "version": env!("CARGO_PKG_VERSION"), "weight_version": weight_version }))
}

/// `GET /health` and `/ping`: the server answers.
pub async fn health() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}
