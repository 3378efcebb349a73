//! A server with a scripted engine on a free port, and a client to it.

use crate::scripted::{Script, Scripted, Seen};
use crate::tokenizer::tokenizer;
use metrics_exporter_prometheus::PrometheusHandle;
use onpolicy_engine::chat::ToolFormat;
use onpolicy_engine::http::connections::{ConnectionLimits, serve};
use onpolicy_engine::http::{self, AppState, Limits};
use reqwest::{Client, Response, StatusCode};
use serde_json::Value;
use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// How long running requests may take after the signal to stop.
pub const GRACE: Duration = Duration::from_secs(1);

/// Bounds every test.
pub async fn within<T>(test: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), test).await.expect("the test took too long")
}

/// Waits until `condition` holds.
pub async fn until(condition: impl Fn() -> bool) {
    while !condition() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn metrics() -> PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE.get_or_init(|| http::metrics::install().unwrap()).clone()
}

pub struct Server {
    pub url: String,
    pub seen: Arc<Seen>,
    pub client: Client,
    pub stop: oneshot::Sender<()>,
    pub stopped: JoinHandle<std::io::Result<()>>,
}

impl Server {
    pub async fn start(script: Script) -> Self {
        Self::with_limits(script, Limits::default()).await
    }

    pub async fn with_limits(script: Script, limits: Limits) -> Self {
        let connections = ConnectionLimits { grace: GRACE, ..ConnectionLimits::default() };
        Self::with_connections(script, limits, connections).await
    }

    pub async fn with_connections(
        script: Script,
        limits: Limits,
        connections: ConnectionLimits,
    ) -> Self {
        let engine = Arc::new(Scripted::new(script));
        let seen = engine.seen.clone();
        let state = AppState::new(engine, tokenizer(), limits, metrics());
        Self::serving(state, connections, seen).await
    }

    /// A server whose model writes calls of tools in this form.
    pub async fn with_tool_format(script: Script, format: ToolFormat) -> Self {
        let engine = Arc::new(Scripted::new(script));
        let seen = engine.seen.clone();
        let state = AppState::new(engine, tokenizer(), Limits::default(), metrics());
        let connections = ConnectionLimits { grace: GRACE, ..ConnectionLimits::default() };
        Self::serving(state.with_tool_format(format), connections, seen).await
    }

    async fn serving(state: AppState, connections: ConnectionLimits, seen: Arc<Seen>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopping) = oneshot::channel::<()>();
        let shutdown = async {
            let _ = stopping.await;
        };
        let stopped = tokio::spawn(serve(listener, http::app(state), connections, shutdown));
        // A connection that is kept may be closed by the server just when it is used again.
        let client = Client::builder().pool_max_idle_per_host(0).build().unwrap();
        Self { url, seen, client, stop, stopped }
    }

    pub async fn get(&self, path: &str) -> (StatusCode, Value) {
        parse(self.client.get(self.url.clone() + path).send().await.unwrap()).await
    }

    pub async fn send(&self, path: &str, body: &Value) -> Response {
        self.client.post(self.url.clone() + path).json(body).send().await.unwrap()
    }

    pub async fn post(&self, path: &str, body: Value) -> (StatusCode, Value) {
        parse(self.send(path, &body).await).await
    }

    /// Posts what must be answered with 200.
    pub async fn ok(&self, path: &str, body: Value) -> Value {
        let (status, answer) = self.post(path, body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer
    }

    /// The field that a 400 names, and what it says.
    pub async fn refused(&self, path: &str, body: Value) -> (String, String) {
        let (status, answer) = self.post(path, body.clone()).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{body} got {answer}");
        let error = &answer["error"];
        assert_eq!(error["type"], "invalid_request_error", "{answer}");
        let param = error["param"].as_str().unwrap_or("").to_string();
        (param, error["message"].as_str().unwrap().to_string())
    }

    /// The chunks of a stream, and whether `[DONE]` came last.
    pub async fn stream(&self, path: &str, mut body: Value) -> (Vec<Value>, bool) {
        body["stream"] = true.into();
        let response = self.send(path, &body).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let text = response.text().await.unwrap();
        let mut events: Vec<&str> =
            text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        let done = events.last() == Some(&"[DONE]");
        if done {
            events.pop();
        }
        (events.iter().map(|event| serde_json::from_str(event).unwrap()).collect(), done)
    }
}

async fn parse(response: Response) -> (StatusCode, Value) {
    let status = response.status();
    let text = response.text().await.unwrap();
    (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}
