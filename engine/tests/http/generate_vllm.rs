//! `/inference/v1/generate`: token ids in, token ids out.

use crate::scripted::{MODEL, Script, VERSION};
use crate::server::{Server, within};
use crate::tokenizer::{BOS, EOS, VOCAB, bytes};
use onpolicy_plugin_api::{EngineError, FinishReason, Grammar, SamplingParams};
use serde_json::{Value, json};

const PATH: &str = "/inference/v1/generate";

fn says(text: &'static str) -> Script {
    Script::saying(move |_, _| bytes(text))
}

fn body(sampling: Value) -> Value {
    json!({"token_ids": [BOS, 99], "sampling_params": sampling})
}

/// A body with more fields at its top.
fn beside(more: Value) -> Value {
    let mut body = body(json!({}));
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn tokens_come_back_with_their_logprobs_and_versions() {
    within(async {
        let server = Server::start(Script { swap_at: 1, ..says("ok") }).await;
        let mut answer = server.ok(PATH, body(json!({"logprobs": 1, "n": 2}))).await;
        assert!(answer["created"].take().as_u64().unwrap() > 1_700_000_000);
        let id = answer["request_id"].take();
        assert!(id.as_str().unwrap().starts_with("generate-tokens-"), "{id}");
        let token = |id: u32, logprob: f32| {
            let named = json!({"token": format!("token_id:{id}"), "token_id": id,
                "logprob": logprob, "rank": null});
            let mut entry = named.clone();
            entry["top_logprobs"] = json!([named]);
            entry
        };
        let choice = |index: usize| {
            json!({
                "index": index,
                "token_ids": [113, 109, EOS],
                "logprobs": {"content":
                    [token(113, -0.125), token(109, -0.25), token(EOS, -0.375)]},
                "finish_reason": "stop",
                "stop_reason": null,
                "weight_versions": [{"version": "7", "start": 0, "end": 1},
                    {"version": "8", "start": 1, "end": 3}],
                "policy": {"entropy": [0.5, 0.75, 1.0], "baseline": [0.0, 0.0625, 0.125],
                    "discriminator": null, "weight_version": [7, 8, 8]},
            })
        };
        for choice in answer["choices"].as_array_mut().unwrap() {
            assert_eq!(choice["policy"]["discriminator"].take().as_array().unwrap().len(), 3);
        }
        let expected = json!({
            "request_id": null, "model": MODEL, "created": null, "weight_version": VERSION,
            "output_mode": "tokens", "choices": [choice(0), choice(1)],
            "usage": {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8},
            "prompt_logprobs": null,
        });
        assert_eq!(answer, expected);
    })
    .await;
}

#[tokio::test]
async fn without_logprobs_there_are_only_tokens() {
    within(async {
        let server = Server::start(says("ok")).await;
        let answer = server.ok(PATH, body(json!({}))).await;
        let choice = json!({"index": 0, "token_ids": [113, 109, EOS], "logprobs": null,
            "finish_reason": "stop", "stop_reason": null,
            "weight_versions": [{"version": "7", "start": 0, "end": 3}]});
        assert_eq!(answer["choices"], json!([choice]));
        let answer = server.ok(PATH, body(json!({"max_tokens": 1}))).await;
        assert_eq!(answer["choices"][0]["finish_reason"], "length");
    })
    .await;
}

#[tokio::test]
async fn the_drawn_token_is_named_first_and_then_the_likeliest() {
    within(async {
        let server = Server::start(says("ok")).await;
        let named = async |logprobs: usize| -> (usize, Vec<(u64, Value)>) {
            let answer = server.ok(PATH, body(json!({"logprobs": logprobs}))).await;
            let top = &answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"];
            let top = top.as_array().unwrap().iter();
            let top = top.map(|t| (t["token_id"].as_u64().unwrap(), t["rank"].clone())).collect();
            (server.seen.requests.lock().unwrap().last().unwrap().params.top_logprobs, top)
        };
        assert_eq!(named(0).await, (0, vec![(113, Value::Null)]));
        assert_eq!(named(1).await, (0, vec![(113, Value::Null)]));
        assert_eq!(named(2).await, (2, vec![(113, json!(1)), (114, json!(2))]));
        let three = vec![(113, json!(1)), (114, json!(2)), (115, json!(3))];
        assert_eq!(named(3).await, (3, three));
    })
    .await;
}

#[tokio::test]
async fn every_sampling_field_reaches_the_engine() {
    within(async {
        let server = Server::start(says("ok")).await;
        let sampling = json!({
            "n": 3, "temperature": 0.5, "top_k": 40, "top_p": 0.75, "min_p": 0.25, "seed": 11,
            "max_tokens": 20, "min_tokens": 2, "ignore_eos": true, "stop_token_ids": [5, 6],
            "logprobs": 4, "prompt_logprobs": 2,
            "structured_outputs": {"regex": "a+"},
        });
        let mut body = body(sampling);
        body["model"] = MODEL.into();
        body["cache_salt"] = "pepper".into();
        body["priority"] = (-3).into();
        server.ok(PATH, body).await;
        let seen = server.seen.requests.lock().unwrap()[0].clone();
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
            top_logprobs: 4,
            prompt_logprobs: Some(2),
            grammar: Some(Grammar::Regex("a+".into())),
            ..SamplingParams::default()
        };
        assert_eq!(seen.params, expected);
        assert_eq!((seen.priority, seen.cache_salt.as_deref()), (-3, Some("pepper")));
        assert_eq!(seen.prompt, [BOS, 99]);
    })
    .await;
}

#[tokio::test]
async fn without_max_tokens_there_is_all_the_room() {
    within(async {
        let server = Server::start(says("ok")).await;
        server.ok(PATH, body(json!({"temperature": 0.5}))).await;
        server.ok(PATH, body(json!({"max_tokens": null}))).await;
        for request in server.seen.requests.lock().unwrap().iter() {
            assert_eq!(request.params.max_tokens, 254);
        }
    })
    .await;
}

#[tokio::test]
async fn grammars_come_in_five_kinds() {
    within(async {
        let server = Server::start(says("ok")).await;
        let schema = json!({"type": "object"});
        let cases = [
            (json!({"json": schema}), Grammar::JsonSchema(schema.clone())),
            (json!({"json": schema.to_string()}), Grammar::JsonSchema(schema.clone())),
            (json!({"json_object": true}), Grammar::JsonObject),
            (json!({"regex": "[0-9]+"}), Grammar::Regex("[0-9]+".into())),
            (json!({"choice": ["a", "b"]}), Grammar::Choice(vec!["a".into(), "b".into()])),
            (json!({"grammar": "start: \"a\""}), Grammar::Lark("start: \"a\"".into())),
        ];
        for (outputs, grammar) in cases {
            server.ok(PATH, body(json!({"structured_outputs": outputs}))).await;
            let seen = server.seen.requests.lock().unwrap().last().unwrap().params.clone();
            assert_eq!(seen.grammar, Some(grammar));
        }
    })
    .await;
}

#[tokio::test]
async fn a_stop_string_ends_a_sample_and_its_tokens_stay() {
    within(async {
        let server = Server::start(says("abcdef")).await;
        let answer = server.ok(PATH, body(json!({"stop": ["cd"]}))).await;
        let choice = &answer["choices"][0];
        assert_eq!(choice["token_ids"], json!(bytes("abcd")));
        assert_eq!(
            (&choice["finish_reason"], &choice["stop_reason"]),
            (&json!("stop"), &json!("cd"))
        );
        let answer = server.ok(PATH, body(json!({"stop_token_ids": [bytes("b")[0]]}))).await;
        let choice = &answer["choices"][0];
        assert_eq!(choice["token_ids"], json!(bytes("ab")));
        assert_eq!(choice["stop_reason"], bytes("b")[0]);
    })
    .await;
}

#[tokio::test]
async fn text_is_made_only_on_demand() {
    within(async {
        let server = Server::start(says("ok")).await;
        let mut body = body(json!({"logprobs": 1, "skip_special_tokens": false}));
        body["output_mode"] = "text".into();
        let answer = server.ok(PATH, body.clone()).await;
        assert_eq!(answer["output_mode"], "text");
        let choice = &answer["choices"][0];
        assert_eq!(
            (&choice["text"], &choice["token_ids"]),
            (&json!("ok"), &json!([113, 109, EOS]))
        );
        let first = json!({"token": "o", "logprob": -0.125, "bytes": [111],
            "top_logprobs": [{"token": "o", "logprob": -0.125, "bytes": [111]}]});
        assert_eq!(choice["logprobs"]["content"][0], first);
        let (chunks, done) = server.stream(PATH, body).await;
        let text: String =
            chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
        assert_eq!((text.as_str(), done), ("ok", true));
    })
    .await;
}

#[tokio::test]
async fn the_prompts_own_tokens_come_first_in_its_logprobs() {
    within(async {
        let server = Server::start(says("ok")).await;
        let mut body = body(json!({"prompt_logprobs": 1, "max_tokens": 1}));
        body["token_ids"] = json!([BOS, 99, 100]);
        body["return_token_ids"] = true.into();
        let expected = json!([null,
            {"99": {"logprob": -0.0, "rank": 1, "decoded_token": "a"}},
            {"100": {"logprob": -1.0, "rank": 2, "decoded_token": "b"},
             "101": {"logprob": -1.0, "rank": 1, "decoded_token": "c"}}]);
        let answer = server.ok(PATH, body.clone()).await;
        assert_eq!(answer["prompt_logprobs"], expected);
        assert_eq!(answer["prompt_token_ids"], json!([BOS, 99, 100]));
        let (chunks, _) = server.stream(PATH, body).await;
        assert_eq!(chunks[0]["prompt_logprobs"], expected);
        assert_eq!(chunks[0]["choices"], json!([]));
        assert_eq!(chunks[1]["prompt_token_ids"], json!([BOS, 99, 100]));
        assert!(chunks[2].get("prompt_token_ids").is_none());
    })
    .await;
}

#[tokio::test]
async fn a_stream_says_what_the_whole_answer_says() {
    within(async {
        let server = Server::start(Script { swap_at: 2, ..says("abc") }).await;
        let mut body = body(json!({"logprobs": 2, "n": 2}));
        body["request_id"] = "mine".into();
        let whole = server.ok(PATH, body.clone()).await;
        assert_eq!(whole["request_id"], "generate-tokens-mine");
        body["stream_options"] = json!({"include_usage": true});
        let (mut chunks, done) = server.stream(PATH, body).await;
        assert!(done);
        let last = chunks.pop().unwrap();
        assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &whole["usage"]));
        for index in 0..2 {
            let mut ids = Vec::new();
            let mut content = Vec::new();
            let mut end = Value::Null;
            for chunk in &chunks {
                assert_eq!(chunk["request_id"], "generate-tokens-mine");
                let choice = &chunk["choices"][0];
                if choice["index"] == index {
                    assert!(end.is_null(), "a chunk after the end");
                    ids.extend(choice["token_ids"].as_array().unwrap().clone());
                    content.extend(choice["logprobs"]["content"].as_array().unwrap().clone());
                    end = choice["finish_reason"].clone();
                    let versions = &choice["weight_versions"];
                    let expected = &whole["choices"][index]["weight_versions"];
                    assert_eq!(versions, if end.is_null() { &Value::Null } else { expected });
                }
            }
            assert_eq!(json!(ids), whole["choices"][index]["token_ids"]);
            assert_eq!(json!(content), whole["choices"][index]["logprobs"]["content"]);
            assert_eq!(end, json!(FinishReason::Stop));
        }
    })
    .await;
}

#[tokio::test]
async fn what_verifiers_sends_is_taken() {
    within(async {
        let server = Server::start(says("ok")).await;
        let sampling = json!({"temperature": 1.0, "max_tokens": 5, "stop_token_ids": [EOS],
            "logprobs": 1, "skip_special_tokens": false, "routed_experts_prompt_start": 3});
        let mut body = body(sampling);
        body["model"] = MODEL.into();
        let answer = server.ok(PATH, body).await;
        let choice = &answer["choices"][0];
        let content = choice["logprobs"]["content"].as_array().unwrap();
        let ids = choice["token_ids"].as_array().unwrap();
        assert_eq!(content.len(), ids.len());
        for (entry, id) in content.iter().zip(ids) {
            assert_eq!(entry["token"], format!("token_id:{id}"));
        }
    })
    .await;
}

#[tokio::test]
async fn neutral_values_are_taken() {
    within(async {
        let server = Server::start(says("ok")).await;
        let sampling = json!({
            "presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0,
            "logit_bias": null, "allowed_token_ids": null, "bad_words": [],
            "spaces_between_special_tokens": true, "include_stop_str_in_output": true,
            "detokenize": false, "output_kind": 2, "flat_logprobs": true, "logprob_token_ids": null,
            "prompt_logprob_start": 0, "extra_args": {}, "skip_reading_prefix_cache": false,
            "stream_interval": 1, "structured_outputs": null,
        });
        let mut body = body(sampling);
        let more = json!({"features": null, "content_parts": [], "kv_transfer_params": {},
            "ec_transfer_params": null, "reasoning_ended": true, "output_mode": "tokens",
            "return_token_ids": false, "stream": false, "stream_options": null});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.ok(PATH, body.clone()).await;
        body["stream"] = true.into();
        body["sampling_params"]["output_kind"] = 1.into();
        assert!(server.stream(PATH, body).await.1);
    })
    .await;
}

#[tokio::test]
async fn wrong_values_name_their_field() {
    within(async {
        let server = Server::start(says("ok")).await;
        let nested = [
            json!({"n": 0}),
            json!({"n": 9}),
            json!({"temperature": -1}),
            json!({"top_p": 0}),
            json!({"top_k": -2}),
            json!({"min_p": 2}),
            json!({"seed": 1.5}),
            json!({"max_tokens": 0}),
            json!({"max_tokens": 255}),
            json!({"min_tokens": 300}),
            json!({"stop": [""]}),
            json!({"stop_token_ids": [VOCAB]}),
            json!({"logprobs": 21}),
            json!({"logprobs": -1}),
            json!({"prompt_logprobs": 21}),
            json!({"structured_outputs": {}}),
            json!({"structured_outputs": {"regex": "a", "choice": ["a"]}}),
            json!({"structured_outputs": {"json": "{"}}),
            json!({"output_kind": 1}),
            json!({"flat_logprobs": 1}),
            json!({"logprob_token_ids": [1]}),
            json!({"prompt_logprob_token_ids": [1]}),
            json!({"prompt_logprob_start": 1}),
            json!({"trace_decode_token_ids": [1]}),
            json!({"extra_args": {"a": 1}}),
            json!({"skip_reading_prefix_cache": true}),
            json!({"stream_interval": 2}),
            json!({"thinking_token_budget": 5}),
            json!({"repetition_detection": {}}),
            json!({"routed_experts_prompt_start": -1}),
            json!({"spaces_between_special_tokens": 1}),
            json!({"max_new_tokens": 5}),
            json!({"stream": true}),
        ];
        for sampling in nested {
            let name = sampling.as_object().unwrap().keys().next().unwrap().clone();
            let (param, message) = server.refused(PATH, body(sampling)).await;
            let path = format!("sampling_params.{name}");
            assert!(param == path || param.starts_with(&format!("{path}.")), "{param} {message}");
        }
        let (param, _) =
            server.refused(PATH, body(json!({"detokenize": false, "stop": "a"}))).await;
        assert_eq!(param, "sampling_params.detokenize");
        let (param, _) = server
            .refused(PATH, body(json!({"structured_outputs": {"whitespace_pattern": "x"}})))
            .await;
        assert_eq!(param, "sampling_params.structured_outputs.whitespace_pattern");
    })
    .await;
}

#[tokio::test]
async fn wrong_fields_of_the_body_are_named() {
    within(async {
        let server = Server::start(says("ok")).await;
        let cases = [
            json!({"token_ids": []}),
            json!({"token_ids": [-1]}),
            json!({"token_ids": [VOCAB]}),
            json!({"token_ids": "text"}),
            json!({"token_ids": [[1]]}),
            json!({"token_ids": null}),
            json!({"sampling_params": null}),
            json!({"sampling_params": 5}),
            json!({"features": {"mm_hashes": {}}}),
            json!({"content_parts": [{}]}),
            json!({"token_offsets": []}),
            json!({"kv_transfer_params": {"a": 1}}),
            json!({"ec_transfer_params": {"a": 1}}),
            json!({"reasoning_ended": false}),
            json!({"reasoning_parser_kwargs": {"a": 1}}),
            json!({"output_mode": "speech"}),
            json!({"cache_salt": ""}),
            json!({"cache_salt": "x".repeat(1025)}),
            json!({"priority": 0.5}),
            json!({"priority": 3_000_000_000u64}),
            json!({"request_id": ""}),
            json!({"stream_options": {}}),
            json!({"temperature": 0.5}),
            json!({"prompt": "a"}),
        ];
        for more in cases {
            let name = more.as_object().unwrap().keys().next().unwrap().clone();
            assert_eq!(server.refused(PATH, beside(more)).await.0, name);
        }
        let (status, answer) = server.post(PATH, beside(json!({"model": "other"}))).await;
        assert_eq!((status.as_u16(), &answer["error"]["param"]), (404, &json!("model")));
    })
    .await;
}

#[tokio::test]
async fn refusals_of_the_engine_name_the_clients_field() {
    within(async {
        let cases = [("prompt", "token_ids"), ("max_tokens", "sampling_params.max_tokens")];
        for (field, path) in cases {
            let refuses = Some((0, EngineError::invalid(field, "is odd")));
            let server = Server::start(Script { refuses, ..says("ok") }).await;
            let (param, message) = server.refused(PATH, body(json!({}))).await;
            assert_eq!((param.as_str(), message), (path, format!("{path}: is odd")));
        }
    })
    .await;
}
