//! Clients that go away, and a server that is told to stop.

use crate::scripted::Script;
use crate::server::{GRACE, Server, until, within};
use crate::tokenizer::bytes;
use crate::{CHAT, COMPLETIONS};
use onpolicy_plugin_api::RequestId;
use serde_json::json;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

/// Goes on for longer than any test.
fn endless() -> Script {
    let mut script = Script::saying(|_, _| bytes("abc"));
    script.endless = true;
    script.pause = Duration::from_millis(200);
    script
}

#[tokio::test]
async fn leaving_a_stream_aborts_the_request() {
    within(async {
        let server = Server::start(endless()).await;
        let body = json!({"messages": [{"role": "user", "content": "a"}], "stream": true, "n": 4});
        let mut response = server.send(CHAT, &body).await;
        response.chunk().await.unwrap().unwrap();
        assert_eq!(server.seen.live.load(SeqCst), 1);
        drop(response);
        until(|| server.seen.aborts.lock().unwrap().contains(&(RequestId(0), None))).await;
        until(|| server.seen.live.load(SeqCst) == 0).await;
        assert_eq!(server.seen.unheard.load(SeqCst), 1);
    })
    .await;
}

#[tokio::test]
async fn leaving_a_whole_answer_aborts_the_request() {
    within(async {
        let server = Server::start(endless()).await;
        let body = json!({"prompt": ["a", "b"], "max_tokens": 200});
        let request = server.send(COMPLETIONS, &body);
        tokio::select! {
            _ = request => panic!("the engine does not end by itself"),
            () = until(|| server.seen.live.load(SeqCst) == 2) => {}
        }
        let both = [(RequestId(0), None), (RequestId(1), None)];
        until(|| both.iter().all(|abort| server.seen.aborts.lock().unwrap().contains(abort))).await;
        until(|| server.seen.live.load(SeqCst) == 0).await;
    })
    .await;
}

#[tokio::test]
async fn a_request_that_is_over_is_not_aborted() {
    within(async {
        let server = Server::start(Script::saying(|_, _| bytes("ok"))).await;
        server.ok(COMPLETIONS, json!({"prompt": "a", "n": 2})).await;
        let (_, done) = server.stream(COMPLETIONS, json!({"prompt": "a"})).await;
        assert!(done);
        assert!(server.seen.aborts.lock().unwrap().is_empty());
    })
    .await;
}

#[tokio::test]
async fn running_requests_finish_after_the_signal_to_stop() {
    within(async {
        let mut script = Script::saying(|_, _| bytes("abc"));
        script.pause = Duration::from_millis(50);
        let Server { url, client, stop, stopped, seen } = Server::start(script).await;
        let body = json!({"prompt": "a"});
        let send = client.post(url.clone() + COMPLETIONS).json(&body).send();
        let stopping = async {
            until(|| seen.live.load(SeqCst) == 1).await;
            stop.send(()).unwrap();
        };
        let (response, ()) = tokio::join!(send, stopping);
        let answer: serde_json::Value = response.unwrap().json().await.unwrap();
        assert_eq!(answer["choices"][0]["text"], "abc");
        stopped.await.unwrap().unwrap();
        assert!(client.get(url + "/health").send().await.is_err());
    })
    .await;
}

#[tokio::test]
async fn requests_that_do_not_end_are_cut_off_after_the_grace_time() {
    within(async {
        let server = Server::start(endless()).await;
        let body = json!({"prompt": "a", "stream": true, "max_tokens": 250});
        let mut response = server.send(COMPLETIONS, &body).await;
        response.chunk().await.unwrap().unwrap();
        let start = std::time::Instant::now();
        server.stop.send(()).unwrap();
        server.stopped.await.unwrap().unwrap();
        assert!((GRACE..GRACE * 5).contains(&start.elapsed()), "{:?}", start.elapsed());
    })
    .await;
}
