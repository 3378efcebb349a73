//! Requests of every kind give over the libtorch path what they give over the native one.

use crate::common::{assert_close, tiny, tiny_in};
use crate::support::{ahead, all_tokens, greedy, request, run, sampled, start, start_with, tokens};
use onpolicy_engine::{
    block_manager::BLOCK_SIZE,
    engine::{EngineConfig, EngineHandle},
    kv_cache::KvCache,
    model::loading::Checkpoint,
};
use onpolicy_plugin_api::{Grammar, LogprobsMode, Request, SamplingParams};
use tch::Kind;

/// The same model on both paths: native first.
fn both(name: &str) -> [Checkpoint; 2] {
    [tiny(name), tiny_in(name, Kind::Double)]
}

/// Asserts that both engines say the same, tokens and numbers.
fn assert_same(engines: &[EngineHandle; 2], requests: &[Request], what: &str) {
    let [want, got] = engines.each_ref().map(|engine| run(engine, requests.to_vec()));
    assert_eq!(all_tokens(&got), all_tokens(&want), "{what}");
    for (got, want) in got.iter().zip(&want) {
        assert_close(&got.prompt_logprobs, &want.prompt_logprobs, 2e-4, what);
        for (got, want) in got.samples.iter().zip(&want.samples) {
            let stats = |sample: &onpolicy_engine::collect::Sample| -> Vec<f32> {
                let stats = sample.tokens.iter().map(|token| token.stats);
                stats.flat_map(|s| [s.logprob, s.entropy, s.baseline]).collect()
            };
            assert_close(&stats(got), &stats(want), 2e-4, what);
            let top = |sample: &onpolicy_engine::collect::Sample| -> Vec<(u32, f32)> {
                sample.tokens.iter().flat_map(|token| token.top.clone()).collect()
            };
            let (got, want) = (top(got), top(want));
            assert_eq!(got.len(), want.len(), "{what}: likeliest tokens");
            for (got, want) in got.iter().zip(&want) {
                assert!(got.0 == want.0 && (got.1 - want.1).abs() < 2e-4, "{what}: {got:?}");
            }
        }
    }
}

#[test]
fn seeds_mean_the_same() {
    for name in ["qwen3", "mistral-window", "llama3-rope"] {
        let engines = both(name).each_ref().map(start);
        let requests: Vec<Request> = (0..6)
            .map(|i| request(i, 5 + 13 * i as usize, sampled(3, 30, u64::from(i))))
            .chain(
                [SamplingParams { temperature: 0.6, ..sampled(2, 30, 9) }]
                    .map(|params| request(7, 40, params)),
            )
            .collect();
        assert_same(&engines, &requests, name);
        // Once more, in other company, with prefixes that are there already.
        assert_same(&engines, &requests[2..], name);
        let hits = engines.each_ref().map(|engine| engine.stats().expect("it runs").prefix_hits);
        assert!(hits[1] > 0 && hits[0] == hits[1], "{name}: {hits:?}");
    }
}

#[test]
fn every_rule_of_sampling_is_kept() {
    let engines = both("llama-tied").each_ref().map(start);
    let base = || sampled(2, 16, 5);
    let cases = [
        ("top_k", SamplingParams { top_k: 7, ..base() }),
        ("top_p", SamplingParams { top_p: 0.7, ..base() }),
        ("min_p", SamplingParams { min_p: 0.1, temperature: 1.4, ..base() }),
        ("top_logprobs", SamplingParams { top_logprobs: 4, ..base() }),
        ("greedy top_logprobs", SamplingParams { top_logprobs: 2, ..greedy(16) }),
        ("repetition", SamplingParams { repetition_penalty: 1.4, ..greedy(16) }),
        ("presence", SamplingParams { presence_penalty: 1.5, ..base() }),
        ("frequency", SamplingParams { frequency_penalty: 0.7, ..base() }),
        ("bias", SamplingParams { logit_bias: vec![(9, 3.0), (20, -4.0)], ..base() }),
        ("allowed", SamplingParams { allowed_token_ids: Some((20..60).collect()), ..base() }),
        ("bad words", SamplingParams { bad_words: vec![vec![7], vec![8, 9]], ..base() }),
        (
            "raw",
            SamplingParams {
                logprobs_mode: LogprobsMode::Raw,
                temperature: 0.5,
                top_k: 20,
                ..base()
            },
        ),
        ("stop", SamplingParams { stop_token_ids: (0..40).collect(), min_tokens: 3, ..base() }),
        ("prompt", SamplingParams { prompt_logprobs: Some(0), ..base() }),
        ("prompt, top", SamplingParams { prompt_logprobs: Some(3), ..base() }),
        (
            "grammar",
            SamplingParams {
                grammar: Some(Grammar::Regex("(t[0-9]+ ?)*".into())),
                ignore_eos: false,
                ..base()
            },
        ),
    ];
    for (what, params) in &cases {
        assert_same(&engines, &[request(3, 30, params.clone())], what);
    }
    let all: Vec<Request> =
        cases.iter().map(|(_, params)| request(3, 30, params.clone())).collect();
    assert_same(&engines, &all, "all at once");
}

#[test]
fn a_full_pool_preempts_and_changes_no_token() {
    let checkpoint = tiny_in("llama-tied", Kind::Double);
    let requests: Vec<Request> =
        (0..12).map(|i| request(i, 20 + i as usize, sampled(2, 60, u64::from(i)))).collect();
    let want = all_tokens(&run(&start(&checkpoint), requests.clone()));
    let placement = crate::support::weights(&checkpoint).placement();
    let block = KvCache::block_bytes_in(&checkpoint.config, placement);
    assert_eq!(block, 2 * KvCache::block_bytes(&checkpoint.config), "f64 takes twice as much");
    let config =
        EngineConfig { kv_memory: 40 * block, max_num_seqs: 32, ..EngineConfig::default() };
    let tight = crate::common::engine(&checkpoint, ahead(&checkpoint, config));
    let got = all_tokens(&run(&tight, requests));
    let stats = tight.stats().expect("it runs");
    assert!(stats.preemptions > 0, "the pool was never full");
    assert!(stats.steps_ahead > 0 && stats.steps_ahead < stats.steps, "{stats:?}");
    assert_eq!((stats.blocks_used, stats.blocks_total), (0, 40));
    assert_eq!(got, want);
}

#[test]
fn a_group_shares_its_prompt_in_bf16() {
    let engine = start(&tiny_in("qwen2", Kind::BFloat16));
    let len = 6 * BLOCK_SIZE + 4;
    let before = engine.stats().expect("it runs").steps;
    let group =
        run(&engine, vec![request(1, len, SamplingParams { n: 8, ..greedy(20) })]).remove(0);
    let steps = engine.stats().expect("it runs").steps - before;
    assert_eq!(steps, 20, "the prompt is computed once, and its row gives all first tokens");
    // Equal rows of one batch.
    let samples = tokens(&group);
    assert!(samples.iter().all(|sample| *sample == samples[0]));
    let again = run(&engine, vec![request(1, len, greedy(20))]).remove(0);
    assert_eq!(
        engine.stats().expect("it runs").prefix_hits as usize,
        len / BLOCK_SIZE * BLOCK_SIZE
    );
    let stats = |samples: &onpolicy_engine::collect::Samples| {
        samples.samples[0].tokens.iter().map(|token| token.stats.logprob).collect::<Vec<_>>()
    };
    // The same tokens as long as no two are within the rounding of each other.
    let same = tokens(&again)[0].iter().zip(&samples[0]).take_while(|(a, b)| a == b).count();
    assert!(same > 0);
    assert_close(&stats(&again)[..same], &stats(&group)[..same], 0.1, "log-probs");
}

#[test]
fn small_steps_mix_prompts_and_samples() {
    let config = EngineConfig { max_batched_tokens: 32, ..EngineConfig::default() };
    let engines = both("qwen2-tied").each_ref().map(|c| start_with(c, config));
    let requests: Vec<Request> =
        (0..5).map(|i| request(i, 60 + 20 * i as usize, sampled(2, 25, u64::from(i)))).collect();
    assert_same(&engines, &requests, "small steps");
}
