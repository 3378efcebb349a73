//! Peers that are slow: in sending headers or a body, in reading, or in saying anything at all.

use crate::COMPLETIONS;
use crate::scripted::Script;
use crate::server::{Server, until, within};
use crate::tokenizer::bytes;
use onpolicy_engine::http::Limits;
use onpolicy_engine::http::connections::ConnectionLimits;
use serde_json::{Value, json};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn ok() -> Script {
    Script::saying(|_, _| bytes("ok"))
}

/// Says more than any socket holds, as fast as it can.
fn torrent() -> Script {
    Script { endless: true, ..ok() }
}

fn patience(milliseconds: u64) -> ConnectionLimits {
    let time = Duration::from_millis(milliseconds);
    ConnectionLimits { header_time: time, write_time: time, ..ConnectionLimits::default() }
}

async fn connect(server: &Server) -> TcpStream {
    TcpStream::connect(server.url.trim_start_matches("http://")).await.unwrap()
}

/// What comes until the server closes.
async fn rest(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    let _ = stream.read_to_end(&mut text).await;
    String::from_utf8_lossy(&text).into_owned()
}

fn head(length: usize) -> String {
    format!(
        "POST {COMPLETIONS} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n"
    )
}

#[tokio::test]
async fn connections_that_say_nothing_are_closed_and_cost_no_one_anything() {
    within(async {
        let server = Server::with_connections(ok(), Limits::default(), patience(300)).await;
        let start = Instant::now();
        let mut silent = Vec::new();
        for number in 0..100 {
            let mut stream = connect(&server).await;
            if number % 2 == 0 {
                stream.write_all(b"POST /v1/completions HTTP/1.1\r\nhost:").await.unwrap();
            }
            silent.push(stream);
        }
        server.ok(COMPLETIONS, json!({"prompt": "a"})).await;
        for mut stream in silent {
            rest(&mut stream).await;
        }
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(300), "{took:?}");
        server.ok(COMPLETIONS, json!({"prompt": "a"})).await;
    })
    .await;
}

#[tokio::test]
async fn one_connection_too_many_waits_until_another_is_closed() {
    within(async {
        let limits = ConnectionLimits { connections: 2, ..ConnectionLimits::default() };
        let server = Server::with_connections(ok(), Limits::default(), limits).await;
        let (first, second) = (connect(&server).await, connect(&server).await);
        let mut third = connect(&server).await;
        third.write_all(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let mut byte = [0];
        let waits = tokio::time::timeout(Duration::from_millis(200), third.read(&mut byte)).await;
        assert!(waits.is_err(), "two connections are open already");
        drop(first);
        assert_eq!(third.read(&mut byte).await.unwrap(), 1);
        drop(second);
    })
    .await;
}

#[tokio::test]
async fn a_body_that_comes_byte_by_byte_is_given_up() {
    within(async {
        let limits = Limits {
            body_time: Duration::from_millis(200),
            concurrent_requests: 1,
            ..Limits::default()
        };
        let server = Server::with_limits(ok(), limits).await;
        let mut stream = connect(&server).await;
        let body = json!({"prompt": "a".repeat(200)}).to_string();
        stream.write_all(head(body.len()).as_bytes()).await.unwrap();
        let (mut reader, mut writer) = stream.split();
        let drip = async {
            for byte in body.bytes() {
                if writer.write_all(&[byte]).await.is_err() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            std::future::pending::<()>().await
        };
        let mut answer = [0; 4096];
        let length = tokio::select! {
            () = drip => 0,
            length = reader.read(&mut answer) => length.unwrap(),
        };
        let answer = String::from_utf8_lossy(&answer[..length]);
        assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
        assert!(answer.contains("\"code\":\"slow_body\""), "{answer}");
        // Its place is free again.
        server.ok(COMPLETIONS, json!({"prompt": "a"})).await;
    })
    .await;
}

#[tokio::test]
async fn a_reader_that_reads_nothing_holds_neither_the_engine_nor_a_place() {
    within(async {
        let limits =
            Limits { concurrent_requests: 1, undelivered_tokens: 200, ..Limits::default() };
        let server = Server::with_connections(torrent(), limits, patience(400)).await;
        let mut stream = connect(&server).await;
        let body = json!({
            "prompt": vec!["a"; 16], "n": 8, "max_tokens": 250, "stream": true, "logprobs": 20,
            "ignore_eos": true
        });
        let body = body.to_string();
        stream.write_all((head(body.len()) + &body).as_bytes()).await.unwrap();
        until(|| server.seen.requests.lock().unwrap().len() == 16).await;
        // The engine is rid of it as soon as too many tokens wait.
        until(|| server.seen.live.load(SeqCst) == 0).await;
        assert!(server.seen.unheard.load(SeqCst) > 0);
        // The place comes back when the connection is given up, at the latest.
        let once = json!({"prompt": "a", "max_tokens": 1});
        while server.send(COMPLETIONS, &once).await.status() == 429 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        server.ok(COMPLETIONS, once).await;
        drop(stream);
    })
    .await;
}

#[tokio::test]
async fn a_stream_whose_reader_lags_ends_with_an_error_that_says_so() {
    within(async {
        // Tokens come faster than one task can write them, which is a slow reader too.
        let limits = Limits { undelivered_tokens: 1, ..Limits::default() };
        let server = Server::with_limits(torrent(), limits).await;
        let body = json!({"prompt": "a", "n": 8, "max_tokens": 250, "ignore_eos": true});
        let (chunks, done) = server.stream(COMPLETIONS, body.clone()).await;
        assert!(!done);
        let error = &chunks.last().unwrap()["error"];
        assert_eq!(
            (&error["type"], &error["code"]),
            (&json!("timeout_error"), &json!("slow_reader"))
        );
        until(|| server.seen.live.load(SeqCst) == 0).await;
        assert_eq!(server.seen.unheard.load(SeqCst), 1);
        // A whole answer has no reader to wait for.
        let answer = server.ok(COMPLETIONS, body).await;
        assert_eq!(answer["usage"]["completion_tokens"], 8 * 250);
    })
    .await;
}

#[tokio::test]
async fn a_whole_answer_that_nobody_reads_is_given_up() {
    within(async {
        let server = Server::with_connections(torrent(), Limits::default(), patience(300)).await;
        let mut stream = connect(&server).await;
        let body = json!({
            "prompt": vec!["a"; 40], "n": 8, "max_tokens": 250, "logprobs": 20, "ignore_eos": true
        });
        let body = body.to_string();
        stream.write_all((head(body.len()) + &body).as_bytes()).await.unwrap();
        stream.readable().await.unwrap();
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let text = rest(&mut stream).await;
        assert!(text.starts_with("HTTP/1.1 200 "), "{}", &text[..text.len().min(200)]);
        let complete = text.split_once("\r\n\r\n").map(|(_, body)| body);
        let parsed = serde_json::from_str::<Value>(complete.unwrap_or_default());
        assert!(parsed.is_err(), "nobody reads an answer of many megabytes from a full socket");
    })
    .await;
}
