//! The command is told to stop while it answers.

mod common;

use common::Served;
use reqwest::Response;
use serde_json::{Value, json};
use std::{path::Path, process::Command, time::Duration};
use tokio::runtime::Runtime;

const LIMIT: Duration = Duration::from_secs(60);

fn serve(arguments: &[&str]) -> Served {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny/llama-tied");
    common::serve(&model, &[&["--set", "engine.kv_memory_mb=64"], arguments].concat())
}

fn terminate(served: &Served) {
    let status = Command::new("kill").args(["-TERM", &served.pid().to_string()]).status();
    assert!(status.expect("kill runs").success());
}

/// A stream that takes a while, after its first chunk.
async fn begin(served: &Served) -> (Response, Vec<u8>) {
    let body = json!({
        "prompt": vec!["t5 t6"; 8], "n": 64, "max_tokens": 200, "ignore_eos": true, "stream": true
    });
    let url = format!("{}/v1/completions", served.url);
    let answer = reqwest::Client::new().post(url).json(&body).send().await;
    let mut answer = answer.expect("an answer");
    let first = answer.chunk().await.expect("no error").expect("a chunk").to_vec();
    (answer, first)
}

/// The events of the whole stream.
async fn finish((mut answer, mut text): (Response, Vec<u8>)) -> Vec<String> {
    while let Some(chunk) = answer.chunk().await.expect("the stream ends in order") {
        text.extend_from_slice(&chunk);
    }
    let text = String::from_utf8(text).expect("UTF-8");
    text.lines().filter_map(|line| line.strip_prefix("data: ")).map(String::from).collect()
}

#[test]
fn requests_that_run_are_finished_first() {
    let patient = ["--set", "server.shutdown_grace_seconds=60"];
    let roomy = ["--set", "server.max_undelivered_tokens=1000000"];
    let mut served = serve(&[patient, roomy].concat());
    let events = Runtime::new().expect("a runtime").block_on(async {
        let stream = begin(&served).await;
        terminate(&served);
        tokio::time::timeout(LIMIT, finish(stream)).await.expect("in time")
    });
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    assert_eq!(served.ended_within(LIMIT), Some(0));
}

#[test]
fn requests_that_take_too_long_are_told_so() {
    let mut served = serve(&["--set", "server.shutdown_grace_seconds=0"]);
    let events = Runtime::new().expect("a runtime").block_on(async {
        let stream = begin(&served).await;
        terminate(&served);
        tokio::time::timeout(LIMIT, finish(stream)).await.expect("in time")
    });
    let last: Value = serde_json::from_str(events.last().expect("an event")).expect("JSON");
    assert_eq!(last["error"]["code"], "shutting_down", "{last}");
    assert_eq!(served.ended_within(LIMIT), Some(0));
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let mut served = serve(&["--set", "server.shutdown_grace_seconds=600"]);
    Runtime::new().expect("a runtime").block_on(async {
        // Nobody reads on, so that the stream cannot be finished.
        let stream = begin(&served).await;
        terminate(&served);
        tokio::time::sleep(Duration::from_millis(300)).await;
        terminate(&served);
        let code = served.ended_within(LIMIT);
        drop(stream);
        assert_eq!(code, Some(130));
    });
}
