//! Two engines that share nothing but the sampler must compute the same distributions.

use crate::{
    common::{self, TINY, assert_close, floats, golden, json, smollm2},
    support::{ask, ask_all, greedy, ids, serve, tiny, write},
};
use onpolicy_engine::{engine::EngineConfig, mistral::Options};
use onpolicy_plugin_api::{Engine, LogprobsMode, Request, SamplingParams};
use serde_json::Value;

/// Below this, in nats, the two likeliest tokens are too close for rounding to leave their order
/// alone. It is ten times the largest difference of log-probs seen between the engines.
const MARGIN: f64 = 0.01;

/// Largest difference between the engines' log-probs, entropies and baselines on the real model.
const TOLERANCE: f32 = 1e-3;

#[test]
fn log_probs_of_known_models_are_in_nats() {
    for name in TINY {
        let reference = json(&golden(&format!("tiny/{name}/reference.json")));
        let engine = tiny(name);
        for row in 0..2 {
            let tokens = common::ids(&reference["input_ids"][row]);
            let (logprobs, entropies) = (
                floats(&reference["next_token_logprobs"][row]),
                floats(&reference["entropy"][row]),
            );
            // The distribution after each prefix; of the token that the reference names where the
            // list of the likeliest has it.
            // Beyond a sliding window mistral.rs 0.8.1 computes something else on a CPU.
            let within = common::tiny(name).config.layer_window.iter().flatten().min().copied();
            let mut prefixes = vec![1, 7, 20, tokens.len() - 1];
            prefixes.retain(|&len| within.is_none_or(|window| len <= window));
            let params = SamplingParams { top_logprobs: 20, max_tokens: 1, ..greedy(1) };
            let request = |&len: &usize| Request::new(tokens[..len].to_vec(), params.clone());
            let answers = ask_all(&engine, prefixes.iter().map(request).collect());
            for (len, samples) in prefixes.into_iter().zip(answers) {
                let token = &samples[0].tokens[0];
                assert_close(&[token.stats.entropy], &entropies[len - 1..len], 2e-4, name);
                let named = token.top.iter().find(|(id, _)| *id == tokens[len]);
                if let Some((_, logprob)) = named {
                    assert_close(&[*logprob], &logprobs[len - 1..len], 2e-4, name);
                }
                assert_eq!(token.stats.logprob, token.top[0].1, "{name}");
            }
        }
    }
}

#[test]
fn seeded_samples_are_those_of_the_native_engine() {
    let checkpoint = common::tiny("llama-tied");
    let native =
        common::engine(&checkpoint, EngineConfig { kv_memory: 8 << 20, ..EngineConfig::default() });
    let over = tiny("llama-tied");
    let kinds = [
        SamplingParams::default(),
        SamplingParams { temperature: 0.7, top_k: 30, ..SamplingParams::default() },
        SamplingParams { top_p: 0.8, min_p: 0.01, min_tokens: 9, ..SamplingParams::default() },
        SamplingParams {
            repetition_penalty: 1.3,
            presence_penalty: 0.4,
            frequency_penalty: 0.2,
            logit_bias: vec![(9, 4.0)],
            ..SamplingParams::default()
        },
        SamplingParams {
            allowed_token_ids: Some((3..90).collect()),
            bad_words: vec![vec![5], vec![9, 10]],
            logprobs_mode: LogprobsMode::Raw,
            ..SamplingParams::default()
        },
    ];
    for (seed, params) in kinds.into_iter().enumerate() {
        let params = SamplingParams { n: 3, seed: Some(seed as u64), max_tokens: 24, ..params };
        let want = ask(&native, &[5, 6, 7, 8], params.clone());
        let got = ask(&over, &[5, 6, 7, 8], params);
        for (want, got) in want.iter().zip(&got) {
            assert_eq!(ids(got), ids(want));
            assert_eq!(got.finish, want.finish);
            for (got, want) in got.tokens.iter().zip(&want.tokens) {
                let numbers = |t: &onpolicy_plugin_api::Token| {
                    [t.stats.logprob, t.stats.entropy, t.stats.baseline]
                };
                assert_close(&numbers(got), &numbers(want), 2e-5, "statistics");
            }
        }
    }
}

/// Prompts of the reference, and prompts that make the answer run on.
fn prompts(golden: &Value) -> Vec<Vec<u32>> {
    let cases = golden["f32_weights_f32_compute"].as_array().expect("cases");
    cases.iter().map(|case| common::ids(&case["prompt_ids"])).collect()
}

#[test]
fn greedy_answers_of_the_real_model_are_those_of_the_native_engine() {
    let checkpoint = smollm2();
    let dir = tempfile::tempdir().expect("a directory");
    write(&checkpoint, dir.path(), 1.0);
    let native = common::engine(
        &checkpoint,
        EngineConfig { kv_memory: 128 << 20, ..EngineConfig::default() },
    );
    let over = serve(dir.path(), Options::default());
    assert_eq!(over.info().eos_token_ids, native.info().eos_token_ids);
    assert_eq!(over.info().vocab_size, native.info().vocab_size);
    let prompts = prompts(&json(&golden("smollm2_reference.json")));
    let params = SamplingParams { top_logprobs: 2, ..greedy(32) };
    let requests = || prompts.iter().map(|p| Request::new(p.clone(), params.clone())).collect();
    let (want, got) = (ask_all(&native, requests()), ask_all(&over, requests()));
    let (mut compared, mut largest) = (0, 0.0f32);
    for (want, got) in want.iter().zip(&got) {
        for (want, got) in want[0].tokens.iter().zip(&got[0].tokens) {
            if want.id != got.id {
                let margin = f64::from(want.top[0].1 - want.top[1].1);
                assert!(margin < MARGIN, "{} for {} by {margin} nats", got.id, want.id);
                break;
            }
            let (want, got) = (want.stats, got.stats);
            let differences = [
                got.logprob - want.logprob,
                got.entropy - want.entropy,
                got.baseline - want.baseline,
            ];
            largest = differences.iter().fold(largest, |largest, d| largest.max(d.abs()));
            compared += 1;
        }
    }
    println!("{compared} tokens compared, largest difference {largest:e}");
    assert!(largest < TOLERANCE, "differs by {largest}");
    assert!(compared >= 64, "only {compared} tokens were compared");
}
