//! `GET /openapi.json`: what the routes take and answer, made from the code that does it.
//!
//! Paths and answers come from attributes and derives at the handlers and their answers; what a
//! body may hold is told by [`requests`], whose tests hold it against the parsers. To add a route:
//! put `#[utoipa::path(..)]` on its handler and name the handler in `Document`; if it takes a body,
//! add its schema to [`requests::schemas`] and an example of it to the tests. The arguments of
//! commands are in [`requests::control`].

pub mod errors;
pub mod requests;

#[cfg(test)]
mod tests;

use super::control::{memory, pausing, sglang, transfer, weights};
use super::{AppState, Shared, chat_completions, completions, generate, health, metrics, models};
use super::{render, tokens};
use axum::{Json, extract::State};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::{IntoResponses, OpenApi, ToSchema};

/// A server-sent event.
#[derive(Debug, Serialize, ToSchema)]
pub struct StreamEvent {
    /// More of the answer as JSON, an error, or `[DONE]`, which comes last.
    data: String,
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "onpolicy",
        description = "A language model, served while it is fine-tuned. Fields follow OpenAI and vLLM.",
        license(name = "MIT"),
    ),
    paths(
        models::list,
        models::get,
        completions::create,
        chat_completions::create,
        render::completions,
        render::chat,
        generate::vllm::create,
        generate::sglang::create,
        generate::trl::generate,
        generate::trl::chat,
        tokens::tokenize,
        tokens::detokenize,
        health::health,
        health::ping,
        health::generate,
        health::load,
        models::version,
        metrics::show,
        show,
        weights::liveness,
        pausing::pause,
        pausing::resume,
        pausing::is_paused,
        pausing::abort_requests,
        pausing::reset_prefix_cache,
        memory::sleep,
        memory::wake_up,
        memory::is_sleeping,
        weights::update_weights,
        weights::weight_info,
        weights::update_weight_version,
        weights::weight_checker,
        weights::world_size,
        sglang::update_weights_from_disk,
        sglang::pause_generation,
        sglang::continue_generation,
        sglang::flush_cache,
        sglang::abort_request,
        sglang::release_memory,
        sglang::resume_memory,
        sglang::weight_version,
        sglang::model_info,
        sglang::server_info,
    ),
    components(schemas(errors::ErrorAnswer))
)]
struct Document;

/// The description of the API of this server: its limits are those of its model.
pub fn document(state: &AppState) -> Value {
    let mut document = serde_json::to_value(Document::openapi()).unwrap_or_default();
    for (name, schema) in requests::schemas(&state.info, &state.limits) {
        document["components"]["schemas"][name] = schema;
    }
    requests::control::describe(&mut document);
    let refused = serde_json::to_value(errors::NotBuiltIn::responses()).unwrap_or_default();
    for path in transfer::paths() {
        let name = path.trim_start_matches('/').replace('/', "_");
        document["paths"][path]["post"] =
            json!({"operationId": name, "tags": ["control"], "responses": refused});
    }
    document
}

/// Answers the route.
#[utoipa::path(
    get, path = "/openapi.json", operation_id = "openapi", tag = "server",
    responses(
        (status = 200, description = "This description", content_type = "application/json", body = Object),
        errors::Plain,
    ),
)]
pub async fn show(State(state): Shared) -> Json<Value> {
    Json(document(&state))
}

/// The schema of a value that is left out by sending null too.
fn nullable(mut schema: Value) -> Value {
    match schema.get("type").cloned() {
        Some(Value::String(kind)) if kind != "null" && schema.get("enum").is_none() => {
            schema["type"] = json!([kind, "null"]);
            schema
        }
        Some(kind) if kind == "null" => schema,
        _ => json!({ "anyOf": [schema, { "type": "null" }] }),
    }
}
