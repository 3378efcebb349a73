//! Whole answers of `/v1/chat/completions`.

use crate::CHAT;
use crate::scripted::{MAX_MODEL_LEN, MODEL, Script};
use crate::server::{Server, within};
use crate::tokenizer::{EOS, bytes};
use serde_json::{Value, json};

fn user(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

/// The prompts that the engine saw, as text.
fn prompts(server: &Server) -> Vec<String> {
    let tokenizer = crate::tokenizer::tokenizer();
    let requests = server.seen.requests.lock().unwrap();
    requests.iter().map(|r| tokenizer.decode(&r.prompt, false).unwrap()).collect()
}

#[tokio::test]
async fn an_answer_has_openais_shape() {
    within(async {
        let server = Server::start(Script::saying(|_, _| bytes("ok"))).await;
        let body = json!({"model": MODEL, "messages": user("hi"), "request_id": "mine"});
        let mut answer = server.ok(CHAT, body).await;
        assert!(answer["created"].take().as_u64().unwrap() > 1_700_000_000);
        let expected = json!({
            "id": "chatcmpl-mine", "object": "chat.completion", "created": null, "model": MODEL,
            "weight_version": 7,
            "choices": [{
                "index": 0, "message": {"role": "assistant", "content": "ok"}, "logprobs": null,
                "finish_reason": "stop", "stop_reason": null, "weight_versions": [7, 7],
            }],
            "usage": {"prompt_tokens": 20, "completion_tokens": 3, "total_tokens": 23},
        });
        assert_eq!(answer, expected);
        assert_eq!(prompts(&server), ["[user]hi\n[assistant]"]);
        let params = &server.seen.requests.lock().unwrap()[0].params;
        assert_eq!(params.max_tokens, MAX_MODEL_LEN - 20);
    })
    .await;
}

#[tokio::test]
async fn logprobs_name_tokens_and_bytes() {
    within(async {
        let server = Server::start(Script::saying(|_, _| bytes("é"))).await;
        let body = json!({
            "messages": user("hi"), "logprobs": true, "top_logprobs": 2, "n": 2,
            "return_token_ids": true, "max_completion_tokens": 3,
        });
        let answer = server.ok(CHAT, body).await;
        assert_eq!(answer["prompt_token_ids"].as_array().unwrap().len(), 20);
        assert_eq!(answer["usage"]["completion_tokens"], 6);
        for (index, choice) in answer["choices"].as_array().unwrap().iter().enumerate() {
            assert_eq!(choice["index"], index);
            assert_eq!(choice["message"]["content"], "é");
            let content = choice["logprobs"]["content"].as_array().unwrap();
            assert_eq!(content.len(), 3);
            let first = json!({
                "token": "\u{fffd}", "logprob": -0.125, "bytes": [0xc3],
                "top_logprobs": [
                    {"token": "\u{fffd}", "logprob": -0.125, "bytes": [0xc3]},
                    {"token": "\u{fffd}", "logprob": -1.125, "bytes": [0xc4]},
                ],
            });
            assert_eq!(content[0], first);
            assert_eq!(content[1]["bytes"], json!([0xa9]));
            assert_eq!(choice["token_ids"], json!([2 + 0xc3, 2 + 0xa9, EOS]));
            assert_eq!(choice["policy"]["entropy"], json!([0.5, 0.75, 1.0]));
            assert_eq!(choice["policy"]["weight_version"], json!([7, 7, 7]));
        }
    })
    .await;
}

#[tokio::test]
async fn messages_reach_the_template() {
    within(async {
        let server = Server::start(Script::saying(|_, _| bytes("ok"))).await;
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let talk = json!([
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "so", "refusal": null, "tool_calls": []},
        ]);
        server.ok(CHAT, json!({"messages": talk})).await;
        server.ok(CHAT, json!({"messages": talk, "add_generation_prompt": false})).await;
        server.ok(CHAT, json!({"messages": talk, "continue_final_message": true})).await;
        let kwargs = json!({"extra": "EXTRA"});
        server.ok(CHAT, json!({"messages": user("x"), "chat_template_kwargs": kwargs})).await;
        let expected = [
            "[system]be brief\n[user]a\nb\n[assistant]so\n[assistant]",
            "[system]be brief\n[user]a\nb\n[assistant]so\n",
            "[system]be brief\n[user]a\nb\n[assistant]so",
            "[user]x\nEXTRA[assistant]",
        ];
        assert_eq!(prompts(&server), expected);
    })
    .await;
}

#[tokio::test]
async fn wrong_conversations_are_refused() {
    within(async {
        let server = Server::start(Script::saying(|_, _| bytes("ok"))).await;
        let cases = [
            (json!({}), "messages"),
            (json!({"messages": []}), "messages"),
            (json!({"messages": "hi"}), "messages"),
            (json!({"messages": ["hi"]}), "messages[0]"),
            (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
            (json!({"messages": [{"role": "robot", "content": "a"}]}), "messages[0].role"),
            (json!({"messages": [{"role": "function", "content": "a"}]}), "messages[0].role"),
            (json!({"messages": [{"role": "user", "content": "a", "odd": 1}]}), "messages[0].odd"),
            (
                json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
                "messages[0].content[0].type",
            ),
            (
                json!({"messages": user("a"), "continue_final_message": true, "add_generation_prompt": true}),
                "continue_final_message",
            ),
            (json!({"messages": user("a"), "chat_template_kwargs": []}), "chat_template_kwargs"),
        ];
        for (body, param) in cases {
            assert_eq!(server.refused(CHAT, body).await.0, param);
        }
        let late = json!([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]);
        let (param, message) = server.refused(CHAT, json!({"messages": late})).await;
        assert_eq!(param, "messages");
        assert!(message.contains("system first"), "{message}");
    })
    .await;
}
