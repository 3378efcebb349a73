//! Speculative decoding on the native engine: with guesses and without, the same tokens with the
//! same log-probs, bit for bit, in fewer steps.

mod common;

use common::{engine, tiny};
use onpolicy_engine::{
    collect::collect,
    engine::{EngineConfig, EngineHandle},
    kv_cache::KvCache,
    weights::ServeDtype,
};
use onpolicy_plugin_api::{Engine, FinishReason, Request, SamplingParams};
use std::time::{Duration, Instant};

fn config(guesses: usize) -> EngineConfig {
    EngineConfig {
        kv_memory: 8 << 20,
        max_num_seqs: 64,
        num_speculative_tokens: Some(guesses),
        ..EngineConfig::default()
    }
}

fn prompt(seed: u32, len: u32) -> Vec<u32> {
    (0..len).map(|i| 3 + (seed * 31 + i * 7) % 150).collect()
}

/// Requests of every kind that draws otherwise; a low temperature, so that texts repeat.
fn requests() -> Vec<Request> {
    let base = || SamplingParams {
        max_tokens: 40,
        ignore_eos: true,
        temperature: 0.3,
        seed: Some(7),
        ..SamplingParams::default()
    };
    let kinds = [
        SamplingParams { temperature: 0.0, ..base() },
        base(),
        SamplingParams { n: 3, ..base() },
        SamplingParams { temperature: 1.0, ..base() },
        SamplingParams { top_k: 5, top_p: 0.9, ..base() },
        SamplingParams { top_logprobs: 3, min_p: 0.02, ..base() },
        SamplingParams { logit_bias: vec![(9, 2.0), (11, -3.0)], ..base() },
        SamplingParams { allowed_token_ids: Some((20..60).collect()), ..base() },
        SamplingParams { stop_token_ids: (20..60).collect(), min_tokens: 9, ..base() },
        SamplingParams { repetition_penalty: 1.2, ..base() },
        SamplingParams { bad_words: vec![vec![9], vec![20, 21]], ..base() },
        SamplingParams { max_tokens: 1, ..base() },
        SamplingParams { max_tokens: 2, ..base() },
    ];
    let prompts = (0..).map(|seed| prompt(seed, 5 + 13 * (seed % 3)));
    prompts.zip(kinds).map(|(prompt, params)| Request::new(prompt, params)).collect()
}

/// One token with the bits of its numbers, and the tokens beside it.
type Seen = (u32, [u32; 3], Vec<(u32, u32)>);

/// All that the engine says of the requests' samples, a few requests at a time.
fn answers(engine: &EngineHandle, at_once: usize) -> Vec<(Vec<Seen>, FinishReason)> {
    let mut seen = Vec::new();
    for some in requests().chunks(at_once) {
        let deadline = Instant::now() + Duration::from_secs(60);
        let groups = collect(engine, some.to_vec(), deadline, &mut || {}).expect("it answers");
        for sample in groups.into_iter().flat_map(|group| group.samples) {
            let tokens = sample.tokens.iter().map(|token| {
                let stats = token.stats;
                let bits = [stats.logprob, stats.entropy, stats.baseline].map(f32::to_bits);
                (token.id, bits, token.top.iter().map(|(id, l)| (*id, l.to_bits())).collect())
            });
            seen.push((tokens.collect(), sample.finish));
        }
    }
    seen
}

#[test]
fn guesses_change_no_bit_and_save_steps() {
    for name in ["llama-tied", "qwen2", "qwen3"] {
        let checkpoint = tiny(name);
        let plain = engine(&checkpoint, config(0));
        let want = answers(&plain, 1);
        let steps = plain.stats().expect("it runs").steps;
        assert_eq!(plain.stats().expect("it runs").drafted, 0);
        for guesses in [1, 7] {
            let guessing = engine(&checkpoint, config(guesses));
            // Again and again: later rounds know the texts.
            for at_once in [1, 2, 5, 1] {
                let before = guessing.stats().expect("it runs");
                assert!(answers(&guessing, at_once) == want, "{name}, {guesses}, {at_once}");
                let after = guessing.stats().expect("it runs");
                assert!(after.accepted > before.accepted, "{name}: {after:?}");
                guessing.check().expect("the books are right");
            }
            let before = guessing.stats().expect("it runs");
            answers(&guessing, 1);
            let after = guessing.stats().expect("it runs");
            // Two of the kinds are not guessed at.
            let most = if guesses == 1 { 0.75 } else { 0.5 };
            let taken = (after.steps - before.steps) as f64 / steps as f64;
            assert!(taken < most, "{name}: {taken} of the steps with {guesses} guesses");
        }
    }
}

#[test]
fn guesses_change_no_bit_of_narrow_weights() {
    let checkpoint = tiny("llama-tied");
    for serve_dtype in [ServeDtype::F16, ServeDtype::Int8] {
        let with = |guesses| EngineConfig { serve_dtype, ..config(guesses) };
        let want = answers(&engine(&checkpoint, with(0)), 1);
        let guessing = engine(&checkpoint, with(3));
        assert!((0..2).all(|_| answers(&guessing, 2) == want), "{serve_dtype:?}");
        assert!(guessing.stats().expect("it runs").accepted > 0);
    }
}

#[test]
fn a_full_pool_and_new_weights_lose_nothing() {
    let checkpoint = tiny("llama-tied");
    let want = answers(&engine(&checkpoint, config(0)), 13);
    // Blocks for about two of the longest sequences.
    let tight =
        EngineConfig { kv_memory: 12 * KvCache::block_bytes(&checkpoint.config), ..config(7) };
    let tight = engine(&checkpoint, tight);
    for _ in 0..3 {
        assert!(answers(&tight, 13) == want);
        tight.update(|| Ok(())).expect("nothing is written");
    }
    let stats = tight.stats().expect("it runs");
    assert!(stats.preemptions > 0 && stats.accepted > 0, "{stats:?}");
    assert_eq!(stats.blocks_used, 0);
    tight.check().expect("the books are right");
}

#[test]
fn what_was_guessed_is_forgotten_with_the_cache() {
    let checkpoint = tiny("llama-tied");
    let served = engine(&checkpoint, config(7));
    let drafted = || {
        let before = served.stats().expect("it runs").drafted;
        answers(&served, 1);
        served.stats().expect("it runs").drafted - before
    };
    let (first, second) = (drafted(), drafted());
    served.reset_prefix_cache().expect("it runs");
    assert_eq!(drafted(), first);
    assert_ne!(first, second, "nothing was learnt");
}
