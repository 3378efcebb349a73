//! What is served: `/v1/models`, `/version`.

use super::error::ApiError;
use super::fields::unknown_model;
use super::openapi::errors;
use super::{AppState, Shared};
use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

/// A served model, as vLLM describes one: it is no adapter of another, and anybody may use it.
#[derive(Debug, Serialize, ToSchema)]
pub struct Card {
    id: String,
    object: &'static str,
    /// When the server started, in seconds since 1970.
    created: u64,
    owned_by: &'static str,
    root: String,
    parent: Option<String>,
    /// Longest sequence, prompt and completion together, in tokens.
    max_model_len: usize,
    permission: [Permission; 1],
}

/// What a client may do with a model.
#[derive(Debug, Serialize, ToSchema)]
pub struct Permission {
    id: String,
    object: &'static str,
    created: u64,
    allow_create_engine: bool,
    allow_sampling: bool,
    allow_logprobs: bool,
    allow_search_indices: bool,
    allow_view: bool,
    allow_fine_tuning: bool,
    organization: &'static str,
    group: Option<String>,
    is_blocking: bool,
}

/// The served models.
#[derive(Debug, Serialize, ToSchema)]
pub struct Cards {
    object: &'static str,
    data: Vec<Card>,
}

/// Versions of the program and of the weights.
#[derive(Debug, Serialize, ToSchema)]
pub struct Version {
    version: &'static str,
    weight_version: u64,
}

fn card(state: &AppState) -> Card {
    let (name, created) = (&state.info.name, state.created);
    Card {
        id: name.clone(),
        object: "model",
        created,
        owned_by: "onpolicy",
        root: name.clone(),
        parent: None,
        max_model_len: state.info.max_model_len,
        permission: [Permission {
            id: format!("modelperm-{created}"),
            object: "model_permission",
            created,
            allow_create_engine: false,
            allow_sampling: true,
            allow_logprobs: true,
            allow_search_indices: false,
            allow_view: true,
            allow_fine_tuning: false,
            organization: "*",
            group: None,
            is_blocking: false,
        }],
    }
}

/// `GET /v1/models`.
#[utoipa::path(
    get, path = "/v1/models", operation_id = "models", tag = "server",
    responses((status = 200, description = "The served model", body = Cards), errors::Plain),
)]
pub async fn list(State(state): Shared) -> Json<Cards> {
    Json(Cards { object: "list", data: vec![card(&state)] })
}

/// `GET /v1/models/{id}`; ids may have slashes.
///
/// # Errors
/// 404 for a model that is not served, 400 for a name that is no text.
#[utoipa::path(
    get, path = "/v1/models/{id}", operation_id = "model", tag = "server",
    params(("id" = String, Path, description = "Name of the model")),
    responses(
        (status = 200, description = "The model", body = Card),
        (status = 400, description = "The name is no text", body = errors::ErrorAnswer),
        (status = 404, description = "No such model", body = errors::ErrorAnswer),
        errors::Plain,
    ),
)]
pub async fn get(
    State(state): Shared,
    path: Result<Path<String>, PathRejection>,
) -> Result<Json<Card>, ApiError> {
    let Path(id) =
        path.map_err(|error| ApiError::new(StatusCode::BAD_REQUEST, error.body_text()))?;
    if id == state.info.name {
        Ok(Json(card(&state)))
    } else {
        Err(unknown_model(&id, &state.info))
    }
}

/// `GET /version`: of the program and of the weights.
#[utoipa::path(
    get, path = "/version", operation_id = "version", tag = "server",
    responses((status = 200, description = "Versions", body = Version), errors::Plain),
)]
pub async fn version(State(state): Shared) -> Json<Version> {
    let weight_version = state.engine.weight_version();
    Json(Version { version: env!("CARGO_PKG_VERSION"), weight_version })
}
