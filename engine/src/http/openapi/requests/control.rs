//! The arguments of commands: each may come in the query or in the body. `control` decides; the
//! tests compare.

use super::{Properties, boolean, object, properties, text, texts, word};
use serde_json::{Value, json};

/// The arguments of a route.
struct Arguments {
    method: &'static str,
    path: &'static str,
    properties: Properties,
}

fn all() -> Vec<Arguments> {
    let of = |(method, path, arguments): (&'static str, &'static str, Value)| Arguments {
        method,
        path,
        properties: properties(arguments),
    };
    let routes = pausing().into_iter().chain(weights()).chain(memory()).chain(sglang());
    routes.map(of).collect()
}

type Route = (&'static str, &'static str, Value);

fn pausing() -> Vec<Route> {
    vec![
        (
            "post",
            "/pause",
            json!({
                "mode": word("What becomes of running samples", &["abort", "wait", "keep"]),
                "wait_for_inflight_requests": boolean("An older form of the mode \"wait\"", false),
                "clear_cache": boolean("Forget the prefixes; if absent, unless samples are kept", true),
            }),
        ),
        ("post", "/resume", json!({})),
        (
            "post",
            "/abort_requests",
            json!({"request_ids": list("Requests of these names; all, if none is named", "mine")}),
        ),
        (
            "post",
            "/reset_prefix_cache",
            json!({
                "reset_running_requests": {"const": false},
                "reset_external": {"const": false},
            }),
        ),
    ]
}

fn weights() -> Vec<Route> {
    vec![
        (
            "post",
            "/update_weights",
            json!({
                "weight_dir": text("A directory in one of server.weight_roots; required", "weights/step-1"),
                "weight_version": name(),
                "update_info": {"description": "Needs what is not built in: 501", "type": "object"},
            }),
        ),
        (
            "post",
            "/update_weight_version",
            json!({
                "new_version": {"description": "What the weights are called; required. A number \
                    is what later tokens carry", "type": ["string", "number"], "example": 7},
                "abort_all_requests": boolean("End what runs", false),
            }),
        ),
        (
            "post",
            "/weight_checker",
            json!({
                "action": word("What to do; required", &["checksum", "reset", "compare"]),
                "baseline": {"description": "Checksums to compare with; required for that", "type": "object",
                    "additionalProperties": {"type": "string"}},
                "checksums": {"description": "Checksums that other servers have reported",
                    "type": "array", "items": {"type": "object"}},
            }),
        ),
        ("get", "/get_world_size", json!({"include_dp": boolean("There is one engine", true)})),
    ]
}

fn memory() -> Vec<Route> {
    vec![
        (
            "post",
            "/sleep",
            json!({
                "level": {"description": "0: take no steps; 1: give back the pages of K and V; \
                    2: the weights too", "enum": [1, 0, 2, "1", "0", "2"]},
                "mode": word("What becomes of running samples", &["abort", "wait"]),
            }),
        ),
        (
            "post",
            "/wake_up",
            json!({"tags": list("weights, kv_cache, scheduling; all, if none is named", "weights")}),
        ),
    ]
}

fn sglang() -> Vec<Route> {
    let tags =
        || json!({"tags": list("weights, kv_cache, cuda_graph; all, if none is named", "weights")});
    vec![
        (
            "post",
            "/update_weights_from_disk",
            json!({
                "model_path": text("A directory in one of server.weight_roots; required", "weights/step-1"),
                "weight_version": name(),
                "abort_all_requests": boolean("End what runs", false),
                "load_format": word("Both are safetensors", &["auto", "safetensors"]),
                "is_async": {"const": false},
                "torch_empty_cache": {"const": false},
                "keep_pause": {"const": false},
                "recapture_cuda_graph": {"const": false},
                "flush_cache": {"const": true},
            }),
        ),
        (
            "post",
            "/pause_generation",
            json!({"mode": word("What becomes of running samples", &["abort", "in_place", "retract"])}),
        ),
        ("post", "/continue_generation", json!({"torch_empty_cache": {"const": false}})),
        (
            "post",
            "/flush_cache",
            json!({"timeout": {
                "description": "Longest time to wait, in seconds; the cache is flushed at once",
                "anyOf": [
                    {"type": "number", "minimum": 0},
                    {"type": "string", "pattern": "^[0-9]{1,9}$"},
                ],
            }}),
        ),
        (
            "post",
            "/abort_request",
            json!({
                "rid": text("The request's name", "mine"),
                "abort_all": boolean("All requests", false),
            }),
        ),
        ("post", "/release_memory_occupation", tags()),
        ("post", "/resume_memory_occupation", tags()),
    ]
}

fn list(says: &str, example: &str) -> Value {
    json!({"anyOf": [texts(says, example), {"type": "string"}]})
}

fn name() -> Value {
    json!({"description": "What the new weights are called; a number is what tokens carry",
        "type": ["string", "number"], "example": 7})
}

/// Writes the arguments to the routes of a document. Routes by GET take them in the query alone.
pub fn describe(document: &mut Value) {
    for Arguments { method, path, properties } in all() {
        let operation = &mut document["paths"][path][method];
        let parameters = properties.iter().map(|(name, schema)| {
            json!({"name": name, "in": "query", "required": false, "schema": schema})
        });
        operation["parameters"] = Value::Array(parameters.collect());
        if method == "post" {
            let schema = object(&Properties::new(), properties);
            operation["requestBody"] =
                json!({"required": false, "content": {"application/json": {"schema": schema}}});
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Method, path and names of the arguments of all routes.
    pub fn names() -> Vec<(&'static str, &'static str, Vec<String>)> {
        let of = |route: Arguments| {
            let names = route.properties.keys().cloned().collect();
            (route.method, route.path, names)
        };
        all().into_iter().map(of).collect()
    }
}
