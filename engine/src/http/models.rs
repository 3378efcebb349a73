//! What is served: `/v1/models`, `/version`.

use super::error::ApiError;
use super::fields::unknown_model;
use super::{AppState, Shared};
use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

/// The model as vLLM describes one: it is no adapter of another, and anybody may use it.
fn card(state: &AppState) -> Value {
    let (name, created) = (&state.info.name, state.created);
    json!({
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "onpolicy",
        "root": name,
        "parent": null,
        "max_model_len": state.info.max_model_len,
        "permission": [{
            "id": format!("modelperm-{created}"),
            "object": "model_permission",
            "created": created,
            "allow_create_engine": false,
            "allow_sampling": true,
            "allow_logprobs": true,
            "allow_search_indices": false,
            "allow_view": true,
            "allow_fine_tuning": false,
            "organization": "*",
            "group": null,
            "is_blocking": false,
        }],
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
