//! The routes over the native engine: what clients do to it must cost nobody else anything.

mod common;

use common::{engine, tiny};
use futures::StreamExt;
use onpolicy_engine::{
    engine::{EngineConfig, EngineHandle},
    http::{
        self, AppState, Limits,
        metrics::{self, PrometheusHandle},
    },
    kv_cache::KvCache,
};
use reqwest::{Client, Response, StatusCode};
use serde_json::{Value, json};
use std::{sync::Arc, time::Duration};
use tokio::{net::TcpListener, time::timeout};

const LIMIT: Duration = Duration::from_secs(20);

struct Server {
    url: String,
    engine: EngineHandle,
    client: Client,
}

impl Server {
    async fn start(kv_memory: usize, metrics: PrometheusHandle) -> Self {
        let checkpoint = tiny("llama-tied");
        let limits = EngineConfig { kv_memory, max_num_seqs: 64, ..EngineConfig::default() };
        let engine = engine(&checkpoint, limits);
        let served = Arc::new(engine.clone());
        let state = AppState::new(served, checkpoint.tokenizer.clone(), Limits::default(), metrics);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        tokio::spawn(http::run(listener, http::app(state), std::future::pending()));
        Self { url, engine, client: Client::new() }
    }

    async fn complete(&self, body: Value) -> Response {
        let url = format!("{}/v1/completions", self.url);
        let answer = timeout(LIMIT, self.client.post(url).json(&body).send()).await;
        answer.expect("in time").expect("an answer")
    }

    async fn greedy(&self) -> Vec<u64> {
        let body = json!({
            "prompt": [5, 6, 7], "max_tokens": 12, "temperature": 0, "return_token_ids": true,
            "ignore_eos": true
        });
        let answer: Value = self.complete(body).await.json().await.expect("JSON");
        let ids = answer["choices"][0]["token_ids"].as_array().expect("ids");
        ids.iter().map(|id| id.as_u64().expect("an id")).collect()
    }

    async fn wait_until_free(&self) {
        let free = async {
            while self.engine.stats().expect("the engine runs").blocks_used > 0 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(LIMIT, free).await.expect("the blocks come back");
    }
}

/// Starts a stream of `n` long samples and leaves after its first chunk.
async fn leave_in_mid_stream(server: &Server, n: usize) {
    let body = json!({
        "prompt": [9, 10, 11, 12], "n": n, "max_tokens": 240, "stream": true, "ignore_eos": true
    });
    let mut stream = server.complete(body).await.bytes_stream();
    let chunk = timeout(LIMIT, stream.next()).await.expect("in time");
    assert!(chunk.expect("a chunk").expect("no error").starts_with(b"data: "));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_and_lost_clients_cost_nobody_else_anything() {
    let recorder = metrics::install().expect("the only recorder of this process");
    let server = Server::start(8 << 20, recorder.clone()).await;
    let want = server.greedy().await;
    assert_eq!(want.len(), 12);
    let bad = [
        json!({ "prompt": [5], "max_tokens": -1 }),
        json!({ "prompt": [5], "temperature": "hot" }),
        json!({ "prompt": [160] }),
        json!({ "prompt": vec![5; 256] }),
        json!({ "prompt": [5], "n": 65 }),
        json!({ "prompt": "t5 ".repeat(350_000) }),
        json!({ "prompt": [5], "no_such_field": 1 }),
    ];
    for _ in 0..3 {
        for body in &bad {
            let answer = server.complete(body.clone()).await;
            let (status, text) = (answer.status(), answer.text().await.expect("a body"));
            assert_eq!(status, StatusCode::BAD_REQUEST, "{text}");
            let error: Value = serde_json::from_str(&text).expect("JSON");
            assert_eq!(error["error"]["type"], "invalid_request_error", "{text}");
        }
        let lost = (0..6).map(|n| leave_in_mid_stream(&server, n + 1));
        futures::future::join_all(lost).await;
        assert_eq!(server.greedy().await, want);
    }
    server.wait_until_free().await;
    let stats = server.engine.stats().expect("the engine runs");
    assert_eq!((stats.running, stats.waiting), (0, 0));

    let metrics = server.client.get(format!("{}/metrics", server.url)).send().await;
    let metrics = metrics.expect("an answer").text().await.expect("text");
    let value = |name: &str| -> f64 {
        let line = metrics.lines().find(|line| line.split([' ', '{']).next() == Some(name));
        let line = line.unwrap_or_else(|| panic!("no {name} in\n{metrics}"));
        line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
    };
    assert_eq!(value("onpolicy_kv_blocks_used"), 0.0);
    assert_eq!(value("onpolicy_samples_running"), 0.0);
    assert_eq!(value("onpolicy_requests_waiting"), 0.0);
    assert!(value("onpolicy_kv_blocks_total") > 100.0);
    assert_eq!(value("onpolicy_requests_total"), 22.0);
    assert!(value("onpolicy_generated_tokens_total") >= 48.0);
    assert!(value("onpolicy_aborts_total") >= 1.0);
    assert!(value("onpolicy_step_seconds_count") >= 12.0);
    assert_eq!(value("onpolicy_weight_version"), 0.0);
    assert_eq!(value("onpolicy_preemptions_total"), 0.0);
    assert!(value("onpolicy_prefix_cache_query_tokens_total") > 0.0);
    server.engine.update(|| Ok(())).expect("applied");
    let metrics = server.client.get(format!("{}/metrics", server.url)).send().await;
    let metrics = metrics.expect("an answer").text().await.expect("text");
    assert!(metrics.contains("\nonpolicy_weight_version 1\n"), "{metrics}");
    assert!(metrics.contains("onpolicy_weight_update_seconds_count 1"), "{metrics}");
    // Afterwards, because the recorder counts for both.
    what_can_never_fit_the_pool_is_refused_at_once(recorder).await;
}

async fn what_can_never_fit_the_pool_is_refused_at_once(recorder: PrometheusHandle) {
    // Six blocks: 96 tokens, and one more that is not fed back.
    let pool = 6 * KvCache::block_bytes(&tiny("llama-tied").config);
    let server = Server::start(pool, recorder).await;
    let prompt = |len: usize| vec![5; len];
    for (body, field, says) in [
        (json!({ "prompt": prompt(60), "max_tokens": 60 }), "max_tokens", "lower max_tokens to 37"),
        (json!({ "prompt": prompt(120), "max_tokens": 1 }), "prompt", "shorten the prompt"),
        (
            json!({ "prompt": [prompt(3), prompt(60)], "n": 2, "max_tokens": 60 }),
            "max_tokens",
            "lower max_tokens to 37",
        ),
    ] {
        let answer = server.complete(body).await;
        let (status, text) = (answer.status(), answer.text().await.expect("a body"));
        assert_eq!(status, StatusCode::BAD_REQUEST, "{text}");
        let error: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(error["error"]["param"], field, "{text}");
        assert!(error["error"]["message"].as_str().expect("a message").contains(says), "{text}");
    }
    let fits = json!({ "prompt": prompt(60), "max_tokens": 37, "n": 3, "ignore_eos": true });
    let answer: Value = server.complete(fits).await.json().await.expect("JSON");
    assert_eq!(answer["usage"]["completion_tokens"], 3 * 37, "{answer}");
    server.wait_until_free().await;
}
