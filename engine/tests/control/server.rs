//! The routes over a native engine, and a client to them.

use crate::support::start;
use onpolicy_engine::{
    engine::EngineHandle,
    http::{
        self, AppState, Limits,
        access::Access,
        control::{Settings, roots::Roots},
        metrics::PrometheusHandle,
    },
    model::loading::Checkpoint,
};
use reqwest::{Client, Method, StatusCode};
use serde_json::{Value, json};
use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};
use tokio::net::TcpListener;

pub struct Server {
    pub url: String,
    pub engine: EngineHandle,
    pub client: Client,
}

/// Bounds every test.
pub async fn within<T>(test: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(120), test).await.expect("the test took too long")
}

pub fn settings(roots: &[PathBuf]) -> Settings {
    Settings { weight_roots: Roots::new(roots.to_vec()).unwrap(), ..Settings::default() }
}

/// Control without a key.
pub fn open() -> Access {
    Access { control: true, ..Access::default() }
}

impl Server {
    pub async fn start(checkpoint: &Checkpoint, access: Access, settings: Settings) -> Self {
        static METRICS: OnceLock<PrometheusHandle> = OnceLock::new();
        let metrics = METRICS.get_or_init(|| http::metrics::install().unwrap()).clone();
        let engine = start(checkpoint);
        let served = Arc::new(engine.clone());
        let state = AppState::new(served, checkpoint.tokenizer.clone(), Limits::default(), metrics)
            .with_access(access, settings);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(http::run(listener, http::app(state), std::future::pending()));
        Self { url, engine, client: Client::new() }
    }

    /// Sends a request without a body if `body` is null.
    pub async fn send(&self, method: Method, path: &str, body: &Value) -> (u16, Value) {
        let request = self.client.request(method, format!("{}{path}", self.url));
        let request = if body.is_null() { request } else { request.json(body) };
        let answer = request.send().await.unwrap();
        let status = answer.status().as_u16();
        let text = answer.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    pub async fn get(&self, path: &str) -> Value {
        let (status, answer) = self.send(Method::GET, path, &Value::Null).await;
        assert_eq!(status, 200, "{path}: {answer}");
        answer
    }

    /// Posts what must be answered with 200.
    pub async fn post(&self, path: &str, body: Value) -> Value {
        let (status, answer) = self.send(Method::POST, path, &body).await;
        assert_eq!(status, 200, "{path}: {answer}");
        answer
    }

    /// Status, field and message of a refusal.
    pub async fn refused(&self, path: &str, body: Value) -> (u16, String, String) {
        let (status, answer) = self.send(Method::POST, path, &body).await;
        assert_ne!(status, 200, "{path} {body}: {answer}");
        let text = |key: &str| answer["error"][key].as_str().unwrap_or("").to_string();
        (status, text("param"), text("message"))
    }

    pub async fn greedy(&self) -> Vec<u64> {
        let answer = self.post("/v1/completions", completion(40)).await;
        token_ids(&answer)
    }
}

pub fn completion(max_tokens: usize) -> Value {
    let prompt: Vec<usize> = (0..40).map(|i| 3 + i * 7 % 150).collect();
    json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
        "return_token_ids": true})
}

pub fn token_ids(answer: &Value) -> Vec<u64> {
    let ids = answer["choices"][0]["token_ids"].as_array();
    let ids = ids.unwrap_or_else(|| panic!("no token ids in {answer}"));
    ids.iter().map(|id| id.as_u64().unwrap()).collect()
}

/// A request with a key.
pub async fn keyed(server: &Server, method: Method, path: &str, key: &str) -> StatusCode {
    let request = server.client.request(method, format!("{}{path}", server.url));
    let request = if key.is_empty() { request } else { request.bearer_auth(key) };
    request.send().await.unwrap().status()
}
