//! A bf16 model over HTTP: what the routes say is what the engine says.

use crate::common::tiny_in;
use crate::support::{request, run, sampled, start, tokens};
use onpolicy_engine::http::{self, AppState, Limits, metrics};
use serde_json::{Value, json};
use std::{sync::Arc, time::Duration};
use tch::Kind;
use tokio::{net::TcpListener, time::timeout};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn completions_of_a_bf16_model() {
    let checkpoint = tiny_in("llama-tied", Kind::BFloat16);
    let engine = start(&checkpoint);
    let metrics = metrics::install().expect("the only recorder of this process");
    let served = Arc::new(engine.clone());
    let state = AppState::new(served, checkpoint.tokenizer, Limits::default(), metrics);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/v1/completions", listener.local_addr().expect("an address"));
    tokio::spawn(http::run(listener, http::app(state), std::future::pending()));
    let same = request(1, 20, sampled(2, 12, 3));
    let body = json!({
        "prompt": same.prompt, "n": 2, "max_tokens": 12, "seed": 3, "temperature": 1.0,
        "ignore_eos": true, "return_token_ids": true, "logprobs": 2
    });
    let answer = reqwest::Client::new().post(url).json(&body).send();
    let answer =
        timeout(Duration::from_secs(30), answer).await.expect("in time").expect("an answer");
    let answer: Value = answer.json().await.expect("JSON");
    let choices = answer["choices"].as_array().expect("choices");
    let ids: Vec<Vec<u32>> =
        choices.iter().map(|choice| crate::common::ids(&choice["token_ids"])).collect();
    let group = tokio::task::spawn_blocking(move || run(&engine, vec![same]).remove(0)).await;
    let group = group.expect("no panic");
    assert_eq!(ids, tokens(&group));
    for (choice, sample) in choices.iter().zip(&group.samples) {
        let said = crate::common::floats(&choice["logprobs"]["token_logprobs"]);
        let want: Vec<f32> = sample.tokens.iter().map(|token| token.stats.logprob).collect();
        // The route asks for the likeliest tokens, so its rows are summed up on the host.
        crate::common::assert_close(&said, &want, 1e-3, "log-probs");
    }
}
