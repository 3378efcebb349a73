//! vLLM's and prime-rl's routes about weights: load them from disk, name them, check them.

use super::answers::{Checked, Renamed, Status, Updated, WeightVersion, WorldSize};
use super::arguments::Arguments;
use super::version::Wanted;
use super::{command, not_built_in, too_late};
use crate::http::{AppState, Shared, error::ApiError, openapi::errors};
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use onpolicy_plugin_api::WeightUpdate;
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::time::timeout;

pub(super) fn router() -> Router<Arc<AppState>> {
    Router::new()
        .route("/update_weights", post(update_weights))
        .route("/weight_info", get(weight_info))
        .route("/update_weight_version", post(update_weight_version))
        .route("/weight_checker", post(weight_checker))
        .route("/get_world_size", get(world_size))
        .route("/get_world_size/", get(world_size))
}

/// The route that an updated engine answers on; what is not built in names it.
pub(super) const FROM_DISK: &str = "save the weights as a Hugging Face directory and POST its path as {\"weight_dir\"} to \
     /update_weights";

/// `GET /liveness` of prime-rl: the engine answers between two steps.
///
/// # Errors
/// The engine has stopped.
#[utoipa::path(
    get, path = "/liveness", operation_id = "liveness", tag = "server",
    responses(
        (status = 200, description = "The engine answers", body = Status),
        (status = 503, description = "It does not, or has stopped"),
        errors::Plain,
    ),
)]
pub async fn liveness(State(state): Shared) -> Result<Response, ApiError> {
    let engine = state.engine.clone();
    let answer = tokio::task::spawn_blocking(move || engine.ping());
    match timeout(state.control.settings.timeout.min(LIVELY), answer).await {
        Ok(Ok(alive)) => {
            alive?;
            Ok(Json(Status { status: "ok" }).into_response())
        }
        _ => {
            let silent = Json(Status { status: "engine_unresponsive" });
            Ok((StatusCode::SERVICE_UNAVAILABLE, silent).into_response())
        }
    }
}

/// How long a step and what else may be under way may take.
const LIVELY: std::time::Duration = std::time::Duration::from_secs(30);

/// `POST /update_weights`: prime-rl's `weight_dir`; vLLM's `update_info` needs NCCL.
#[utoipa::path(
    post, path = "/update_weights", operation_id = "update_weights", tag = "control",
    responses((status = 200, description = "The engine draws from the new weights", body = Updated), errors::Update),
)]
pub async fn update_weights(
    State(state): Shared,
    mut given: Arguments,
) -> Result<Json<Updated>, ApiError> {
    if given.value("update_info").is_some() {
        let message = format!("weights over NCCL or IPC are not built in; {FROM_DISK}");
        return Err(not_built_in(message));
    }
    let dir = given.text("weight_dir")?;
    let wanted = given.word("weight_version")?.map(Wanted::new);
    given.finish()?;
    let dir = admit(&state, "weight_dir", dir)?;
    let weight_version = load(&state, "weight_dir", dir, wanted).await?;
    Ok(Json(Updated { status: "ok", message: "Weights updated", weight_version }))
}

/// The directory that argument `name` asks for, if weights may be loaded from there.
pub(super) fn admit(
    state: &AppState,
    name: &'static str,
    asked: Option<String>,
) -> Result<PathBuf, ApiError> {
    let asked = asked.ok_or_else(|| ApiError::invalid(name, "is required"))?;
    state.control.settings.weight_roots.admit(name, &asked)
}

/// Loads weights from a directory that argument `name` asked for; says what they are called now.
pub(super) async fn load(
    state: &Arc<AppState>,
    name: &'static str,
    dir: PathBuf,
    wanted: Option<Wanted>,
) -> Result<String, ApiError> {
    let turn =
        timeout(state.control.settings.timeout, state.control.updates.clone().acquire_owned());
    let turn = turn.await.map_err(|_| too_late(state))?;
    let number = wanted.as_ref().and_then(Wanted::number);
    let updated = command(state, move |engine| {
        let version = engine.update_weights(WeightUpdate::Directory(dir), number);
        drop(turn);
        version
    });
    let version = updated.await.map_err(|error| match error.param.as_deref() {
        Some("directory") => ApiError { param: Some(name.into()), ..error },
        _ => error,
    })?;
    if let Some(wanted) = wanted {
        state.control.name.set(version, wanted);
    }
    Ok(state.control.name.of(version))
}

/// What the weights are called.
pub(super) fn version(state: &AppState) -> String {
    state.control.name.of(state.engine.weight_version())
}

/// `GET /weight_info`.
#[utoipa::path(
    get, path = "/weight_info", operation_id = "weight_info", tag = "control",
    responses((status = 200, description = "What the weights are called", body = WeightVersion), errors::Controlled),
)]
pub async fn weight_info(State(state): Shared) -> Json<WeightVersion> {
    Json(WeightVersion { weight_version: version(&state) })
}

/// `POST /update_weight_version`: a number is what later tokens carry; another name is kept beside
/// the number.
#[utoipa::path(
    post, path = "/update_weight_version", operation_id = "update_weight_version", tag = "control",
    responses((status = 200, description = "The weights have another name", body = Renamed), errors::Command),
)]
pub async fn update_weight_version(
    State(state): Shared,
    mut given: Arguments,
) -> Result<Json<Renamed>, ApiError> {
    let name = given.word("new_version")?;
    let abort = given.flag("abort_all_requests")?.unwrap_or(false);
    given.finish()?;
    let name = name.ok_or_else(|| ApiError::invalid("new_version", "is required"))?;
    let wanted = Wanted::new(name.clone());
    let number = wanted.number();
    command(&state, move |engine| {
        if abort {
            engine.abort_all()?;
        }
        number.map_or(Ok(()), |number| engine.set_weight_version(number))
    })
    .await?;
    state.control.name.set(state.engine.weight_version(), wanted);
    let message = format!("Weight version updated to {name}");
    Ok(Json(Renamed { success: true, message, new_version: name }))
}

/// What [`weight_checker`] does.
#[derive(Clone, Copy)]
enum Action {
    Checksum,
    Reset,
    Compare,
}

/// `POST /weight_checker {action, baseline?, checksums?}`: 64-bit hashes of the weights, in
/// hexadecimal digits, by name.
#[utoipa::path(
    post, path = "/weight_checker", operation_id = "weight_checker", tag = "control",
    responses((status = 200, description = "What was found, or done", body = Checked), errors::Command),
)]
pub async fn weight_checker(
    State(state): Shared,
    mut given: Arguments,
) -> Result<Json<Checked>, ApiError> {
    let actions =
        [("checksum", Action::Checksum), ("reset", Action::Reset), ("compare", Action::Compare)];
    let action = match given.word("action")? {
        None => return Err(ApiError::invalid("action", "is required: checksum, reset or compare")),
        Some(word) => actions.iter().find(|(known, _)| *known == word).map(|(_, action)| *action),
    };
    let rule = "must be checksum, reset or compare";
    let action = action.ok_or_else(|| ApiError::invalid("action", rule))?;
    let reports = match action {
        Action::Compare => reports(&mut given)?,
        _ => Vec::new(),
    };
    given.finish()?;
    if let Action::Reset = action {
        command(&state, |engine| engine.reset_weights()).await?;
        return Ok(Json(Checked::Reset { status: "reset" }));
    }
    let checksums = command(&state, |engine| engine.checksums()).await?;
    let hex = |(name, hash): (String, u64)| (name, Value::String(format!("{hash:016x}")));
    let checksums: Map<String, Value> = checksums.into_iter().map(hex).collect();
    Ok(Json(match action {
        Action::Compare => {
            let mismatches = mismatches(&checksums, &reports);
            let mismatches: Vec<String> = mismatches.into_iter().cloned().collect();
            Checked::Compared { matches: mismatches.is_empty(), mismatches }
        }
        _ => Checked::Checksums { checksums },
    }))
}

/// The baseline, and what other servers have reported.
fn reports(given: &mut Arguments) -> Result<Vec<Map<String, Value>>, ApiError> {
    let Some(Value::Object(baseline)) = given.value("baseline") else {
        let rule = "must be the checksums of an earlier answer, by name";
        return Err(ApiError::invalid("baseline", rule));
    };
    let others: Vec<Map<String, Value>> = match given.value("checksums") {
        None => Vec::new(),
        Some(others) => serde_json::from_value(others)
            .map_err(|_| ApiError::invalid("checksums", "must be a list of checksums by name"))?,
    };
    Ok([vec![baseline], others].concat())
}

/// Names that not every report has with the same hash as the engine.
fn mismatches<'a>(
    checksums: &'a Map<String, Value>,
    reports: &'a [Map<String, Value>],
) -> BTreeSet<&'a String> {
    let names = checksums.keys().chain(reports.iter().flat_map(Map::keys));
    let same = |name: &&String| {
        checksums
            .get(*name)
            .is_some_and(|hash| reports.iter().all(|report| report.get(*name) == Some(hash)))
    };
    names.filter(|name| !same(name)).collect()
}

/// `GET /get_world_size`: one engine.
#[utoipa::path(
    get, path = "/get_world_size", operation_id = "get_world_size", tag = "control",
    responses((status = 200, description = "How many engines there are", body = WorldSize), errors::Asking),
)]
pub async fn world_size(mut given: Arguments) -> Result<Json<WorldSize>, ApiError> {
    given.flag("include_dp")?;
    given.finish()?;
    Ok(Json(WorldSize { world_size: 1 }))
}
