//! Servers that speak vLLM's or SGLang's API and behave as they are told.

use axum::{
    Json, Router,
    extract::{Query, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::{net::TcpListener, runtime::Runtime};

/// What a server does, and what it has seen.
#[derive(Debug, Clone, Default)]
pub struct Script {
    /// Pause before an answer.
    pub pause: Duration,
    /// Generating routes answer with this status.
    pub fails: Option<u16>,
    /// `/health` answers with 500.
    pub sick: bool,
    /// Weights are not taken.
    pub refuses_weights: bool,
    /// The version stays what it is, whatever is loaded.
    pub stubborn: bool,
    /// Samples end with "abort" this many times.
    pub aborts: usize,
    /// It has no routes for versions.
    pub nameless: bool,
    /// It has vLLM's own way to load weights alone.
    pub plain: bool,
    /// It gives this project's statistics.
    pub policy: bool,
    /// Keys that it asks for, of the generating and of the control routes.
    pub keys: Option<(String, String)>,
    pub version: String,
    /// Control routes that were called, with what was said.
    pub calls: Vec<String>,
    /// Bodies of generating routes.
    pub bodies: Vec<Value>,
}

pub struct Shared {
    script: Mutex<Script>,
    pub running: AtomicUsize,
    pub most_running: AtomicUsize,
    pub finished: AtomicUsize,
}

type At = State<Arc<Shared>>;

pub struct Fake {
    pub url: String,
    pub shared: Arc<Shared>,
    port: u16,
    runtime: Option<Runtime>,
    sglang: bool,
}

impl Fake {
    pub fn vllm(script: Script) -> Self {
        Self::start(script, false, 0)
    }

    pub fn sglang(script: Script) -> Self {
        Self::start(script, true, 0)
    }

    fn start(script: Script, sglang: bool, port: u16) -> Self {
        let runtime = Runtime::new().expect("a runtime");
        let address = format!("127.0.0.1:{port}");
        let listener = runtime.block_on(TcpListener::bind(address)).expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let shared = Arc::new(Shared {
            script: Mutex::new(script),
            running: AtomicUsize::new(0),
            most_running: AtomicUsize::new(0),
            finished: AtomicUsize::new(0),
        });
        let routes = if sglang { sglang_routes() } else { vllm_routes() };
        let app = routes.route("/health", get(health)).route("/v1/models", get(models));
        let app = app.with_state(shared.clone());
        runtime.spawn(async move { axum::serve(listener, app).await });
        let url = format!("http://127.0.0.1:{port}");
        Self { url, shared, port, runtime: Some(runtime), sglang }
    }

    /// The script, to be changed while the server runs.
    pub fn script(&self) -> MutexGuard<'_, Script> {
        self.shared.script.lock().expect("no panic")
    }

    /// Ends the process, so to say: connections break off.
    pub fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(1));
        }
    }

    /// A new process at the same address.
    pub fn restart(&mut self, script: Script) {
        self.kill();
        *self = Self::start(script, self.sglang, self.port);
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.kill();
    }
}

fn vllm_routes() -> Router<Arc<Shared>> {
    Router::new()
        .route("/version", get(|| async { Json(json!({"version": "0"})) }))
        .route("/v1/completions", post(completions))
        .route("/pause", post(|state, query| note(state, "pause", query)))
        .route("/resume", post(|state, query| note(state, "resume", query)))
        .route("/reset_prefix_cache", post(|state, query| note(state, "reset", query)))
        .route("/update_weights", post(update_weights))
        .route("/collective_rpc", post(collective_rpc))
        .route("/update_weight_version", post(name))
        .route("/weight_info", get(version))
}

fn sglang_routes() -> Router<Arc<Shared>> {
    Router::new()
        .route("/get_model_info", get(|| async { Json(json!({"model_path": "m"})) }))
        .route("/generate", post(generate))
        .route("/pause_generation", post(pause_generation))
        .route("/continue_generation", post(|state, query| note(state, "resume", query)))
        .route("/flush_cache", post(|state, query| note(state, "reset", query)))
        .route("/update_weights_from_disk", post(from_disk))
        .route("/update_weight_version", post(name))
        .route("/get_weight_version", get(version))
}

async fn health(State(shared): At) -> StatusCode {
    match shared.script.lock().expect("no panic").sick {
        true => StatusCode::INTERNAL_SERVER_ERROR,
        false => StatusCode::OK,
    }
}

async fn models() -> Json<Value> {
    Json(json!({"data": [{"id": "fake/model", "max_model_len": 64}]}))
}

async fn note(
    State(shared): At,
    what: &'static str,
    Query(query): Query<HashMap<String, String>>,
) -> StatusCode {
    let mode = query.get("mode").map(|mode| format!(" {mode}")).unwrap_or_default();
    shared.script.lock().expect("no panic").calls.push(format!("{what}{mode}"));
    StatusCode::OK
}

async fn pause_generation(State(shared): At, Json(body): Json<Value>) -> StatusCode {
    let call = format!("pause {}", body["mode"].as_str().unwrap_or("?"));
    shared.script.lock().expect("no panic").calls.push(call);
    StatusCode::OK
}

fn load(shared: &Shared, what: &str, dir: &Value) -> bool {
    let mut script = shared.script.lock().expect("no panic");
    let dir = dir.as_str().unwrap_or("?");
    let name = dir.rsplit('/').next().unwrap_or_default();
    script.calls.push(format!("{what} {name}"));
    !script.refuses_weights
}

async fn update_weights(
    State(shared): At,
    headers: HeaderMap,
    Json(body): Json<Value>,
) -> Response {
    let script = shared.script.lock().expect("no panic").clone();
    let error = |status: StatusCode, message: &str| {
        (status, Json(json!({"error": {"message": message}}))).into_response()
    };
    if script.keys.is_some_and(|(_, control)| bearer(&headers) != control) {
        return error(StatusCode::UNAUTHORIZED, "no control key");
    }
    if script.plain {
        return error(StatusCode::BAD_REQUEST, "Missing 'update_info' in request body");
    }
    match load(&shared, "load", &body["weight_dir"]) {
        true => Json(json!({"status": "ok"})).into_response(),
        false => error(StatusCode::BAD_REQUEST, "no such directory"),
    }
}

async fn collective_rpc(State(shared): At, Json(body): Json<Value>) -> StatusCode {
    if !shared.script.lock().expect("no panic").plain {
        return StatusCode::NOT_FOUND;
    }
    assert_eq!(body["method"], "reload_weights");
    match load(&shared, "reload", &body["kwargs"]["weights_path"]) {
        true => StatusCode::OK,
        false => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

async fn from_disk(State(shared): At, Json(body): Json<Value>) -> Json<Value> {
    let taken = load(&shared, "load", &body["model_path"]);
    let mut script = shared.script.lock().expect("no panic");
    if taken && !script.stubborn {
        script.version = body["weight_version"].as_str().unwrap_or("?").to_string();
    }
    Json(json!({"success": taken, "message": "cannot be read"}))
}

async fn name(State(shared): At, Json(body): Json<Value>) -> StatusCode {
    let mut script = shared.script.lock().expect("no panic");
    match body["new_version"].as_str() {
        _ if script.nameless => StatusCode::NOT_FOUND,
        None => StatusCode::BAD_REQUEST,
        Some(version) => {
            if !script.stubborn {
                script.version = version.to_string();
            }
            StatusCode::OK
        }
    }
}

async fn version(State(shared): At) -> Response {
    let script = shared.script.lock().expect("no panic");
    match script.nameless {
        true => StatusCode::NOT_FOUND.into_response(),
        false => Json(json!({"weight_version": script.version})).into_response(),
    }
}

fn bearer(headers: &HeaderMap) -> String {
    let value = headers.get("authorization").and_then(|value| value.to_str().ok());
    value.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or("").to_string()
}

/// A request under way; it also ends when the client goes away.
struct Running<'a>(&'a Shared);

impl<'a> Running<'a> {
    fn new(shared: &'a Shared) -> Self {
        let running = shared.running.fetch_add(1, SeqCst) + 1;
        shared.most_running.fetch_max(running, SeqCst);
        Self(shared)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, SeqCst);
    }
}

/// Waits as the script says, and tells whether samples end with "abort".
async fn begin(shared: &Shared, body: &Value) -> Result<bool, Response> {
    let pause = {
        let mut script = shared.script.lock().expect("no panic");
        script.bodies.push(body.clone());
        script.pause
    };
    tokio::time::sleep(pause).await;
    let mut script = shared.script.lock().expect("no panic");
    if let Some(status) = script.fails {
        let error = json!({"error": {"message": "scripted", "param": "temperature"}});
        let status = StatusCode::from_u16(status).expect("a status");
        return Err((status, Json(error)).into_response());
    }
    let aborts = script.aborts > 0;
    script.aborts = script.aborts.saturating_sub(1);
    Ok(aborts)
}

/// Sample `index` of a prompt: its last token plus 1, then plus 2, ..., `index` + 1 of them.
fn tokens(prompt: &Value, index: usize) -> Vec<u64> {
    let last = prompt.as_array().and_then(|ids| ids.last()?.as_u64()).unwrap_or(0);
    (1..=index as u64 + 1).map(|step| last + step).collect()
}

async fn completions(State(shared): At, headers: HeaderMap, Json(body): Json<Value>) -> Response {
    let _running = Running::new(&shared);
    let aborted = match begin(&shared, &body).await {
        Ok(aborted) => aborted,
        Err(response) => return response,
    };
    let script = shared.script.lock().expect("no panic").clone();
    if script.keys.is_some_and(|(data, _)| bearer(&headers) != data) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let choice = |index: usize| {
        let ids = tokens(&body["prompt"], index);
        let logprobs: Vec<f32> = ids.iter().map(|&id| -(id as f32) / 64.0).collect();
        let mut choice = json!({
            "index": index, "text": "", "token_ids": ids,
            "finish_reason": if aborted { "abort" } else { "stop" },
            "logprobs": {"token_logprobs": logprobs},
        });
        if script.policy {
            let version: u64 = script.version.parse().unwrap_or(0);
            let column = |x: f32| vec![x; ids.len()];
            choice["policy"] = json!({"entropy": column(0.5), "baseline": column(0.25),
                                      "weight_version": vec![version; ids.len()]});
        }
        choice
    };
    let n = body["n"].as_u64().unwrap_or(1) as usize;
    shared.finished.fetch_add(1, SeqCst);
    let mut answer = json!({"choices": (0..n).map(choice).collect::<Vec<_>>()});
    if script.policy {
        answer["weight_version"] = json!(script.version.parse::<u64>().unwrap_or(0));
    }
    Json(answer).into_response()
}

async fn generate(State(shared): At, Json(body): Json<Value>) -> Response {
    let _running = Running::new(&shared);
    let aborted = match begin(&shared, &body).await {
        Ok(aborted) => aborted,
        Err(response) => return response,
    };
    let version = shared.script.lock().expect("no panic").version.clone();
    let prompts = body["input_ids"].as_array().cloned().unwrap_or_default();
    let one = |(index, prompt): (usize, &Value)| {
        let ids = tokens(prompt, index);
        let entry = |id: &u64| json!([-(*id as f32) / 64.0, id, null]);
        let finish = json!({"type": if aborted { "abort" } else { "stop" }});
        json!({"text": "", "meta_info": {
            "finish_reason": finish, "weight_version": version,
            "output_token_logprobs": ids.iter().map(entry).collect::<Vec<_>>(),
        }})
    };
    shared.finished.fetch_add(1, SeqCst);
    Json(Value::Array(prompts.iter().enumerate().map(one).collect())).into_response()
}
