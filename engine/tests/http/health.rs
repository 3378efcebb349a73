//! Whether the server serves, and how much.

use crate::COMPLETIONS;
use crate::scripted::Script;
use crate::server::{Server, until, within};
use crate::tokenizer::bytes;
use onpolicy_engine::http::Limits;
use onpolicy_plugin_api::EngineError;
use serde_json::json;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

fn ok() -> Script {
    Script::saying(|_, _| bytes("ok"))
}

#[tokio::test]
async fn a_server_whose_engine_runs_is_healthy() {
    within(async {
        let server = Server::start(ok()).await;
        for path in ["/health", "/health/", "/ping", "/health_generate"] {
            let (status, answer) = server.get(path).await;
            assert_eq!((status.as_u16(), answer), (200, json!({"status": "ok"})), "{path}");
        }
        assert_eq!(server.send("/ping", &json!({})).await.status(), 200);
        let seen = server.seen.requests.lock().unwrap();
        assert_eq!((seen.len(), seen[0].params.max_tokens), (1, 1));
    })
    .await;
}

#[tokio::test]
async fn a_server_whose_engine_has_stopped_is_not() {
    within(async {
        let refuses = Some((0, EngineError::Stopped));
        let server = Server::start(Script { refuses, ..ok() }).await;
        for path in ["/health", "/health/", "/ping", "/health_generate"] {
            let (status, answer) = server.get(path).await;
            assert_eq!(status, 503, "{path}");
            assert_eq!(answer["error"]["type"], "service_unavailable_error", "{path}");
        }
        assert_eq!(server.get("/version").await.0, 200);
    })
    .await;
}

#[tokio::test]
async fn a_token_that_does_not_come_is_not_waited_for() {
    within(async {
        let limits = Limits { health_time: Duration::from_millis(30), ..Limits::default() };
        let pause = Duration::from_millis(300);
        let server = Server::with_limits(Script { pause, ..ok() }, limits).await;
        let (status, answer) = server.get("/health_generate").await;
        assert_eq!(status, 503);
        assert_eq!(answer["error"]["message"], "no token came within 30ms");
        until(|| server.seen.unheard.load(SeqCst) == 1).await;
    })
    .await;
}

#[tokio::test]
async fn an_engine_that_fails_generates_no_health() {
    within(async {
        let server = Server::start(Script { fails_at: Some(0), ..ok() }).await;
        assert_eq!(server.get("/health_generate").await.0, 500);
        assert_eq!(server.get("/health").await.0, 200);
    })
    .await;
}

#[tokio::test]
async fn the_load_is_the_number_of_running_requests() {
    within(async {
        let pause = Duration::from_millis(5);
        let server = Server::start(Script { endless: true, pause, ..ok() }).await;
        assert_eq!(server.get("/load").await.1, json!({"server_load": 0}));
        let body = json!({"prompt": "a", "stream": true, "max_tokens": 250});
        let first = server.send(COMPLETIONS, &body).await;
        let second = server.send(COMPLETIONS, &body).await;
        assert_eq!(server.get("/load").await.1, json!({"server_load": 2}));
        drop((first, second));
        while server.get("/load").await.1 != json!({"server_load": 0}) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}
