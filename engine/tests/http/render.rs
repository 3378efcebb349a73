//! The render routes: what would be generated from, without generating it.

use crate::scripted::{MODEL, Script};
use crate::server::{Server, within};
use crate::tokenizer::{BOS, bytes, tokenizer};
use crate::{CHAT, COMPLETIONS};
use serde_json::json;

#[tokio::test]
async fn a_conversation_is_rendered_as_it_would_be_generated_from() {
    within(async {
        let server = Server::start(Script::saying(|_, _| bytes("x"))).await;
        let body = json!({
            "messages": [{"role": "user", "content": "hi"}], "model": MODEL, "request_id": "mine",
            "n": 2, "temperature": 0.7, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "seed": 3,
            "max_tokens": 9, "min_tokens": 1, "ignore_eos": true, "stop": ["a", "b"],
            "stop_token_ids": [5], "include_stop_str_in_output": true, "logprobs": true,
            "top_logprobs": 4, "skip_special_tokens": false,
        });
        let answer = server.ok("/v1/chat/completions/render", body.clone()).await;
        let want = json!({
            "request_id": "chatcmpl-mine",
            "token_ids": bytes("[user]hi\n[assistant]"),
            "features": null,
            "sampling_params": {
                "n": 2, "temperature": 0.7, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "seed": 3,
                "max_tokens": 9, "min_tokens": 1, "ignore_eos": true, "stop_token_ids": [5],
                "logprobs": 4, "stop": ["a", "b"], "include_stop_str_in_output": true,
                "skip_special_tokens": false,
            },
            "model": MODEL, "stream": false, "cache_salt": null, "priority": 0,
        });
        assert_eq!(answer, want);
        assert!(server.seen.requests.lock().unwrap().is_empty(), "nothing was generated");
        server.ok(CHAT, body).await;
        let ids = server.seen.requests.lock().unwrap()[0].prompt.clone();
        assert_eq!(json!(ids), want["token_ids"]);
    })
    .await;
}

#[tokio::test]
async fn prompts_are_rendered_one_by_one() {
    within(async {
        let server = Server::start(Script::saying(|_, _| bytes("x"))).await;
        let body = json!({"prompt": ["ab", "c"], "request_id": "r", "stream": true,
            "guided_choice": ["x"], "max_tokens": 3});
        let answer = server.ok("/v1/completions/render", body.clone()).await;
        let one = |id: &str, ids: Vec<u32>| {
            json!({
                "request_id": id, "token_ids": ids, "features": null, "model": MODEL,
                "sampling_params": {"n": 1, "temperature": 1.0, "max_tokens": 3,
                    "structured_outputs": {"choice": ["x"]}},
                "stream": true, "cache_salt": null, "priority": 0,
            })
        };
        let want = [
            one("cmpl-r-0", [vec![BOS], bytes("ab")].concat()),
            one("cmpl-r-1", [vec![BOS], bytes("c")].concat()),
        ];
        assert_eq!(answer, json!(want));
        let (param, _) = server.refused("/v1/completions/render", json!({"prompt": 5})).await;
        assert_eq!(param, "prompt");
        let (param, _) = server.refused("/v1/chat/completions/render", json!({})).await;
        assert_eq!(param, "messages");
        let (status, _) = server.get("/v1/completions/render").await;
        assert_eq!(status, 405);
        server.ok(COMPLETIONS, json!({"prompt": "ab"})).await;
    })
    .await;
}

#[tokio::test]
async fn tools_are_part_of_what_is_rendered() {
    within(async {
        let script = Script { context: 4096, ..Script::saying(|_, _| bytes("x")) };
        let server = Server::start(script).await;
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        let body = json!({"messages": [{"role": "user", "content": "hi"}], "tools": tools,
            "tool_choice": "required", "max_tokens": 1});
        let answer = server.ok("/v1/chat/completions/render", body).await;
        let params = &answer["sampling_params"];
        let grammar = params["structured_outputs"]["grammar"].as_str().unwrap();
        assert!(grammar.contains("\"f\""), "{answer}");
        assert_eq!(params["skip_special_tokens"], false);
        let ids: Vec<u32> = serde_json::from_value(answer["token_ids"].clone()).unwrap();
        let prompt = tokenizer().decode(&ids, false).unwrap();
        assert!(prompt.starts_with("[system]You can call tools."), "{prompt}");
    })
    .await;
}
