//! SGLang's `/generate`.

use crate::scripted::{Script, VERSION};
use crate::server::{Server, within};
use crate::tokenizer::{BOS, EOS, HELLO, VOCAB, bytes};
use onpolicy_plugin_api::{EngineError, Grammar, SamplingParams};
use serde_json::{Value, json};

const PATH: &str = "/generate";

/// Says the last letter of the prompt and the number of the sample.
fn echoes() -> Script {
    Script::saying(|request, index| {
        let last = char::from_u32(*request.prompt.last().unwrap() - 2).unwrap();
        bytes(&format!("{last}{index}"))
    })
}

/// The answer with its times taken out; they must be sensible.
fn timeless(mut answer: Value) -> Value {
    let outputs = match &mut answer {
        Value::Array(list) => list.iter_mut().collect(),
        one => vec![one],
    };
    for output in outputs {
        let seconds = output["meta_info"]["e2e_latency"].take().as_f64().unwrap();
        assert!((0.0..30.0).contains(&seconds), "{seconds}");
    }
    answer
}

#[tokio::test]
async fn one_prompt_is_answered_with_one_object() {
    within(async {
        let server = Server::start(Script { swap_at: 1, ..echoes() }).await;
        let body = json!({"text": "a", "rid": "mine", "sampling_params": {"temperature": 0}});
        let expected = json!({
            "text": "a0", "output_ids": [99, 50, EOS],
            "meta_info": {
                "id": "mine", "finish_reason": {"type": "stop", "matched": EOS},
                "prompt_tokens": 2, "completion_tokens": 3,
                "weight_version": "8",
                "weight_versions": [{"version": "7", "start": 0, "end": 1},
                    {"version": "8", "start": 1, "end": 3}],
                "e2e_latency": null,
            },
        });
        assert_eq!(timeless(server.ok(PATH, body).await), expected);
        let body = json!({"input_ids": [BOS, 99]});
        let mut answer = timeless(server.ok(PATH, body).await);
        assert_eq!(answer["meta_info"]["id"].take().as_str().unwrap().len(), 32);
        let mut expected = expected;
        expected["meta_info"]["id"].take();
        assert_eq!(answer, expected);
        let seen = server.seen.requests.lock().unwrap();
        assert_eq!((&seen[0].prompt, &seen[1].prompt), (&vec![BOS, 99], &vec![BOS, 99]));
        assert_eq!((seen[0].params.temperature, seen[0].params.max_tokens), (0.0, 128));
    })
    .await;
}

#[tokio::test]
async fn lists_and_several_samples_are_answered_with_lists() {
    within(async {
        let server = Server::start(echoes()).await;
        let said = async |body: Value| -> Vec<(String, String)> {
            let answer = server.ok(PATH, body).await;
            let outputs = answer.as_array().unwrap().iter();
            let text = |value: &Value| value.as_str().unwrap().to_string();
            outputs.map(|out| (text(&out["text"]), text(&out["meta_info"]["id"]))).collect()
        };
        let pairs = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
            pairs.iter().map(|(a, b)| ((*a).into(), (*b).into())).collect()
        };
        let body = json!({"text": ["a"], "rid": "r"});
        assert_eq!(said(body).await, pairs(&[("a0", "r_0")]));
        let body = json!({"text": "a", "rid": "r", "sampling_params": {"n": 2}});
        assert_eq!(said(body).await, pairs(&[("a0", "r_0"), ("a1", "r_1")]));
        let body = json!({"input_ids": [[99], [99, 100]], "rid": ["x", "y"]});
        assert_eq!(said(body).await, pairs(&[("a0", "x"), ("b0", "y")]));
        let body = json!({"text": ["a", "b"], "rid": ["x", "y"], "sampling_params": {"n": 2}});
        let expected = [("a0", "x_0"), ("a1", "x_1"), ("b0", "y_0"), ("b1", "y_1")];
        assert_eq!(said(body).await, pairs(&expected));
    })
    .await;
}

#[tokio::test]
async fn logprobs_are_pairs_with_ids_and_text() {
    within(async {
        let server = Server::start(echoes()).await;
        let mut body = json!({"input_ids": [BOS, HELLO, 99], "return_logprob": true});
        let meta = server.ok(PATH, body.clone()).await["meta_info"].take();
        let pairs = json!([[-0.125, 99, null], [-0.25, 50, null], [-0.375, EOS, null]]);
        assert_eq!(meta["output_token_logprobs"], pairs);
        assert_eq!(meta["output_token_logprobs_length"], 3);
        assert_eq!(meta["input_token_logprobs"], json!([]));
        assert!(meta.get("output_top_logprobs").is_none());
        assert_eq!(meta["policy"]["entropy"], json!([0.5, 0.75, 1.0]));
        assert_eq!(server.seen.requests.lock().unwrap()[0].params.prompt_logprobs, None);

        body["top_logprobs_num"] = 2.into();
        body["logprob_start_len"] = 1.into();
        body["return_text_in_logprobs"] = true.into();
        body["return_prompt_token_ids"] = true.into();
        let answer = server.ok(PATH, body.clone()).await;
        assert_eq!(answer["prompt_token_ids"], json!([BOS, HELLO, 99]));
        let meta = &answer["meta_info"];
        assert_eq!(meta["output_token_logprobs"][1], json!([-0.25, 50, "0"]));
        let top = json!([[-0.125, 99, "a"], [-1.125, 100, "b"]]);
        assert_eq!(meta["output_top_logprobs"][0], top);
        let input = json!([[null, HELLO, "hello"], [-1.0, 99, "a"]]);
        assert_eq!(meta["input_token_logprobs"], input);
        let top = json!([null, [[-1.0, 100, "b"], [-1.25, 101, "c"]]]);
        assert_eq!(meta["input_top_logprobs"], top);
        let params = server.seen.requests.lock().unwrap()[1].params.clone();
        assert_eq!((params.top_logprobs, params.prompt_logprobs), (2, Some(2)));
        body["logprob_start_len"] = 0.into();
        let meta = server.ok(PATH, body).await["meta_info"].take();
        assert_eq!(meta["input_token_logprobs"].as_array().unwrap().len(), 3);
        assert_eq!(meta["input_token_logprobs"][0], json!([null, BOS, "<s>"]));
    })
    .await;
}

#[tokio::test]
async fn samples_end_for_a_reason() {
    within(async {
        let server = Server::start(Script::saying(|_, _| bytes("abcdef"))).await;
        let end = async |sampling: Value| -> (Value, Value) {
            let body = json!({"text": "a", "sampling_params": sampling});
            let mut answer = server.ok(PATH, body).await;
            (answer["text"].take(), answer["meta_info"]["finish_reason"].take())
        };
        let length = json!({"type": "length", "length": 2});
        assert_eq!(end(json!({"max_new_tokens": 2})).await, (json!("ab"), length));
        let stop = json!({"type": "stop", "matched": "cd"});
        assert_eq!(end(json!({"stop": "cd"})).await, (json!("ab"), stop.clone()));
        let kept = end(json!({"stop": ["cd"], "no_stop_trim": true})).await;
        assert_eq!(kept, (json!("abcd"), stop));
        let b = bytes("b")[0];
        let stop = json!({"type": "stop", "matched": b});
        assert_eq!(end(json!({"stop_token_ids": [b]})).await, (json!("a"), stop));
    })
    .await;
}

#[tokio::test]
async fn every_sampling_field_reaches_the_engine() {
    within(async {
        let server = Server::start(echoes()).await;
        let body = json!({"text": "a", "priority": 4, "extra_key": "pepper", "session_id": "s",
        "sampling_params": {
            "n": 2, "temperature": 0.5, "top_p": 0.75, "top_k": 40, "min_p": 0.25,
            "sampling_seed": 11, "max_new_tokens": 20, "min_new_tokens": 2, "ignore_eos": true,
            "stop_token_ids": [5], "skip_special_tokens": false, "regex": "a+",
            "spaces_between_special_tokens": false, "frequency_penalty": 0,
            "presence_penalty": 0, "repetition_penalty": 1, "logit_bias": null,
        }});
        server.ok(PATH, body).await;
        let seen = server.seen.requests.lock().unwrap()[0].clone();
        let expected = SamplingParams {
            n: 2,
            temperature: 0.5,
            top_p: 0.75,
            top_k: 40,
            min_p: 0.25,
            seed: Some(11),
            max_tokens: 20,
            min_tokens: 2,
            ignore_eos: true,
            stop_token_ids: vec![5],
            grammar: Some(Grammar::Regex("a+".into())),
            ..SamplingParams::default()
        };
        assert_eq!(seen.params, expected);
        assert_eq!((seen.priority, seen.cache_salt.as_deref()), (-4, Some("pepper")));
        let body = json!({"text": "a", "cache_salt": "salt",
            "sampling_params": {"json_schema": "{\"type\": \"object\"}"}});
        server.ok(PATH, body).await;
        let seen = server.seen.requests.lock().unwrap()[1].clone();
        assert_eq!(seen.cache_salt.as_deref(), Some("salt"));
        assert_eq!(seen.params.grammar, Some(Grammar::JsonSchema(json!({"type": "object"}))));
    })
    .await;
}

#[tokio::test]
async fn a_stream_says_more_with_every_event() {
    within(async {
        let server = Server::start(echoes()).await;
        let mut body = json!({"text": "a", "return_logprob": true, "logprob_start_len": 0,
            "rid": "r"});
        let whole = timeless(server.ok(PATH, body.clone()).await);
        let (mut events, done) = server.stream(PATH, body.clone()).await;
        assert!(done);
        let last = timeless(events.pop().unwrap());
        assert_eq!(last, whole);
        let texts: Vec<&str> = events.iter().map(|e| e["text"].as_str().unwrap()).collect();
        assert_eq!(texts, ["a", "a0", "a0"]);
        assert_eq!(events[0]["output_ids"], json!([99]));
        assert_eq!(events[1]["output_ids"], json!([99, 50]));
        for event in &events {
            assert!(event["meta_info"]["finish_reason"].is_null() && event.get("index").is_none());
            let input = &event["meta_info"]["input_token_logprobs"];
            assert_eq!(*input, whole["meta_info"]["input_token_logprobs"]);
        }
        body["sampling_params"] = json!({"n": 2});
        let wholes = timeless(server.ok(PATH, body.clone()).await);
        let (events, done) = server.stream(PATH, body).await;
        assert!(done);
        for index in 0..2 {
            let last = events.iter().rfind(|event| event["index"] == index);
            let mut last = timeless(last.unwrap().clone());
            last.as_object_mut().unwrap().remove("index");
            assert_eq!(last, wholes[index]);
        }
    })
    .await;
}

#[tokio::test]
async fn neutral_values_are_taken() {
    within(async {
        let server = Server::start(echoes()).await;
        let body = json!({"text": "a", "sampling_params": null, "image_data": [],
            "return_logprob": false, "logprob_start_len": -1, "top_logprobs_num": 0,
            "return_text_in_logprobs": true, "return_hidden_states": false, "lora_path": null,
            "stream": false, "log_metrics": true, "no_logs": true, "routed_dp_rank": 0,
            "return_routed_experts": false, "session_params": null, "token_ids_logprob": null});
        server.ok(PATH, body).await;
        let sampling = json!({"ebnf": null, "structural_tag": null, "stop_regex": [],
            "custom_params": null, "stream_interval": 1, "beam_width": 1});
        server.ok(PATH, json!({"text": "a", "sampling_params": sampling})).await;
    })
    .await;
}

#[tokio::test]
async fn wrong_fields_are_named() {
    within(async {
        let server = Server::start(echoes()).await;
        let cases = [
            (json!({"text": null}), "input_ids"),
            (json!({"input_ids": [1]}), "input_ids"),
            (json!({"text": [1]}), "text"),
            (json!({"text": []}), "text"),
            (json!({"text": null, "input_ids": "a"}), "input_ids"),
            (json!({"text": null, "input_ids": []}), "input_ids"),
            (json!({"text": null, "input_ids": [[]]}), "input_ids"),
            (json!({"text": null, "input_ids": [VOCAB]}), "input_ids"),
            (json!({"text": null, "input_ids": [-1]}), "input_ids"),
            (json!({"rid": ["a", "b"]}), "rid"),
            (json!({"text": ["a", "b"], "rid": ["x", "x"]}), "rid"),
            (json!({"rid": 5}), "rid"),
            (json!({"sampling_params": [{}]}), "sampling_params"),
            (json!({"return_logprob": [true]}), "return_logprob"),
            (json!({"top_logprobs_num": 1}), "top_logprobs_num"),
            (json!({"logprob_start_len": 0}), "logprob_start_len"),
            (json!({"return_logprob": true, "logprob_start_len": -2}), "logprob_start_len"),
            (json!({"return_logprob": true, "logprob_start_len": 2}), "logprob_start_len"),
            (json!({"return_logprob": true, "top_logprobs_num": 21}), "top_logprobs_num"),
            (json!({"token_ids_logprob": [1]}), "token_ids_logprob"),
            (json!({"image_data": ["x"]}), "image_data"),
            (json!({"input_embeds": [[0.5]]}), "input_embeds"),
            (json!({"return_hidden_states": true}), "return_hidden_states"),
            (json!({"return_routed_experts": true}), "return_routed_experts"),
            (json!({"return_entropy": true}), "return_entropy"),
            (json!({"return_sampling_mask": true}), "return_sampling_mask"),
            (json!({"lora_path": "x"}), "lora_path"),
            (json!({"session_params": {"id": "x"}}), "session_params"),
            (json!({"custom_logit_processor": "x"}), "custom_logit_processor"),
            (json!({"bootstrap_host": "x"}), "bootstrap_host"),
            (json!({"data_parallel_rank": 1}), "data_parallel_rank"),
            (json!({"extra_key": "x", "cache_salt": "y"}), "extra_key"),
            (json!({"extra_key": ""}), "extra_key"),
            (json!({"priority": 1.5}), "priority"),
            (json!({"max_new_tokens": 5}), "max_new_tokens"),
            (json!({"prompts": ["a"]}), "prompts"),
        ];
        for (more, param) in cases {
            let mut body = json!({"text": "a"});
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            assert_eq!(server.refused(PATH, body).await.0, param);
        }
        let sampling = [
            json!({"max_new_tokens": 0}),
            json!({"max_new_tokens": 255}),
            json!({"min_new_tokens": 129}),
            json!({"sampling_seed": "x"}),
            json!({"n": 9}),
            json!({"temperature": -1}),
            json!({"stop": 5}),
            json!({"no_stop_trim": 5}),
            json!({"ebnf": "root ::= \"a\""}),
            json!({"structural_tag": "x"}),
            json!({"stop_regex": "x"}),
            json!({"custom_params": {"a": 1}}),
            json!({"json_schema": "{"}),
            json!({"regex": "a", "json_schema": "{}"}),
            json!({"max_tokens": 5}),
            json!({"return_token_ids": true}),
        ];
        for params in sampling {
            let name = params.as_object().unwrap().keys().next().unwrap().clone();
            let body = json!({"text": "a", "sampling_params": params});
            assert_eq!(server.refused(PATH, body).await.0, format!("sampling_params.{name}"));
        }
    })
    .await;
}

#[tokio::test]
async fn refusals_of_the_engine_name_the_clients_field() {
    within(async {
        let refuses = Some((0, EngineError::invalid("min_tokens", "is odd")));
        let server = Server::start(Script { refuses, ..echoes() }).await;
        let (param, message) = server.refused(PATH, json!({"text": "a"})).await;
        let path = "sampling_params.min_new_tokens";
        assert_eq!((param.as_str(), message), (path, format!("{path}: is odd")));
        let refuses = Some((0, EngineError::Overloaded { waiting: 1 }));
        let server = Server::start(Script { refuses, ..echoes() }).await;
        assert_eq!(server.post(PATH, json!({"text": "a"})).await.0, 429);
    })
    .await;
}

#[tokio::test]
async fn an_engine_that_fails_ends_the_answer() {
    within(async {
        let server = Server::start(Script { fails_at: Some(0), ..echoes() }).await;
        assert_eq!(server.post(PATH, json!({"text": "a"})).await.0, 500);
        let (events, done) = server.stream(PATH, json!({"text": "a"})).await;
        assert!(!done);
        assert_eq!(events[0]["error"]["type"], "internal_server_error");
        let server = Server::start(echoes()).await;
        let answer = server.ok(PATH, json!({"text": "a"})).await;
        assert_eq!(answer["meta_info"]["weight_version"], VERSION.to_string());
    })
    .await;
}
