//! What ends a sample, and what is left of its text.

use crate::scripted::Script;
use crate::server::{Server, until, within};
use crate::tokenizer::{BOS, bytes};
use crate::{CHAT, COMPLETIONS};
use onpolicy_plugin_api::RequestId;
use serde_json::{Value, json};

async fn choice(server: &Server, mut body: Value) -> Value {
    body["prompt"] = "a".into();
    server.ok(COMPLETIONS, body).await["choices"][0].take()
}

#[tokio::test]
async fn a_stop_string_over_several_tokens_ends_the_sample() {
    within(async {
        let mut script = Script::saying(|_, _| bytes("one<e two<end> three"));
        script.endless = true;
        let server = Server::start(script).await;
        let body = json!({"stop": "<end>", "max_tokens": 200, "logprobs": 0, "prompt": "a"});
        let answer = server.ok(COMPLETIONS, body.clone()).await;
        let choice = &answer["choices"][0];
        assert_eq!(choice["text"], "one<e two");
        assert_eq!(choice["finish_reason"], "stop");
        assert_eq!(choice["stop_reason"], "<end>");
        assert_eq!(answer["usage"]["completion_tokens"], 14);
        let offsets = choice["logprobs"]["text_offset"].as_array().unwrap();
        assert_eq!(offsets.len(), 14);
        assert_eq!(offsets[8..], [json!(8), 9.into(), 9.into(), 9.into(), 9.into(), 9.into()]);
        until(|| server.seen.aborts.lock().unwrap().contains(&(RequestId(0), Some(0)))).await;
        until(|| server.seen.live.load(std::sync::atomic::Ordering::SeqCst) == 0).await;

        let (chunks, done) = server.stream(COMPLETIONS, body).await;
        assert!(done);
        let texts: Vec<&str> =
            chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
        assert_eq!(texts.concat(), "one<e two");
        assert!(texts.iter().all(|text| !text.ends_with('<')), "{texts:?}");
        let last = &chunks.last().unwrap()["choices"][0];
        assert_eq!(
            (&last["finish_reason"], &last["stop_reason"]),
            (&json!("stop"), &json!("<end>"))
        );
    })
    .await;
}

#[tokio::test]
async fn only_the_sample_that_stops_is_aborted() {
    within(async {
        let script =
            Script::saying(|_, index| bytes(if index == 1 { "aSTOPb" } else { "abcdefgh" }));
        let server = Server::start(script).await;
        let answer = server.ok(COMPLETIONS, json!({"prompt": "a", "stop": ["STOP"], "n": 3})).await;
        let texts: Vec<&Value> =
            answer["choices"].as_array().unwrap().iter().map(|c| &c["text"]).collect();
        assert_eq!(texts, ["abcdefgh", "a", "abcdefgh"]);
        let aborts: Vec<_> = server.seen.aborts.lock().unwrap().iter().copied().collect();
        assert_eq!(aborts, [(RequestId(0), Some(1))]);
        assert_eq!(answer["usage"]["completion_tokens"], 9 + 5 + 9);
    })
    .await;
}

#[tokio::test]
async fn the_stop_string_can_be_kept() {
    within(async {
        let server = Server::start(Script::saying(|_, _| bytes("a.b.c"))).await;
        let got = choice(&server, json!({"stop": ".", "include_stop_str_in_output": true})).await;
        assert_eq!(got["text"], "a.");
        let got = choice(&server, json!({"stop": [".c", "b"]})).await;
        assert_eq!((&got["text"], &got["stop_reason"]), (&json!("a."), &json!("b")));
        let got = choice(&server, json!({"stop": ".", "min_tokens": 3})).await;
        assert_eq!(got["text"], "a.b");
        let got = choice(&server, json!({"stop": "c!", "max_tokens": 5})).await;
        assert_eq!((&got["text"], &got["finish_reason"]), (&json!("a.b.c"), &json!("length")));
    })
    .await;
}

#[tokio::test]
async fn stop_tokens_end_a_sample_without_their_text() {
    within(async {
        let server = Server::start(Script::saying(|_, _| bytes("ab.c"))).await;
        let dot = bytes(".")[0];
        let got = choice(&server, json!({"stop_token_ids": [dot], "return_token_ids": true})).await;
        assert_eq!(got["text"], "ab");
        assert_eq!((&got["finish_reason"], &got["stop_reason"]), (&json!("stop"), &json!(dot)));
        assert_eq!(got["token_ids"], json!(bytes("ab.")));
        let body = json!({"stop_token_ids": [dot], "include_stop_str_in_output": true});
        assert_eq!(choice(&server, body).await["text"], "ab.");
        let got = choice(&server, json!({"stop_token_ids": [1]})).await;
        assert_eq!((&got["text"], &got["stop_reason"]), (&json!("ab.c"), &Value::Null));
    })
    .await;
}

#[tokio::test]
async fn characters_are_never_torn() {
    within(async {
        let server = Server::start(Script::saying(|_, _| bytes("a€😀b"))).await;
        let body = json!({"prompt": "a", "logprobs": 0});
        let (chunks, _) = server.stream(COMPLETIONS, body).await;
        let chunks: Vec<(&str, usize)> = chunks
            .iter()
            .map(|chunk| &chunk["choices"][0])
            .filter(|choice| choice["finish_reason"].is_null())
            .map(|c| {
                (c["text"].as_str().unwrap(), c["logprobs"]["tokens"].as_array().unwrap().len())
            })
            .collect();
        assert_eq!(chunks, [("a", 1), ("€", 3), ("😀", 4), ("b", 1), ("", 1)]);
        let got = choice(&server, json!({"max_tokens": 3})).await;
        assert_eq!(got["text"], "a\u{fffd}");
    })
    .await;
}

#[tokio::test]
async fn text_before_a_special_token_is_not_lost() {
    within(async {
        let server =
            Server::start(Script::saying(|_, _| [bytes("a<"), vec![BOS], bytes("b")].concat()))
                .await;
        let messages = json!([{"role": "user", "content": "a"}]);
        let body = json!({"messages": messages, "stop": "<x"});
        let answer = server.ok(CHAT, body.clone()).await;
        assert_eq!(answer["choices"][0]["message"]["content"], "a<b");
        let (chunks, _) = server.stream(CHAT, body).await;
        let text: String =
            chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
        assert_eq!(text, "a<b");
    })
    .await;
}
