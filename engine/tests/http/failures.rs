//! Bad requests, overload and a failing engine: the right status, and the server goes on.

use crate::scripted::{MAX_MODEL_LEN, Script};
use crate::server::{Server, until, within};
use crate::tokenizer::bytes;
use crate::{CHAT, COMPLETIONS};
use onpolicy_engine::http::Limits;
use onpolicy_plugin_api::{EngineError, RequestId};
use reqwest::StatusCode;
use serde_json::{Value, json};
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

fn ok() -> Script {
    Script::saying(|_, _| bytes("ok"))
}

async fn raw(server: &Server, kind: &str, body: impl Into<reqwest::Body>) -> (StatusCode, Value) {
    let request = server.client.post(server.url.clone() + COMPLETIONS).header("content-type", kind);
    let response = request.body(body).send().await.unwrap();
    (response.status(), response.json().await.unwrap())
}

#[tokio::test]
async fn bad_bodies_are_refused() {
    within(async {
        let server = Server::start(ok()).await;
        let json = "application/json";
        let bodies = [
            "",
            "{",
            "nonsense",
            "[]",
            "5",
            "{\"prompt\": \"a\", \"temperature\": NaN}",
            "{\"prompt\": \"a\", \"temperature\": 1e999}",
            "{\"prompt\": \"\\ud800\"}",
        ];
        for body in bodies {
            let (status, answer) = raw(&server, json, body).await;
            assert_eq!(status, 400, "{body} {answer}");
            assert_eq!(answer["error"]["type"], "invalid_request_error", "{body}");
        }
        let (status, answer) = raw(&server, json, vec![b'"', 0xff, b'"']).await;
        assert_eq!((status.as_u16(), &answer["error"]["code"]), (400, &json!("invalid_json")));
        let deep = format!("{{\"prompt\": {}", "[".repeat(100_000));
        assert_eq!(raw(&server, json, deep).await.0, 400);
        let (status, answer) = raw(&server, "text/plain", "{\"prompt\": \"a\"}").await;
        assert_eq!(status, 415);
        assert!(answer["error"]["message"].as_str().unwrap().contains("application/json"));
        let utf8 = "application/json; charset=utf-8";
        assert_eq!(raw(&server, utf8, "{\"prompt\": \"a\"}").await.0, 200);
    })
    .await;
}

#[tokio::test]
async fn unknown_routes_and_methods_are_told() {
    within(async {
        let server = Server::start(ok()).await;
        let (status, answer) = server.get("/v1/nothing").await;
        assert_eq!((status.as_u16(), &answer["error"]["code"]), (404, &json!("unknown_url")));
        let (status, answer) = server.get(CHAT).await;
        assert_eq!(
            (status.as_u16(), &answer["error"]["code"]),
            (405, &json!("method_not_allowed"))
        );
    })
    .await;
}

#[tokio::test]
async fn prompts_that_do_not_fit_are_refused_with_the_numbers() {
    within(async {
        let server = Server::start(ok()).await;
        let (status, answer) =
            server.post(COMPLETIONS, json!({"prompt": "abc", "max_tokens": 253})).await;
        assert_eq!(status, 400);
        let error = json!({"error": {
            "message": "the model's context is 256 tokens, but the prompt has 4 and 253 more were \
                asked for; shorten the prompt or lower max_tokens",
            "type": "invalid_request_error", "param": "max_tokens",
            "code": "context_length_exceeded",
        }});
        assert_eq!(answer, error);
        server.ok(COMPLETIONS, json!({"prompt": "abc", "max_tokens": 252})).await;
        let full = vec![99; MAX_MODEL_LEN];
        let (status, answer) = server.post(COMPLETIONS, json!({"prompt": full})).await;
        assert_eq!((status.as_u16(), &answer["error"]["param"]), (400, &Value::Null));
        let nearly = vec![99; MAX_MODEL_LEN - 1];
        let answer = server.ok(COMPLETIONS, json!({"prompt": nearly})).await;
        assert_eq!(answer["usage"]["completion_tokens"], 1);
        let long = "x ".repeat(500_000);
        for (path, body) in [
            (COMPLETIONS, json!({"prompt": long})),
            (CHAT, json!({"messages": [{"role": "user", "content": long}]})),
        ] {
            let (status, answer) = server.post(path, body).await;
            assert_eq!(status, 400);
            assert_eq!(answer["error"]["code"], "context_length_exceeded");
        }
        server.ok(COMPLETIONS, json!({"prompt": "a"})).await;
    })
    .await;
}

#[tokio::test]
async fn bodies_over_the_limit_are_refused() {
    within(async {
        let limits = Limits { body_bytes: 1000, ..Limits::default() };
        let server = Server::with_limits(ok(), limits).await;
        for path in [COMPLETIONS, CHAT, "/tokenize"] {
            let (status, answer) = server.post(path, json!({"prompt": "a".repeat(1000)})).await;
            assert_eq!(status, 413, "{answer}");
            let message = answer["error"]["message"].as_str().unwrap();
            assert_eq!(message, "the body is longer than 1000 bytes; send less");
        }
    })
    .await;
}

#[tokio::test]
async fn a_body_that_does_not_come_is_given_up() {
    within(async {
        let limits = Limits { body_time: Duration::from_millis(50), ..Limits::default() };
        let server = Server::with_limits(ok(), limits).await;
        let never = futures::stream::pending::<Result<Vec<u8>, std::io::Error>>();
        let (status, _) = raw(&server, "application/json", reqwest::Body::wrap_stream(never)).await;
        assert_eq!(status, 408);
    })
    .await;
}

#[tokio::test]
async fn refusals_of_the_engine_have_their_status() {
    within(async {
        let cases = [
            (EngineError::Overloaded { waiting: 9 }, 429, "rate_limit_error"),
            (EngineError::Stopped, 503, "service_unavailable_error"),
            (EngineError::Internal("broken".into()), 500, "internal_server_error"),
            (EngineError::invalid("top_p", "is odd"), 400, "invalid_request_error"),
            (EngineError::Unsupported("that".into()), 400, "invalid_request_error"),
        ];
        for (error, expected, kind) in cases {
            let server = Server::start(Script { refuses: Some((0, error.clone())), ..ok() }).await;
            for stream in [false, true] {
                let body = json!({"prompt": "a", "stream": stream});
                let response = server.send(COMPLETIONS, &body).await;
                assert_eq!(response.status().as_u16(), expected);
                let retry = response.headers().get("retry-after").is_some();
                assert_eq!(retry, expected == 429 || expected == 503);
                let answer: Value = response.json().await.unwrap();
                assert_eq!(answer["error"]["type"], kind);
                assert_eq!(answer["error"]["message"], error.to_string());
            }
        }
    })
    .await;
}

#[tokio::test]
async fn more_requests_than_places_are_told_to_wait() {
    within(async {
        let mut script = ok();
        script.endless = true;
        script.pause = Duration::from_millis(5);
        let limits = Limits { concurrent_requests: 2, ..Limits::default() };
        let server = Server::with_limits(script, limits).await;
        let body = json!({"prompt": "a", "stream": true, "max_tokens": 250});
        let first = server.send(COMPLETIONS, &body).await;
        let second = server.send(COMPLETIONS, &body).await;
        let third = server.send(COMPLETIONS, &body).await;
        assert_eq!(third.status(), 429);
        assert_eq!(third.headers()["retry-after"], "1");
        assert_eq!(server.get("/health").await.0, 200);
        drop((first, second));
        let once = json!({"prompt": "a", "max_tokens": 1});
        while server.send(COMPLETIONS, &once).await.status() == 429 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(server.send(COMPLETIONS, &once).await.status(), 200);
    })
    .await;
}

#[tokio::test]
async fn an_engine_that_fails_half_way() {
    within(async {
        let script = Script { fails_at: Some(2), ..Script::saying(|_, _| bytes("abcdef")) };
        let server = Server::start(script).await;
        let (status, answer) = server.post(COMPLETIONS, json!({"prompt": "a"})).await;
        assert_eq!(status, 500);
        assert_eq!(answer["error"]["message"], "engine failure: the script says so");
        let (chunks, done) = server.stream(COMPLETIONS, json!({"prompt": "a"})).await;
        assert!(!done, "a failed stream must not look complete");
        assert_eq!(chunks[0]["choices"][0]["text"], "a");
        assert_eq!(chunks[1]["choices"][0]["text"], "b");
        assert_eq!(chunks[2]["error"]["type"], "internal_server_error");
        assert_eq!(chunks.len(), 3);
        until(|| server.seen.live.load(SeqCst) == 0).await;
    })
    .await;
}

#[tokio::test]
async fn an_engine_that_falls_silent_is_an_error() {
    within(async {
        let server = Server::start(Script::saying(|_, _| panic!("the engine's thread dies"))).await;
        let (status, answer) = server.post(COMPLETIONS, json!({"prompt": "a"})).await;
        assert_eq!(status, 500);
        assert_eq!(answer["error"]["message"], "the engine dropped the request");
    })
    .await;
}

#[tokio::test]
async fn a_later_prompt_that_is_refused_stops_the_earlier_ones() {
    within(async {
        let refuses = Some((1, EngineError::Overloaded { waiting: 1 }));
        let pause = Duration::from_millis(20);
        let server = Server::start(Script { endless: true, pause, refuses, ..ok() }).await;
        let (status, _) = server.post(COMPLETIONS, json!({"prompt": ["a", "b", "c"]})).await;
        assert_eq!(status, 429);
        let aborts: Vec<_> = server.seen.aborts.lock().unwrap().iter().copied().collect();
        assert_eq!(aborts, [(RequestId(0), None)]);
        until(|| server.seen.live.load(SeqCst) == 0).await;
    })
    .await;
}

#[tokio::test]
async fn a_panic_is_answered() {
    within(async {
        let server = Server::start(Script { panics: true, ..ok() }).await;
        let message = "the server failed on this request; see its log";
        for (status, answer) in
            [server.get("/version").await, server.post(COMPLETIONS, json!({"prompt": "a"})).await]
        {
            assert_eq!((status.as_u16(), &answer["error"]["message"]), (500, &json!(message)));
        }
        assert_eq!(server.get("/health").await.0, 200);
    })
    .await;
}
