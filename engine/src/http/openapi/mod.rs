//! `GET /openapi.json`: what the routes take and answer, made from the code that does it.
//!
//! Paths and answers come from attributes and derives at the handlers and their answers; what a
//! body may hold is told by [`requests`], whose tests hold it against the parsers. To add a route:
//! put `#[utoipa::path(..)]` on its handler and name the handler in `Document`; if it takes a body,
//! add its schema to [`requests::schemas`] and an example of it to the tests.

pub mod errors;
pub mod requests;

#[cfg(test)]
mod tests;

use super::{AppState, Shared, chat_completions, completions, health, metrics, models, tokens};
use axum::{Json, extract::State};
use serde_json::{Value, json};
use utoipa::OpenApi;

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
        tokens::tokenize,
        tokens::detokenize,
        health::health,
        health::ping,
        health::generate,
        health::load,
        models::version,
        metrics::show,
        show,
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
