//! Streamed answers.

use crate::scripted::{MODEL, Script};
use crate::server::{Server, within};
use crate::tokenizer::bytes;
use crate::{CHAT, COMPLETIONS};
use serde_json::{Value, json};
use std::time::Duration;

fn messages() -> Value {
    json!([{"role": "user", "content": "a"}])
}

#[tokio::test]
async fn chat_chunks_come_in_openais_order() {
    within(async {
        let server = Server::start(Script::saying(|_, _| bytes("ok"))).await;
        let body = json!({
            "messages": messages(), "stream_options": {"include_usage": true}, "request_id": "r",
        });
        let (mut chunks, done) = server.stream(CHAT, body).await;
        assert!(done);
        for chunk in &mut chunks {
            assert!(chunk["created"].take().is_u64());
        }
        let chunk = |choices: Value, usage: Value| {
            json!({
                "id": "chatcmpl-r", "object": "chat.completion.chunk", "created": null,
                "model": MODEL, "weight_version": 7, "choices": choices, "usage": usage,
            })
        };
        let choice = |delta: Value| {
            chunk(
                json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": null,
                "stop_reason": null}]),
                Value::Null,
            )
        };
        let expected = [
            choice(json!({"role": "assistant", "content": ""})),
            choice(json!({"content": "o"})),
            choice(json!({"content": "k"})),
            chunk(
                json!([{"index": 0, "delta": {}, "logprobs": null, "finish_reason": "stop",
                "stop_reason": null, "weight_versions": [7, 7]}]),
                Value::Null,
            ),
            chunk(
                json!([]),
                json!({"prompt_tokens": 19, "completion_tokens": 3, "total_tokens": 22}),
            ),
        ];
        assert_eq!(chunks, expected);
    })
    .await;
}

#[tokio::test]
async fn completion_chunks_carry_logprobs_and_policy() {
    within(async {
        let server = Server::start(Script::saying(|_, _| bytes("ok"))).await;
        let body = json!({"prompt": "a", "logprobs": 1, "return_token_ids": true});
        let whole = server.ok(COMPLETIONS, body.clone()).await["choices"][0].take();
        let (chunks, done) = server.stream(COMPLETIONS, body).await;
        assert!(done && chunks.iter().all(|chunk| chunk.get("usage").is_none()));
        let choices: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]).collect();
        assert_eq!(choices[0]["prompt_token_ids"], whole["prompt_token_ids"]);
        let joined = |pointer: &str| -> Value {
            choices
                .iter()
                .filter_map(|c| c.pointer(pointer)?.as_array())
                .flatten()
                .cloned()
                .collect()
        };
        let lists = [
            "/logprobs/tokens",
            "/logprobs/token_logprobs",
            "/logprobs/text_offset",
            "/logprobs/top_logprobs",
            "/policy/entropy",
            "/policy/discriminator",
            "/policy/baseline",
            "/policy/weight_version",
            "/token_ids",
        ];
        for list in lists {
            assert_eq!(joined(list), *whole.pointer(list).unwrap(), "{list}");
        }
        assert_eq!(choices[1]["text"], "o");
        assert_eq!(choices[1]["logprobs"]["tokens"], json!(["o"]));
        assert_eq!(choices.last().unwrap()["weight_versions"], json!([7, 7]));
    })
    .await;
}

#[tokio::test]
async fn an_echo_is_streamed_first() {
    within(async {
        let server = Server::start(Script::saying(|_, _| bytes("ok"))).await;
        for logprobs in [Value::Null, json!(0)] {
            let body =
                json!({"prompt": ["hey", "you"], "echo": true, "logprobs": logprobs, "n": 2});
            let (chunks, _) = server.stream(COMPLETIONS, body).await;
            let mut texts = vec![Vec::new(); 4];
            for chunk in &chunks {
                let choice = &chunk["choices"][0];
                texts[choice["index"].as_u64().unwrap() as usize]
                    .push(choice["text"].as_str().unwrap());
            }
            for (index, texts) in texts.iter().enumerate() {
                assert_eq!(texts[0], if index < 2 { "hey" } else { "you" });
                assert_eq!(texts.concat(), format!("{}ok", texts[0]));
            }
        }
    })
    .await;
}

#[tokio::test]
async fn samples_are_interleaved_by_index() {
    within(async {
        let script = Script::saying(|_, index| bytes(&"abcd".repeat(index + 1)));
        let server = Server::start(script).await;
        let body = json!({"messages": messages(), "n": 3});
        let (chunks, done) = server.stream(CHAT, body).await;
        assert!(done);
        let mut texts = vec![String::new(); 3];
        let mut finished = vec![0; 3];
        let order: Vec<u64> =
            chunks.iter().map(|c| c["choices"][0]["index"].as_u64().unwrap()).collect();
        assert_eq!(order[..9], [0, 1, 2, 0, 1, 2, 0, 1, 2]);
        for chunk in &chunks {
            let choice = &chunk["choices"][0];
            let index = choice["index"].as_u64().unwrap() as usize;
            assert_eq!(finished[index], 0, "a chunk after the end");
            texts[index] += choice["delta"]["content"].as_str().unwrap_or("");
            finished[index] += usize::from(choice["finish_reason"] == "stop");
        }
        assert_eq!(texts, ["abcd", "abcdabcd", "abcdabcdabcd"]);
        assert_eq!(finished, [1, 1, 1]);
    })
    .await;
}

#[tokio::test]
async fn chunks_arrive_while_the_engine_goes_on() {
    within(async {
        let mut script = Script::saying(|_, _| bytes("abc"));
        script.endless = true;
        script.pause = Duration::from_millis(5);
        let server = Server::start(script).await;
        let body = json!({"prompt": "a", "stream": true, "max_tokens": 200});
        let mut response = server.send(COMPLETIONS, &body).await;
        let first = response.chunk().await.unwrap().unwrap();
        assert!(first.starts_with(b"data: {"), "{first:?}");
        assert_eq!(server.seen.live.load(std::sync::atomic::Ordering::SeqCst), 1);
    })
    .await;
}

#[tokio::test]
async fn many_streams_at_once() {
    within(async {
        let mut script = Script::saying(|request, index| {
            let mut text = request.prompt[1..].to_vec();
            text.extend(bytes(&format!(":{index}")));
            text
        });
        script.pause = Duration::from_millis(2);
        let server = Server::start(script).await;
        let streams = (0..64).map(|i| {
            let server = &server;
            async move {
                let body = json!({"prompt": format!("request {i}"), "n": 2, "max_tokens": 30});
                let (chunks, done) = server.stream(COMPLETIONS, body).await;
                assert!(done);
                let mut texts = [String::new(), String::new()];
                for chunk in &chunks {
                    let choice = &chunk["choices"][0];
                    let index = choice["index"].as_u64().unwrap() as usize;
                    texts[index] += choice["text"].as_str().unwrap();
                }
                assert_eq!(texts, [format!("request {i}:0"), format!("request {i}:1")]);
            }
        });
        futures::future::join_all(streams).await;
        assert!(server.seen.aborts.lock().unwrap().is_empty());
    })
    .await;
}
