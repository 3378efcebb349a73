//! A server that is told to stop: every request ends, and is told how.

use crate::scripted::Script;
use crate::server::{GRACE, Server, until, within};
use crate::tokenizer::bytes;
use crate::{CHAT, COMPLETIONS};
use serde_json::{Value, json};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;

/// Goes on for longer than any test.
fn endless() -> Script {
    let mut script = Script::saying(|_, _| bytes("abc"));
    script.endless = true;
    script.pause = Duration::from_millis(100);
    script
}

fn shutting_down() -> Value {
    json!({"error": {
        "message": "the server is shutting down; send the request again later",
        "type": "service_unavailable_error", "param": null, "code": "shutting_down",
    }})
}

#[tokio::test]
async fn a_stream_that_is_cut_off_ends_with_an_error_event() {
    within(async {
        let server = Server::start(endless()).await;
        let body = json!({"messages": [{"role": "user", "content": "a"}], "stream": true});
        let mut response = server.send(CHAT, &body).await;
        let mut text = response.chunk().await.unwrap().unwrap().to_vec();
        let start = Instant::now();
        server.stop.send(()).unwrap();
        while let Some(chunk) = response.chunk().await.expect("the stream ends in order") {
            text.extend_from_slice(&chunk);
        }
        assert!(start.elapsed() >= GRACE);
        let text = String::from_utf8(text).unwrap();
        let last = text.lines().filter_map(|line| line.strip_prefix("data: ")).next_back();
        let last: Value = serde_json::from_str(last.unwrap()).unwrap();
        assert_eq!(last, shutting_down());
        server.stopped.await.unwrap().unwrap();
        until(|| server.seen.live.load(SeqCst) == 0).await;
    })
    .await;
}

#[tokio::test]
async fn a_whole_answer_that_is_cut_off_is_a_503() {
    within(async {
        let server = Server::start(endless()).await;
        let body = json!({"prompt": "a", "max_tokens": 250});
        let send = server.client.post(server.url.clone() + COMPLETIONS).json(&body).send();
        let stop = server.stop;
        let stopping = async {
            until(|| server.seen.live.load(SeqCst) == 1).await;
            stop.send(()).unwrap();
        };
        let (response, ()) = tokio::join!(send, stopping);
        let response = response.expect("an answer, not a dead socket");
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()["retry-after"], "1");
        assert_eq!(response.json::<Value>().await.unwrap(), shutting_down());
        server.stopped.await.unwrap().unwrap();
        until(|| server.seen.live.load(SeqCst) == 0).await;
    })
    .await;
}

#[tokio::test]
async fn idle_connections_do_not_hold_it_up() {
    within(async {
        let server = Server::start(endless()).await;
        let address = server.url.trim_start_matches("http://").to_string();
        let mut idle = Vec::new();
        for _ in 0..20 {
            idle.push(TcpStream::connect(&address).await.unwrap());
        }
        // One that is kept alive after an answer.
        server.get("/health").await;
        let start = Instant::now();
        server.stop.send(()).unwrap();
        server.stopped.await.unwrap().unwrap();
        assert!(start.elapsed() < GRACE, "{:?}", start.elapsed());
        assert!(TcpStream::connect(&address).await.is_err(), "it takes no connection any more");
    })
    .await;
}
