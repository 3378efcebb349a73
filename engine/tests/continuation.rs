//! Tokens that the server returned go on as they are, on every route that takes token ids: a
//! second turn whose prompt is the first turn's prompt and tokens finds their KV, and says what one
//! long answer says.

mod common;

use common::{engine, ids, tiny};
use onpolicy_engine::{
    engine::{EngineConfig, EngineHandle},
    http::{self, AppState, Limits, metrics},
};
use reqwest::Client;
use serde_json::{Value, json};
use std::{sync::Arc, time::Duration};
use tokio::{net::TcpListener, time::timeout};

const LIMIT: Duration = Duration::from_secs(30);
const PROMPT: usize = 20;
const FIRST: usize = 17;
const WHOLE: usize = 40;
/// Tokens of a block of KV.
const BLOCK: usize = 16;

/// A route, and how it is asked and answers.
struct Route {
    path: &'static str,
    body: fn(&[u32], usize) -> Value,
    tokens: &'static str,
}

const ROUTES: [Route; 4] = [
    Route {
        path: "/inference/v1/generate",
        body: |prompt, count| {
            let sampling = json!({"max_tokens": count, "temperature": 0, "ignore_eos": true});
            json!({"token_ids": prompt, "sampling_params": sampling})
        },
        tokens: "/choices/0/token_ids",
    },
    Route {
        path: "/generate",
        body: |prompt, count| {
            let sampling = json!({"max_new_tokens": count, "temperature": 0, "ignore_eos": true});
            json!({"input_ids": prompt, "sampling_params": sampling})
        },
        tokens: "/output_ids",
    },
    Route {
        path: "/generate/",
        body: |prompt, count| {
            let kwargs = json!({"ignore_eos": true});
            json!({"prompts": [prompt], "max_tokens": count, "temperature": 0,
                "generation_kwargs": kwargs})
        },
        tokens: "/completion_ids/0",
    },
    Route {
        path: "/v1/completions",
        body: |prompt, count| {
            json!({"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": true,
                "return_token_ids": true})
        },
        tokens: "/choices/0/token_ids",
    },
];

struct Server {
    url: String,
    engine: EngineHandle,
    client: Client,
}

impl Server {
    async fn start() -> Self {
        let checkpoint = tiny("llama-tied");
        let limits = EngineConfig { kv_memory: 8 << 20, ..EngineConfig::default() };
        let engine = engine(&checkpoint, limits);
        let metrics = metrics::install().expect("the only recorder of this process");
        let served = Arc::new(engine.clone());
        let state = AppState::new(served, checkpoint.tokenizer, Limits::default(), metrics);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        tokio::spawn(http::run(listener, http::app(state), std::future::pending()));
        Self { url, engine, client: Client::new() }
    }

    async fn tokens(&self, route: &Route, prompt: &[u32], count: usize) -> Vec<u32> {
        let request = self.client.post(format!("{}{}", self.url, route.path));
        let answer = request.json(&(route.body)(prompt, count)).send();
        let answer = timeout(LIMIT, answer).await.expect("in time").expect("an answer");
        let answer: Value = answer.json().await.expect("JSON");
        let tokens = answer.pointer(route.tokens);
        ids(tokens.unwrap_or_else(|| panic!("no {} in {answer}", route.tokens)))
    }

    fn hits(&self) -> usize {
        self.engine.stats().expect("the engine runs").prefix_hits as usize
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_turns_are_one() {
    let server = Server::start().await;
    for (number, route) in ROUTES.iter().enumerate() {
        let prompt: Vec<u32> =
            (0..PROMPT).map(|i| (5 + 31 * number + 7 * i) as u32 % 150).collect();
        let first = server.tokens(route, &prompt, FIRST).await;
        assert_eq!(first.len(), FIRST, "{}", route.path);
        let before = server.hits();
        let longer = [&prompt[..], &first[..]].concat();
        let second = server.tokens(route, &longer, WHOLE - FIRST).await;
        let found = server.hits() - before;
        // The last token of the first turn was drawn and never read.
        assert_eq!(found, (PROMPT + FIRST - 1) / BLOCK * BLOCK, "{}", route.path);
        let whole = server.tokens(route, &prompt, WHOLE).await;
        assert_eq!([first, second].concat(), whole, "{}", route.path);
    }
}
