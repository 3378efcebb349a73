//! What one request may ask for, and how long it may take.

use crate::scripted::Script;
use crate::server::{Server, until, within};
use crate::tokenizer::bytes;
use crate::{CHAT, COMPLETIONS};
use onpolicy_engine::http::Limits;
use onpolicy_plugin_api::RequestId;
use serde_json::{Value, json};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

fn ok() -> Script {
    Script::saying(|_, _| bytes("ok"))
}

/// Goes on for longer than any test.
fn endless() -> Script {
    Script { endless: true, pause: Duration::from_millis(100), ..ok() }
}

#[tokio::test]
async fn what_all_prompts_ask_for_together_is_bounded() {
    within(async {
        let limits = Limits { prompts: 4, samples: 8, prompt_tokens: 20, ..Limits::default() };
        let server = Server::with_limits(ok(), limits).await;
        let (param, message) =
            server.refused(COMPLETIONS, json!({"prompt": vec!["a"; 5], "n": 1})).await;
        assert_eq!((param.as_str(), message.as_str()), ("prompt", "prompt: must hold 1 to 4 prompts, not 5"));
        let (param, message) =
            server.refused(COMPLETIONS, json!({"prompt": vec!["a"; 3], "n": 3})).await;
        let told = "n: 3 prompts with 3 samples each are 9 samples; one request may ask for 8: send \
            several requests";
        assert_eq!((param.as_str(), message.as_str()), ("n", told));
        // With the token in front of each text: 3 x 7.
        let long = json!({"prompt": vec!["abcdef"; 3]});
        let (param, message) = server.refused(COMPLETIONS, long).await;
        let told = "prompt: the prompts have 21 tokens together; one request may have 20: send \
            several requests";
        assert_eq!((param.as_str(), message.as_str()), ("prompt", told));
        let messages = json!([{"role": "user", "content": "abcdefghij"}]);
        assert_eq!(server.refused(CHAT, json!({"messages": messages})).await.0, "prompt");
        server.ok(COMPLETIONS, json!({"prompt": vec!["a"; 4], "n": 2})).await;
        // What was refused has not reached the engine.
        assert_eq!(server.seen.requests.lock().unwrap().len(), 4);
    })
    .await;
}

#[tokio::test]
async fn a_request_that_takes_too_long_is_stopped_and_told_what_to_do() {
    within(async {
        let limits = Limits { request_time: Some(Duration::from_millis(300)), ..Limits::default() };
        let server = Server::with_limits(endless(), limits).await;
        let start = Instant::now();
        let (status, answer) =
            server.post(COMPLETIONS, json!({"prompt": ["a", "b"], "max_tokens": 250})).await;
        assert!(start.elapsed() >= Duration::from_millis(300));
        let error = json!({"error": {
            "message": "the request did not end within 300ms and was stopped; ask for fewer tokens, \
                samples or prompts at once, or raise server.request_timeout_seconds",
            "type": "timeout_error", "param": null, "code": "request_timeout",
        }});
        assert_eq!((status.as_u16(), answer), (504, error));
        let both = [(RequestId(0), None), (RequestId(1), None)];
        until(|| both.iter().all(|abort| server.seen.aborts.lock().unwrap().contains(abort))).await;
        until(|| server.seen.live.load(SeqCst) == 0).await;
    })
    .await;
}

#[tokio::test]
async fn a_stream_that_takes_too_long_ends_with_an_error() {
    within(async {
        let limits = Limits { request_time: Some(Duration::from_millis(300)), ..Limits::default() };
        let server = Server::with_limits(endless(), limits).await;
        let messages = json!([{"role": "user", "content": "a"}]);
        let (chunks, done) =
            server.stream(CHAT, json!({"messages": messages, "max_tokens": 200})).await;
        assert!(!done && chunks.len() > 1);
        assert_eq!(chunks.last().unwrap()["error"]["code"], "request_timeout");
        let ends: Vec<&Value> =
            chunks.iter().filter(|c| !c["choices"][0]["finish_reason"].is_null()).collect();
        assert!(ends.is_empty(), "{ends:?}");
        until(|| server.seen.live.load(SeqCst) == 0).await;
    })
    .await;
}

#[tokio::test]
async fn a_request_that_ends_in_time_is_left_alone() {
    within(async {
        let limits = Limits { request_time: Some(Duration::from_secs(20)), ..Limits::default() };
        let server = Server::with_limits(ok(), limits).await;
        let answer = server.ok(COMPLETIONS, json!({"prompt": "a"})).await;
        assert_eq!(answer["choices"][0]["text"], "ok");
        assert!(server.seen.aborts.lock().unwrap().is_empty());
    })
    .await;
}
