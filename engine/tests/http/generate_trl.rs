//! The routes of TRL's own server, as its trainers up to 1.10 call them.

use crate::scripted::Script;
use crate::server::{Server, within};
use crate::tokenizer::{BOS, EOS, HELLO, VOCAB, bytes};
use onpolicy_plugin_api::{Grammar, SamplingParams};
use serde_json::{Value, json};

const GENERATE: &str = "/generate/";
const CHAT: &str = "/chat/";

fn echoes() -> Script {
    Script::saying(|request, index| {
        let last = char::from_u32(*request.prompt.last().unwrap() - 2).unwrap();
        bytes(&format!("{last}{index}"))
    })
}

/// What TRL's client sends beside the prompts.
fn body(more: Value) -> Value {
    let mut body = json!({"n": 1, "repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0,
        "top_k": 0, "min_p": 0.0, "max_tokens": 16, "logprobs": 0,
        "structured_outputs_regex": null, "generation_kwargs": {}});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn prompts_are_answered_with_the_tokens_of_all_samples() {
    within(async {
        let server = Server::start(echoes()).await;
        let prompts = json!({"prompts": ["a", "hellob"], "images": null, "n": 2});
        let answer = server.ok(GENERATE, body(prompts)).await;
        let line = json!([[-0.125], [-0.25], [-0.375]]);
        let ids = |first: u32, second: u32| json!([[first], [second], [EOS]]);
        let expected = json!({
            "prompt_ids": [[BOS, 99], [BOS, HELLO, 100]],
            "completion_ids": [[99, 50, EOS], [99, 51, EOS], [100, 50, EOS], [100, 51, EOS]],
            "logprobs": [line, line, line, line],
            "logprob_token_ids": [ids(99, 50), ids(99, 51), ids(100, 50), ids(100, 51)],
        });
        assert_eq!(answer, expected);
        let answer = server.ok(GENERATE, json!({"prompts": [[99], [100]]})).await;
        assert_eq!(answer["prompt_ids"], json!([[99], [100]]));
        assert_eq!(answer["logprobs"][0], line);
    })
    .await;
}

#[tokio::test]
async fn conversations_go_through_the_chat_template() {
    within(async {
        let server = Server::start(echoes()).await;
        let conversation = |text: &str| json!([{"role": "user", "content": text}]);
        let more = json!({"messages": [conversation("x"), conversation("y")],
            "chat_template_kwargs": {"extra": "!"}, "tools": null});
        let answer = server.ok(CHAT, body(more)).await;
        let prompt = |text: &str| json!(bytes(&format!("[user]{text}\n![assistant]")));
        assert_eq!(answer["prompt_ids"], json!([prompt("x"), prompt("y")]));
        assert_eq!(answer["completion_ids"][1], json!([95, 50, EOS]));
    })
    .await;
}

#[tokio::test]
async fn logprobs_are_the_likeliest_and_the_drawn() {
    within(async {
        let server = Server::start(echoes()).await;
        let prompts = json!({"prompts": ["a"], "logprobs": 2});
        let answer = server.ok(GENERATE, body(prompts)).await;
        assert_eq!(answer["logprobs"][0][0], json!([-0.125, -1.125]));
        assert_eq!(answer["logprob_token_ids"][0][0], json!([99, 100]));
        for prompts in [
            json!({"prompts": ["a"], "logprobs": null}),
            json!({"prompts": ["a"], "generation_kwargs": {"logprobs": null}}),
        ] {
            let answer = server.ok(GENERATE, body(prompts)).await;
            assert!(answer["logprobs"].is_null() && answer["logprob_token_ids"].is_null());
        }
    })
    .await;
}

#[tokio::test]
async fn every_sampling_field_reaches_the_engine() {
    within(async {
        let server = Server::start(echoes()).await;
        let more = json!({"prompts": ["a"], "n": 2, "temperature": 0.5, "top_p": 0.75, "top_k": 40,
            "min_p": 0.25, "max_tokens": 20, "structured_outputs_regex": "a+",
            "generation_kwargs": {"temperature": 0.25, "seed": 3, "min_tokens": 2, "logprobs": 4}});
        server.ok(GENERATE, body(more)).await;
        let expected = SamplingParams {
            n: 2,
            temperature: 0.25,
            top_p: 0.75,
            top_k: 40,
            min_p: 0.25,
            max_tokens: 20,
            min_tokens: 2,
            seed: Some(3),
            top_logprobs: 4,
            grammar: Some(Grammar::Regex("a+".into())),
            ..SamplingParams::default()
        };
        assert_eq!(server.seen.requests.lock().unwrap()[0].params, expected);
        let kwargs = json!({"structured_outputs": {"choice": ["a"]}});
        server.ok(GENERATE, body(json!({"prompts": ["a"], "generation_kwargs": kwargs}))).await;
        let seen = server.seen.requests.lock().unwrap()[1].params.clone();
        assert_eq!(seen.grammar, Some(Grammar::Choice(vec!["a".into()])));
        server.ok(GENERATE, json!({"prompts": ["a"]})).await;
        let seen = server.seen.requests.lock().unwrap()[2].params.clone();
        assert_eq!(seen, SamplingParams::default());
    })
    .await;
}

#[tokio::test]
async fn wrong_fields_are_named() {
    within(async {
        let server = Server::start(echoes()).await;
        let cases = [
            (json!({"prompts": []}), "prompts"),
            (json!({"prompts": [[]]}), "prompts"),
            (json!({"prompts": [[VOCAB]]}), "prompts"),
            (json!({"prompts": 5}), "prompts"),
            (json!({"prompts": null}), "prompts"),
            (json!({"images": [["x"]]}), "images"),
            (json!({"n": 0}), "n"),
            (json!({"max_tokens": 300}), "max_tokens"),
            (json!({"logprobs": 21}), "logprobs"),
            (json!({"generation_kwargs": {"top_p": 2}}), "generation_kwargs.top_p"),
            (json!({"generation_kwargs": {"odd": 2}}), "generation_kwargs.odd"),
            (json!({"generation_kwargs": {"logprobs": 21}}), "generation_kwargs.logprobs"),
            (json!({"generation_kwargs": 5}), "generation_kwargs"),
            (json!({"structured_outputs_regex": 5}), "structured_outputs_regex"),
            (json!({"seed": 5}), "seed"),
            (json!({"text": "a"}), "text"),
        ];
        for (more, param) in cases {
            let mut body = body(json!({"prompts": ["a"]}));
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            assert_eq!(server.refused(GENERATE, body).await.0, param);
        }
        let user = json!([[{"role": "user", "content": "a"}]]);
        let cases = [
            (json!({"messages": []}), "messages"),
            (json!({"messages": [[]]}), "messages"),
            (json!({"messages": [[{"role": "user"}]]}), "messages[0].content"),
            (json!({"messages": null}), "messages"),
            (json!({"messages": user, "prompts": ["a"]}), "prompts"),
            (json!({"messages": user, "chat_template_kwargs": 5}), "chat_template_kwargs"),
        ];
        for (more, param) in cases {
            assert_eq!(server.refused(CHAT, body(more)).await.0, param);
        }
    })
    .await;
}
