//! What fields about sampling and prompts become in answers, and what bad words and truncation come
//! to at the engine.

use crate::scripted::{MAX_MODEL_LEN, Script, VERSION};
use crate::server::{Server, within};
use crate::tokenizer::{BOS, EOS, HELLO, bytes};
use crate::{CHAT, COMPLETIONS};
use onpolicy_plugin_api::Request;
use serde_json::{Value, json};

async fn server() -> Server {
    Server::start(Script::saying(|_, _| bytes("ok"))).await
}

fn last(server: &Server) -> Request {
    server.seen.requests.lock().unwrap().last().unwrap().clone()
}

#[tokio::test]
async fn bad_words_are_tokenized_with_and_without_a_space() {
    within(async {
        let server = server().await;
        let words = async |words: Value| {
            server.ok(COMPLETIONS, json!({"prompt": "a", "bad_words": words})).await;
            let plain = last(&server).params.bad_words;
            let chat = json!({"messages": [{"role": "user", "content": "a"}], "bad_words": words});
            server.ok(CHAT, chat).await;
            assert_eq!(last(&server).params.bad_words, plain);
            plain
        };
        // A space is a token of its own here: with it the words end as they do without.
        assert_eq!(words(json!(["no"])).await, [bytes("no")]);
        assert_eq!(words(json!(["  no", "no", "hello"])).await, [bytes("no"), vec![HELLO]]);
        assert_eq!(words(json!(["o", "no"])).await, [bytes("o")]);
    })
    .await;
}

#[tokio::test]
async fn prompt_logprobs_have_vllms_shape() {
    within(async {
        let server = server().await;
        let body = json!({"prompt": ["abc", "d"], "prompt_logprobs": 2, "n": 2, "max_tokens": 1});
        let answer = server.ok(COMPLETIONS, body).await;
        let entry = |logprob: f32, rank: u32, text: &str| {
            json!({"logprob": logprob, "rank": rank, "decoded_token": text})
        };
        // Token 99 is `a`. The likeliest tokens at the second position are `c` and `d`.
        let abc = json!([
            null,
            {"99": entry(-0.0, 1, "a"), "100": entry(-0.25, 2, "b")},
            {"100": entry(-1.0, 3, "b"), "101": entry(-1.0, 1, "c"), "102": entry(-1.25, 2, "d")},
            {"101": entry(-2.0, 1, "c"), "102": entry(-2.25, 2, "d")},
        ]);
        let d = json!([null, {"102": entry(-0.0, 1, "d"), "103": entry(-0.25, 2, "e")}]);
        let choices = answer["choices"].as_array().unwrap();
        for (choice, want) in choices.iter().zip([&abc, &abc, &d, &d]) {
            assert_eq!(choice["prompt_logprobs"].to_string(), want.to_string());
            assert_eq!(choice["logprobs"], Value::Null);
        }
        assert_eq!(answer.get("prompt_logprobs"), None);

        let chat = json!({"messages": [{"role": "user", "content": "a"}], "prompt_logprobs": 1});
        let answer = server.ok(CHAT, chat).await;
        let list = answer["prompt_logprobs"].as_array().unwrap();
        assert_eq!(list.len(), last(&server).prompt.len());
        assert_eq!(list[0], Value::Null);
        let want = json!({"119": entry(-0.0, 1, "u")});
        assert_eq!(list[1].to_string(), want.to_string());
        assert_eq!(answer["choices"][0].get("prompt_logprobs"), None);
    })
    .await;
}

#[tokio::test]
async fn prompt_logprobs_0_lists_the_prompts_own_tokens_and_their_ranks() {
    within(async {
        let server = server().await;
        let body = json!({"prompt": "ab", "prompt_logprobs": 0, "max_tokens": 1});
        let answer = server.ok(COMPLETIONS, body).await;
        let list = &answer["choices"][0]["prompt_logprobs"];
        let want = json!([
            null,
            {"99": {"logprob": -0.0, "rank": 1, "decoded_token": "a"}},
            {"100": {"logprob": -1.0, "rank": 2, "decoded_token": "b"}},
        ]);
        assert_eq!(list.to_string(), want.to_string());
        // A rank takes all logits, so the engine is asked for one alternative.
        assert_eq!(last(&server).params.prompt_logprobs, Some(1));
        // Together with an echo, each shows as many alternatives as it was asked for.
        let body = json!({"prompt": "ab", "prompt_logprobs": 3, "echo": true, "logprobs": 1,
            "max_tokens": 1});
        let answer = server.ok(COMPLETIONS, body).await;
        assert_eq!(last(&server).params.prompt_logprobs, Some(3));
        let choice = &answer["choices"][0];
        assert_eq!(choice["prompt_logprobs"][1].as_object().unwrap().len(), 3);
        let top = json!([null, {"a": -0.0}, {"c": -1.0, "b": -1.0}, {"o": -0.125}]);
        assert_eq!(choice["logprobs"]["top_logprobs"].to_string(), top.to_string());
    })
    .await;
}

#[tokio::test]
async fn a_prompt_is_cut_from_its_beginning() {
    within(async {
        let server = server().await;
        let prompt = async |mut body: Value, tokens: i64| {
            body["truncate_prompt_tokens"] = tokens.into();
            let answer = server.ok(COMPLETIONS, body).await;
            let request = last(&server);
            assert_eq!(answer["usage"]["prompt_tokens"], request.prompt.len());
            (request.prompt, answer["choices"][0]["text"].as_str().unwrap().to_string())
        };
        let (ids, _) = prompt(json!({"prompt": "abc"}), 2).await;
        assert_eq!(ids, bytes("bc"));
        let (ids, text) = prompt(json!({"prompt": "abc", "echo": true}), 2).await;
        assert_eq!((ids, text.as_str()), (bytes("bc"), "bcok"));
        let (ids, text) = prompt(json!({"prompt": "abc", "echo": true}), 4).await;
        assert_eq!((ids, text.as_str()), ([vec![BOS], bytes("abc")].concat(), "abcok"));
        let (ids, _) = prompt(json!({"prompt": [5, 6, 7]}), 1).await;
        assert_eq!(ids, [7]);
        // -1 leaves room for what is generated.
        let long = "x".repeat(MAX_MODEL_LEN + 40);
        let (ids, _) = prompt(json!({"prompt": long, "max_tokens": 10}), -1).await;
        assert_eq!(ids.len(), MAX_MODEL_LEN - 10);
        let (ids, _) = prompt(json!({"prompt": long}), -1).await;
        assert_eq!(ids.len(), MAX_MODEL_LEN - 1);
        assert_eq!(last(&server).params.max_tokens, 1);

        let chat = json!({"messages": [{"role": "user", "content": "abc"}],
            "truncate_prompt_tokens": 11, "max_completion_tokens": 3});
        server.ok(CHAT, chat).await;
        assert_eq!(last(&server).prompt, bytes("[assistant]"));
    })
    .await;
}

/// The version at the start, at each token, and at both ends of a choice, whole and streamed, also
/// where no log-probs are asked for.
#[tokio::test]
async fn answers_carry_weight_versions_without_logprobs_too() {
    within(async {
        let mut script = Script::saying(|_, _| bytes("abc"));
        script.swap_at = 2;
        let server = Server::start(script).await;
        let (old, new) = (VERSION, VERSION + 1);
        let chat = json!({"messages": [{"role": "user", "content": "a"}]});
        for (path, body) in [(COMPLETIONS, json!({"prompt": "a"})), (CHAT, chat)] {
            let answer = server.ok(path, body.clone()).await;
            assert_eq!(answer["weight_version"], old);
            assert_eq!(answer["choices"][0]["weight_versions"], json!([old, new]));
            assert_eq!(answer["choices"][0].get("policy"), None);
            let mut with_ids = body.clone();
            with_ids["return_token_ids"] = true.into();
            let answer = server.ok(path, with_ids.clone()).await;
            let choice = &answer["choices"][0];
            assert_eq!(choice["token_ids"], json!([bytes("abc"), vec![EOS]].concat()));
            assert_eq!(choice["policy"], json!({"weight_version": [old, old, new, new]}));

            let (chunks, done) = server.stream(path, body).await;
            assert!(done && chunks.iter().all(|chunk| chunk["weight_version"] == old));
            let ends = |chunks: &[Value]| chunks.last().unwrap()["choices"][0].clone();
            assert_eq!(ends(&chunks)["weight_versions"], json!([old, new]));
            let (chunks, _) = server.stream(path, with_ids).await;
            assert_eq!(ends(&chunks)["weight_versions"], json!([old, new]));
            let versions: Vec<Value> = chunks
                .iter()
                .filter_map(|chunk| chunk.pointer("/choices/0/policy/weight_version")?.as_array())
                .flatten()
                .cloned()
                .collect();
            assert_eq!(json!(versions), json!([old, old, new, new]));
        }
    })
    .await;
}
