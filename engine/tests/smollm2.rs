//! The real model against what transformers computes for the same weights.

mod common;

use common::{assert_close, engine, floats, golden, ids, json, smollm2};
use onpolicy_engine::{chat::Chat, collect::collect, engine::EngineConfig};
use onpolicy_plugin_api::{Request, SamplingParams};
use serde_json::Value;
use std::time::{Duration, Instant};

/// Below this the two likeliest tokens are too close for rounding to leave their order alone.
const MARGIN: f64 = 0.05;

#[test]
fn greedy_answers_are_those_of_transformers() {
    let checkpoint = smollm2();
    let config = EngineConfig { kv_memory: 128 << 20, ..EngineConfig::default() };
    let engine = engine(&checkpoint, config);
    let golden = json(&golden("smollm2_reference.json"));
    let cases = golden["f32_weights_f32_compute"].as_array().expect("cases");
    let sure = |case: &&Value| case["min_margin"].as_f64().expect("a margin") > MARGIN;
    let mut checked = 0;
    for case in cases.iter().filter(sure) {
        let messages = case["messages"].as_array().expect("messages").clone();
        let chat = Chat { messages, add_generation_prompt: true, ..Chat::default() };
        let prompt = checkpoint.tokenizer.encode_chat(&chat).expect("a prompt");
        assert_eq!(prompt, ids(&case["prompt_ids"]));
        let want = ids(&case["greedy_ids"]);
        let params = SamplingParams {
            temperature: 0.0,
            max_tokens: want.len(),
            prompt_logprobs: Some(0),
            ..SamplingParams::default()
        };
        let deadline = Instant::now() + Duration::from_secs(60);
        let answer = collect(&engine, vec![Request::new(prompt, params)], deadline, &mut || {});
        let tokens = &answer.expect("an answer")[0].samples[0].tokens;
        let got: Vec<u32> = tokens.iter().map(|token| token.id).collect();
        assert_eq!(got, want, "{}", case["text"]);
        let logprobs: Vec<f32> = tokens.iter().map(|token| token.stats.logprob).collect();
        // The reference has four decimals.
        assert_close(&logprobs, &floats(&case["logprobs"]), 5e-4, "log-prob");
        checked += 1;
    }
    assert_eq!(checked, 3, "three of the four cases leave enough margin");
}
