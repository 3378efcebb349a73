//! Every request field: its effect on what the engine is asked, or its refusal.

use crate::scripted::{MODEL, Script};
use crate::server::{Server, within};
use crate::tokenizer::bytes;
use crate::{CHAT, COMPLETIONS};
use onpolicy_plugin_api::{LogprobsMode, SamplingParams};
use serde_json::{Value, json};

async fn server() -> Server {
    Server::start(Script::saying(|_, _| bytes("ok"))).await
}

/// A body for each route with more fields added.
fn bodies(more: &Value) -> [(&'static str, Value); 2] {
    let with = |mut base: Value| {
        let more = more.as_object().unwrap().clone();
        base.as_object_mut().unwrap().extend(more);
        base
    };
    [
        (COMPLETIONS, with(json!({"prompt": "a"}))),
        (CHAT, with(json!({"messages": [{"role": "user", "content": "a"}]}))),
    ]
}

#[tokio::test]
async fn defaults_are_openais() {
    within(async {
        let server = server().await;
        server.ok(COMPLETIONS, json!({"prompt": "a"})).await;
        assert_eq!(server.seen.requests.lock().unwrap()[0].params, SamplingParams::default());
        let all_null = json!({"prompt": "a", "temperature": null, "n": null, "stop": null,
            "logprobs": null, "stream": null, "model": null, "suffix": null, "tools": null});
        server.ok(COMPLETIONS, all_null).await;
        assert_eq!(server.seen.requests.lock().unwrap()[1].params, SamplingParams::default());
    })
    .await;
}

#[tokio::test]
async fn sampling_fields_reach_the_engine() {
    within(async {
        let server = server().await;
        let fields = json!({
            "model": MODEL, "n": 3, "temperature": 0.5, "top_k": 40, "top_p": 0.75, "min_p": 0.25,
            "seed": 11, "max_tokens": 20, "min_tokens": 2, "ignore_eos": true,
            "stop_token_ids": [5, 6], "user": "somebody", "safety_identifier": "s",
            "repetition_penalty": 1.25, "presence_penalty": -2, "frequency_penalty": 0.5,
            "logit_bias": {"7": -100, "5": 1.5}, "allowed_token_ids": [9, 8, 9],
            "logprobs_mode": "raw", "prompt_logprobs": 4, "priority": -3, "cache_salt": "mine",
        });
        for (path, body) in bodies(&fields) {
            server.ok(path, body).await;
        }
        let expected = SamplingParams {
            n: 3,
            temperature: 0.5,
            top_k: 40,
            top_p: 0.75,
            min_p: 0.25,
            seed: Some(11),
            max_tokens: 20,
            min_tokens: 2,
            ignore_eos: true,
            stop_token_ids: vec![5, 6],
            repetition_penalty: 1.25,
            presence_penalty: -2.0,
            frequency_penalty: 0.5,
            logit_bias: vec![(5, 1.5), (7, -100.0)],
            allowed_token_ids: Some(vec![8, 9]),
            logprobs_mode: LogprobsMode::Raw,
            prompt_logprobs: Some(4),
            ..SamplingParams::default()
        };
        for request in server.seen.requests.lock().unwrap().iter() {
            let mut params = request.params.clone();
            params.logit_bias.sort_by_key(|(id, _)| *id);
            assert_eq!(params, expected);
            assert_eq!((request.priority, request.cache_salt.as_deref()), (-3, Some("mine")));
        }
    })
    .await;
}

#[tokio::test]
async fn edges_of_sampling_fields() {
    within(async {
        let server = server().await;
        let params = async |fields: Value| {
            for (path, body) in bodies(&fields) {
                server.ok(path, body).await;
            }
            server.seen.requests.lock().unwrap().last().unwrap().params.clone()
        };
        assert_eq!(params(json!({"top_k": -1})).await.top_k, 0);
        assert_eq!(params(json!({"top_k": 0})).await.top_k, 0);
        assert_eq!(params(json!({"seed": -1})).await.seed, Some(u64::MAX));
        assert_eq!(params(json!({"seed": u64::MAX})).await.seed, Some(u64::MAX));
        assert_eq!(params(json!({"temperature": 0})).await.temperature, 0.0);
        assert_eq!(params(json!({"n": 8})).await.n, 8);
        let (processed, raw) = (LogprobsMode::Processed, LogprobsMode::Raw);
        for (name, mode) in [
            ("processed", processed),
            ("raw", raw),
            ("processed_logprobs", processed),
            ("raw_logprobs", raw),
        ] {
            assert_eq!(params(json!({"logprobs_mode": name})).await.logprobs_mode, mode);
        }
        let neutral = json!({"logit_bias": {}, "bad_words": [], "repetition_penalty": 1,
            "presence_penalty": 0, "frequency_penalty": 0.0, "allowed_token_ids": null,
            "cache_salt": null, "priority": 0, "truncate_prompt_tokens": null, "max_tokens": 16});
        assert_eq!(params(neutral).await, SamplingParams::default());
    })
    .await;
}

#[tokio::test]
async fn wrong_values_name_their_field() {
    within(async {
        let server = server().await;
        let cases = [
            json!({"n": 0}),
            json!({"n": -1}),
            json!({"n": 9}),
            json!({"n": "2"}),
            json!({"n": 1.5}),
            json!({"temperature": -0.1}),
            json!({"temperature": 101}),
            json!({"temperature": 1e39}),
            json!({"temperature": "hot"}),
            json!({"temperature": true}),
            json!({"top_p": 0}),
            json!({"top_p": 1.1}),
            json!({"top_p": []}),
            json!({"top_k": -2}),
            json!({"top_k": 0.5}),
            json!({"min_p": -1}),
            json!({"min_p": 2}),
            json!({"seed": 1.5}),
            json!({"seed": "1"}),
            json!({"seed": 1e30}),
            json!({"max_tokens": 0}),
            json!({"max_tokens": -5}),
            json!({"max_tokens": "all"}),
            json!({"max_tokens": 300}),
            json!({"max_tokens": u64::MAX}),
            json!({"min_tokens": 1000}),
            json!({"min_tokens": -1}),
            json!({"ignore_eos": 1}),
            json!({"stop_token_ids": 5}),
            json!({"stop_token_ids": [-1]}),
            json!({"stop_token_ids": [262]}),
            json!({"stop": 5}),
            json!({"stop": [5]}),
            json!({"stop": ""}),
            json!({"stop": ["a", ""]}),
            json!({"stop": vec!["a"; 17]}),
            json!({"stop": "a".repeat(1025)}),
            json!({"include_stop_str_in_output": "no"}),
            json!({"skip_special_tokens": 0}),
            json!({"return_token_ids": "yes"}),
            json!({"stream": "yes"}),
            json!({"return_tokens_as_token_ids": 1}),
            json!({"logprobs": "many"}),
            json!({"stream_options": {"include_usage": true}}),
            json!({"user": 5}),
            json!({"request_id": ""}),
            json!({"request_id": "a b"}),
            json!({"request_id": "x".repeat(129)}),
            json!({"model": 5}),
            json!({"repetition_penalty": 0}),
            json!({"repetition_penalty": -1}),
            json!({"repetition_penalty": 1e39}),
            json!({"presence_penalty": 2.5}),
            json!({"presence_penalty": "a"}),
            json!({"frequency_penalty": -2.5}),
            json!({"frequency_penalty": []}),
            json!({"logit_bias": [1]}),
            json!({"logit_bias": {"hello": 1}}),
            json!({"logit_bias": {"-1": 1}}),
            json!({"logit_bias": {"262": 1}}),
            json!({"logit_bias": {"5": 100.5}}),
            json!({"logit_bias": {"5": -101}}),
            json!({"logit_bias": {"5": "much"}}),
            json!({"logit_bias": {"5": null}}),
            json!({"allowed_token_ids": []}),
            json!({"allowed_token_ids": [262]}),
            json!({"allowed_token_ids": ["a"]}),
            json!({"allowed_token_ids": 5}),
            json!({"bad_words": "a"}),
            json!({"bad_words": [5]}),
            json!({"bad_words": ["a", ""]}),
            json!({"bad_words": ["  "]}),
            json!({"bad_words": vec!["a"; 1025]}),
            json!({"priority": 0.5}),
            json!({"priority": 1u64 << 31}),
            json!({"priority": "high"}),
            json!({"cache_salt": ""}),
            json!({"cache_salt": 5}),
            json!({"prompt_logprobs": -1}),
            json!({"prompt_logprobs": -2}),
            json!({"prompt_logprobs": 21}),
            json!({"prompt_logprobs": true}),
            json!({"prompt_logprobs": 1, "stream": true}),
            json!({"logprobs_mode": "raw_logits"}),
            json!({"logprobs_mode": 1}),
            json!({"truncate_prompt_tokens": 0}),
            json!({"truncate_prompt_tokens": -2}),
            json!({"truncate_prompt_tokens": 257}),
            json!({"truncate_prompt_tokens": "all"}),
        ];
        for fields in cases {
            let name = fields.as_object().unwrap().keys().next().unwrap();
            for (path, body) in bodies(&fields) {
                let (param, message) = server.refused(path, body).await;
                assert_eq!(param, *name, "{path} {fields}");
                assert!(message.contains(name.as_str()), "{message}");
            }
        }
        assert!(server.seen.requests.lock().unwrap().is_empty());
    })
    .await;
}

#[tokio::test]
async fn fields_of_one_route_are_checked() {
    within(async {
        let server = server().await;
        let completions = [
            (json!({"prompt": "a", "logprobs": 21}), "logprobs"),
            (json!({"prompt": "a", "logprobs": -1}), "logprobs"),
            (json!({"prompt": "a", "logprobs": true}), "logprobs"),
            (json!({"prompt": "a", "echo": true, "max_tokens": 0}), "max_tokens"),
            (json!({"prompt": "a", "best_of": 2}), "best_of"),
            (json!({"prompt": "a", "suffix": "b"}), "suffix"),
            (json!({"prompt": "a", "messages": []}), "messages"),
            (json!({"prompt": []}), "prompt"),
            (json!({"prompt": [[]]}), "prompt"),
            (json!({"prompt": ["a", 5]}), "prompt"),
            (json!({"prompt": [262]}), "prompt"),
            (json!({"prompt": [-1]}), "prompt"),
            (json!({"prompt": 5}), "prompt"),
            (json!({"prompt": null}), "prompt"),
            (json!({"prompt": "", "add_special_tokens": false}), "prompt"),
            (json!({"prompt": vec!["a"; 1025]}), "prompt"),
        ];
        for (body, param) in completions {
            assert_eq!(server.refused(COMPLETIONS, body).await.0, param);
        }
        let chat = [
            (json!({"logprobs": 1}), "logprobs"),
            (json!({"top_logprobs": 1}), "top_logprobs"),
            (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
            (json!({"max_tokens": 2, "max_completion_tokens": 3}), "max_completion_tokens"),
            (json!({"best_of": 1}), "best_of"),
            (json!({"prompt": "a"}), "prompt"),
        ];
        for (fields, param) in chat {
            let [_, (path, body)] = bodies(&fields);
            assert_eq!(server.refused(path, body).await.0, param);
        }
        server.ok(COMPLETIONS, json!({"prompt": "a", "n": 2, "best_of": 2})).await;
        let [_, (path, body)] = bodies(&json!({"max_tokens": 2, "max_completion_tokens": 2}));
        server.ok(path, body).await;
    })
    .await;
}

#[tokio::test]
async fn what_is_not_supported_is_accepted_only_where_it_changes_nothing() {
    within(async {
        let server = server().await;
        let shared = [
            ("length_penalty", json!(1), json!(2)),
            ("use_beam_search", json!(false), json!(true)),
            ("spaces_between_special_tokens", json!(false), json!("no")),
            ("service_tier", json!("auto"), json!("flex")),
            ("store", json!(false), json!(true)),
        ];
        let chat = [
            ("metadata", json!({}), json!({"a": "b"})),
            ("modalities", json!(["text"]), json!(["text", "audio"])),
            ("audio", json!(null), json!({})),
            ("prediction", json!(null), json!({})),
            ("reasoning_effort", json!("none"), json!("high")),
            ("verbosity", json!("medium"), json!("low")),
            ("web_search_options", json!(null), json!({})),
            ("prompt_cache_key", json!(null), json!("a")),
            ("chat_template", json!(null), json!("x")),
            ("echo", json!(false), json!(true)),
        ];
        for (routes, cases) in [(0..2, &shared[..]), (1..2, &chat[..])] {
            for (name, neutral, other) in cases {
                for (path, body) in &bodies(&json!({*name: neutral}))[routes.clone()] {
                    server.ok(path, body.clone()).await;
                }
                for (path, body) in &bodies(&json!({*name: other}))[routes.clone()] {
                    let (param, message) = server.refused(path, body.clone()).await;
                    assert!(param.starts_with(name), "{param} {message}");
                    assert!(
                        message.contains("not supported yet") || *name == "modalities",
                        "{message}"
                    );
                }
            }
        }
    })
    .await;
}

#[tokio::test]
async fn unknown_fields_and_models_are_refused() {
    within(async {
        let server = server().await;
        for (path, body) in bodies(&json!({"temprature": 1})) {
            let (param, message) = server.refused(path, body).await;
            assert_eq!(param, "temprature");
            assert_eq!(message, "temprature: unknown field; check its spelling, or leave it out");
        }
        for (path, body) in bodies(&json!({"stream": true, "stream_options": {"odd": 1}})) {
            assert_eq!(server.refused(path, body).await.0, "stream_options.odd");
        }
        for (path, body) in bodies(&json!({"model": "gpt-4"})) {
            let (status, answer) = server.post(path, body).await;
            assert_eq!(status, 404);
            let error = json!({"error": {
                "message": "model 'gpt-4' is not served here; the model is 'test/scripted'",
                "type": "not_found_error", "param": "model", "code": "model_not_found",
            }});
            assert_eq!(answer, error);
        }
    })
    .await;
}
