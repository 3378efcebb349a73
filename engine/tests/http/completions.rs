//! Whole answers of `/v1/completions`.

use crate::COMPLETIONS;
use crate::scripted::{MODEL, Script, stats};
use crate::server::{Server, within};
use crate::tokenizer::{BOS, EOS, HELLO, bytes};
use serde_json::{Value, json};

fn says(text: &'static str) -> Script {
    Script::saying(move |_, _| bytes(text))
}

#[tokio::test]
async fn an_answer_has_openais_shape() {
    within(async {
        let server = Server::start(says("ok")).await;
        let mut answer = server.ok(COMPLETIONS, json!({"model": MODEL, "prompt": "hi"})).await;
        let id = answer["id"].take();
        assert!(id.as_str().unwrap().starts_with("cmpl-"), "{id}");
        assert!(answer["created"].take().as_u64().unwrap() > 1_700_000_000);
        let expected = json!({
            "id": null, "object": "text_completion", "created": null, "model": MODEL,
            "weight_version": 7,
            "choices": [{
                "index": 0, "text": "ok", "logprobs": null, "finish_reason": "stop",
                "stop_reason": null, "weight_versions": [7, 7],
            }],
            "usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6},
        });
        assert_eq!(answer, expected);
    })
    .await;
}

#[tokio::test]
async fn logprobs_and_policy_are_aligned_with_the_tokens() {
    within(async {
        let mut script = says("aé");
        script.swap_at = 2;
        let server = Server::start(script).await;
        let body = json!({"prompt": "hi", "logprobs": 1, "return_token_ids": true});
        let answer = server.ok(COMPLETIONS, body).await;
        let choice = &answer["choices"][0];
        assert_eq!(choice["text"], "aé");
        assert_eq!(choice["prompt_token_ids"], json!([BOS, 106, 107]));
        let ids = [bytes("aé"), vec![EOS]].concat();
        assert_eq!(choice["token_ids"], json!(ids));
        let logprobs = &choice["logprobs"];
        assert_eq!(logprobs["tokens"], json!(["a", "\u{fffd}", "\u{fffd}", "</s>"]));
        assert_eq!(logprobs["token_logprobs"], json!([-0.125, -0.25, -0.375, -0.5]));
        assert_eq!(logprobs["text_offset"], json!([0, 1, 1, 2]));
        let top = json!([{"a": -0.125}, {"\u{fffd}": -0.25}, {"\u{fffd}": -0.375}, {"</s>": -0.5}]);
        assert_eq!(logprobs["top_logprobs"], top);
        assert_eq!(choice["weight_versions"], json!([7, 8]));
        let discriminator: Vec<f32> = (0..4).map(|i| stats(i).discriminator()).collect();
        let read = choice["policy"]["discriminator"].as_array().unwrap().iter();
        let read: Vec<f32> = read.map(|v| v.as_f64().unwrap() as f32).collect();
        assert_eq!(read, discriminator);
        assert_eq!(choice["policy"]["entropy"], json!([0.5, 0.75, 1.0, 1.25]));
        assert_eq!(choice["policy"]["baseline"], json!([0.0, 0.0625, 0.125, 0.1875]));
        assert_eq!(choice["policy"]["weight_version"], json!([7, 7, 8, 8]));
    })
    .await;
}

#[tokio::test]
async fn alternatives_are_named_and_ranked() {
    within(async {
        let server = Server::start(says("a")).await;
        let body = json!({"prompt": "hi", "logprobs": 3, "max_tokens": 1});
        let answer = server.ok(COMPLETIONS, body).await;
        let choice = &answer["choices"][0];
        let top = &choice["logprobs"]["top_logprobs"][0];
        assert_eq!(*top, json!({"a": -0.125, "b": -1.125, "c": -2.125}));
        assert_eq!(top.as_object().unwrap().keys().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(choice["finish_reason"], "length");
        let body = json!({"prompt": "hi", "logprobs": 0, "return_tokens_as_token_ids": true});
        let answer = server.ok(COMPLETIONS, body).await;
        let logprobs = &answer["choices"][0]["logprobs"];
        assert_eq!(logprobs["tokens"], json!(["token_id:99", "token_id:1"]));
        assert_eq!(logprobs["top_logprobs"][0], json!({"token_id:99": -0.125}));
    })
    .await;
}

#[tokio::test]
async fn prompts_come_in_four_shapes() {
    within(async {
        let script = Script::saying(|request, index| {
            let last = char::from_u32(*request.prompt.last().unwrap() - 2).unwrap();
            bytes(&format!("{last}{index}"))
        });
        let server = Server::start(script).await;
        let texts = async |prompt: Value, n: usize| -> Vec<String> {
            let answer = server.ok(COMPLETIONS, json!({"prompt": prompt, "n": n})).await;
            let choices = answer["choices"].as_array().unwrap();
            for (i, choice) in choices.iter().enumerate() {
                assert_eq!(choice["index"], i);
            }
            choices.iter().map(|c| c["text"].as_str().unwrap().to_string()).collect()
        };
        assert_eq!(texts(json!("a"), 1).await, ["a0"]);
        assert_eq!(texts(json!(["a", "b"]), 2).await, ["a0", "a1", "b0", "b1"]);
        assert_eq!(texts(json!([99, 100]), 1).await, ["b0"]);
        assert_eq!(texts(json!([[99], [99, 100]]), 3).await, ["a0", "a1", "a2", "b0", "b1", "b2"]);
        let seen: Vec<Vec<u32>> =
            server.seen.requests.lock().unwrap().iter().map(|r| r.prompt.clone()).collect();
        let all: [&[u32]; 6] = [&[BOS, 99], &[BOS, 99], &[BOS, 100], &[99, 100], &[99], &[99, 100]];
        assert_eq!(seen, all);
        let answer = server.ok(COMPLETIONS, json!({"prompt": ["a", "bc"], "n": 2})).await;
        let usage = json!({"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17});
        assert_eq!(answer["usage"], usage);
    })
    .await;
}

#[tokio::test]
async fn special_tokens_are_added_and_skipped_on_demand() {
    within(async {
        let script = Script::saying(|_, _| vec![HELLO, BOS, 99]);
        let server = Server::start(script).await;
        let body = json!({"prompt": "hello</s>", "add_special_tokens": false});
        assert_eq!(server.ok(COMPLETIONS, body).await["choices"][0]["text"], "helloa");
        assert_eq!(server.seen.requests.lock().unwrap()[0].prompt, [HELLO, EOS]);
        let body = json!({"prompt": "a", "skip_special_tokens": false, "ignore_eos": true, "max_tokens": 4});
        assert_eq!(server.ok(COMPLETIONS, body).await["choices"][0]["text"], "hello<s>a</s>");
        let body = json!({"prompt": "a", "skip_special_tokens": false});
        assert_eq!(server.ok(COMPLETIONS, body).await["choices"][0]["text"], "hello<s>a");
    })
    .await;
}

#[tokio::test]
async fn echo_puts_the_prompt_first() {
    within(async {
        let server = Server::start(says("ok")).await;
        let body = json!({"prompt": "héy", "echo": true});
        assert_eq!(server.ok(COMPLETIONS, body).await["choices"][0]["text"], "héyok");
        let body = json!({"prompt": [HELLO, 99], "echo": true});
        assert_eq!(server.ok(COMPLETIONS, body).await["choices"][0]["text"], "helloaok");

        let body = json!({"prompt": "héy", "echo": true, "logprobs": 1, "max_tokens": 1, "n": 2});
        let answer = server.ok(COMPLETIONS, body).await;
        assert_eq!(server.seen.requests.lock().unwrap()[2].params.prompt_logprobs, Some(1));
        for choice in answer["choices"].as_array().unwrap() {
            assert_eq!(choice["text"], "héyo");
            let logprobs = &choice["logprobs"];
            let tokens = json!(["<s>", "h", "\u{fffd}", "\u{fffd}", "y", "o"]);
            assert_eq!(logprobs["tokens"], tokens);
            let values = json!([null, 0.0, -1.0, -2.0, -3.0, -0.125]);
            assert_eq!(
                logprobs["token_logprobs"].to_string(),
                values.to_string().replace("0.0,", "-0.0,")
            );
            assert_eq!(logprobs["text_offset"], json!([0, 0, 1, 1, 2, 3]));
            // As lm-eval reads it: the likeliest token, and the token itself where that is another.
            let top = json!([null, {"h": -0.0}, {"\u{fffd}": -1.0}, {"\u{fffd}": -2.0},
                {"z": -3.0, "y": -3.0}, {"o": -0.125}]);
            assert_eq!(logprobs["top_logprobs"].to_string(), top.to_string());
            let entropy = json!([null, null, null, null, null, 0.5]);
            assert_eq!(choice["policy"]["entropy"], entropy);
        }
        assert_eq!(answer["usage"]["completion_tokens"], 2);

        // Without alternatives the engine is spared the work.
        let body = json!({"prompt": "hey", "echo": true, "logprobs": 0, "max_tokens": 1});
        let answer = server.ok(COMPLETIONS, body).await;
        assert_eq!(server.seen.requests.lock().unwrap()[3].params.prompt_logprobs, Some(0));
        let top = json!([null, {"he": -0.0}, {"y": -1.0}, {"o": -0.125}]);
        let got = &answer["choices"][0]["logprobs"]["top_logprobs"];
        assert_eq!(got.to_string(), top.to_string());
    })
    .await;
}
