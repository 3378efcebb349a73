//! The routes over a GGUF file that mistral.rs serves.

use crate::support::tiny_dir;
use onpolicy_engine::{
    http::{self, AppState, Limits, metrics},
    mistral::{Options, Served, start},
};
use reqwest::{Client, Response, StatusCode};
use serde_json::{Value, json};
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::net::TcpListener;

struct Server {
    url: String,
    client: Client,
}

/// Serves until the test's runtime ends.
async fn serve(spec: PathBuf) -> Server {
    static METRICS: std::sync::OnceLock<metrics_exporter_prometheus::PrometheusHandle> =
        std::sync::OnceLock::new();
    let handle = METRICS.get_or_init(|| metrics::install().expect("one recorder")).clone();
    let loaded = tokio::task::spawn_blocking(move || {
        start(spec.to_str().expect("UTF-8 path"), Options::default())
    });
    let Served { engine, tokenizer } = loaded.await.expect("no panic").expect("the model loads");
    let state = AppState::new(Arc::new(engine), tokenizer, Limits::default(), handle);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    tokio::spawn(http::run(listener, http::app(state), std::future::pending()));
    let client = Client::builder().timeout(Duration::from_secs(120)).build().expect("a client");
    Server { url, client }
}

impl Server {
    async fn send(&self, path: &str, body: Value) -> Response {
        let url = format!("{}{path}", self.url);
        self.client.post(url).json(&body).send().await.expect("an answer")
    }

    async fn ok(&self, path: &str, body: Value) -> Value {
        let response = self.send(path, body).await;
        let status = response.status();
        let answer: Value = response.json().await.expect("JSON");
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer
    }
}

fn smollm2_file() -> PathBuf {
    let cache = std::env::var("ONPOLICY_CACHE").map(PathBuf::from).unwrap_or_else(|_| {
        PathBuf::from(std::env::var("HOME").expect("HOME is set")).join(".cache/onpolicy")
    });
    cache.join("models/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chat_over_a_quantised_file() {
    let server = serve(smollm2_file()).await;
    let body = json!({
        "messages": [{ "role": "user", "content": "What is 2+2? Answer with one number." }],
        "max_tokens": 12, "temperature": 0, "n": 2, "logprobs": true, "top_logprobs": 3
    });
    let answer = server.ok("/v1/chat/completions", body.clone()).await;
    let choices = answer["choices"].as_array().expect("choices");
    assert_eq!(choices.len(), 2);
    let text = choices[0]["message"]["content"].as_str().expect("text");
    assert!(text.contains('4'), "{text:?}");
    let content = choices[0]["logprobs"]["content"].as_array().expect("log-probs");
    assert_eq!(content[0]["top_logprobs"].as_array().expect("three").len(), 3);
    assert_eq!(content[0]["logprob"], content[0]["top_logprobs"][0]["logprob"]);
    let entropy = &choices[0]["policy"]["entropy"];
    assert_eq!(entropy.as_array().expect("numbers").len(), content.len());
    assert!(entropy[0].as_f64().is_some_and(|entropy| entropy > 0.0));
    let mut streamed = body;
    streamed["stream"] = true.into();
    streamed["n"] = 1.into();
    let stream = server.send("/v1/chat/completions", streamed).await.text().await.expect("text");
    let events: Vec<&str> = stream.lines().filter_map(|l| l.strip_prefix("data: ")).collect();
    assert_eq!(events.last(), Some(&"[DONE]"));
    let delta = |event: &&str| {
        let event: Value = serde_json::from_str(event).expect("JSON");
        event["choices"][0]["delta"]["content"].as_str().map(str::to_string)
    };
    let pieces: Vec<String> = events[..events.len() - 1].iter().filter_map(delta).collect();
    assert_eq!(pieces.concat(), text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn completions_over_a_directory() {
    let server = serve(tiny_dir("llama-tied")).await;
    let body = json!({
        "prompt": [[5, 6, 7], [8, 9]], "n": 3, "max_tokens": 10, "seed": 3, "ignore_eos": true,
        "logprobs": 2, "return_token_ids": true
    });
    let answer = server.ok("/v1/completions", body.clone()).await;
    let choices = answer["choices"].as_array().expect("choices");
    assert_eq!(choices.len(), 6);
    for choice in choices {
        assert_eq!(choice["token_ids"].as_array().expect("ids").len(), 10);
        assert_eq!(choice["finish_reason"], "length");
        assert_eq!(choice["logprobs"]["token_logprobs"].as_array().expect("numbers").len(), 10);
    }
    assert_eq!(answer["usage"]["completion_tokens"], 60);
    let again = server.ok("/v1/completions", body).await;
    for (one, other) in choices.iter().zip(again["choices"].as_array().expect("choices")) {
        assert_eq!(one["token_ids"], other["token_ids"], "one seed, one answer");
    }
    let echo = json!({ "prompt": "a", "echo": true, "logprobs": 1, "max_tokens": 1 });
    let refused = server.send("/v1/completions", echo).await;
    assert_eq!(refused.status(), StatusCode::BAD_REQUEST);
    let error: Value = refused.json().await.expect("JSON");
    assert_eq!(error["error"]["param"], "prompt_logprobs", "{error}");
    let models: Value = server
        .client
        .get(format!("{}/v1/models", server.url))
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(models["data"][0]["id"], "llama-tied", "{models}");
}
