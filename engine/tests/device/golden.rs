//! The tiny checkpoints against what transformers computes for them.

use crate::common::{TINY, assert_close, engine, floats, golden, ids, json, tiny, tiny_in};
use crate::support::{greedy, logits, run, weights};
use onpolicy_engine::{
    device::stats,
    engine::EngineConfig,
    model::{
        attention::{Attention, Pack},
        decoder::Decoder,
    },
};
use onpolicy_plugin_api::{Request, SamplingParams};
use serde_json::Value;
use tch::{Kind, Tensor};

/// As of the native path.
const TOLERANCE: f32 = 2e-4;

/// Log-prob, entropy and baseline of each row: of the tokens that follow, which the last row has
/// none of.
fn columns(logits: &Tensor, tokens: &[u32]) -> [Vec<f32>; 3] {
    let mut next: Vec<i64> = tokens[1..].iter().map(|&id| i64::from(id)).collect();
    next.push(0);
    let stats = stats::batch_stats(logits, &Tensor::from_slice(&next), 1.0).to_kind(Kind::Float);
    [0, 1, 2].map(|column| Vec::try_from(stats.select(1, column)).expect("f32"))
}

fn check(name: &str, reference: &Value, row: usize, logits: &Tensor) {
    let tokens = ids(&reference["input_ids"][row]);
    let [logprob, entropy, baseline] = columns(logits, &tokens);
    let want = floats(&reference["next_token_logprobs"][row]);
    assert_close(&logprob[..want.len()], &want, TOLERANCE, &format!("{name} logprob"));
    let want = floats(&reference["entropy"][row]);
    assert_close(&entropy, &want, TOLERANCE, &format!("{name} entropy"));
    let want = floats(&reference["expected_s"][row]);
    assert_close(&baseline, &want, TOLERANCE, &format!("{name} E_p[S]"));
    let last = logits.get(tokens.len() as i64 - 1).to_kind(Kind::Float);
    let want = floats(&reference["last_logits"][row]);
    let last = Vec::<f32>::try_from(last).expect("f32");
    assert_close(&last, &want, TOLERANCE, &format!("{name} last logits"));
}

#[test]
fn the_trainers_path_meets_the_reference() {
    for name in TINY {
        let checkpoint = tiny_in(name, Kind::Double);
        let decoder = Decoder::new(&checkpoint.config, &weights(&checkpoint));
        let reference = json(&golden(&format!("tiny/{name}/reference.json")));
        for row in 0..2 {
            let tokens = ids(&reference["input_ids"][row]);
            for prompt_len in [1, 13, 39, 40] {
                let (prompt, tail) = tokens.split_at(prompt_len);
                let mut pack = Pack::default();
                pack.push(&tokens[..5], &[&tokens[5..9]]);
                let group = pack.push(prompt, &[tail, &tokens[..7]]).clone();
                let (ids, positions) = (pack.tokens(), pack.positions());
                let hidden = decoder.hidden(&ids, &positions, &mut Attention::Causal(&pack));
                let rows = hidden.narrow(0, group.prompt.start as i64, tokens.len() as i64);
                check(name, &reference, row, &decoder.logits(&rows));
            }
        }
    }
}

#[test]
fn the_pages_meet_the_reference_at_every_chunk_size() {
    for name in TINY {
        let checkpoint = tiny_in(name, Kind::Double);
        let reference = json(&golden(&format!("tiny/{name}/reference.json")));
        for max_batched_tokens in [1, 3, 7, 16, 39, 256] {
            let config = EngineConfig {
                max_num_seqs: 1,
                max_batched_tokens,
                kv_memory: 8 << 20,
                ..EngineConfig::default()
            };
            let engine = engine(&checkpoint, config);
            for row in [0, 1, 0] {
                let params = SamplingParams { prompt_logprobs: Some(0), ..greedy(1) };
                let prompt = ids(&reference["input_ids"][row]);
                let answer = run(&engine, vec![Request::new(prompt, params)]).remove(0);
                let want = floats(&reference["next_token_logprobs"][row]);
                let what = format!("{name}, {max_batched_tokens} tokens");
                assert_close(&answer.prompt_logprobs, &want, TOLERANCE, &what);
            }
        }
    }
}

#[test]
fn the_engine_decodes_greedily_as_the_reference() {
    for name in TINY {
        let checkpoint = tiny_in(name, Kind::Double);
        let reference = json(&golden(&format!("tiny/{name}/reference.json")));
        let (prompt, want) = (ids(&reference["greedy_prompt"]), ids(&reference["greedy_ids"]));
        for max_batched_tokens in [8, 16, 2048] {
            let config = EngineConfig {
                max_batched_tokens,
                max_num_seqs: 8,
                kv_memory: 4 << 20,
                ..EngineConfig::default()
            };
            let engine = engine(&checkpoint, config);
            for batch in [1, 8] {
                let request = Request::new(prompt.clone(), greedy(want.len()));
                for group in run(&engine, vec![request; batch]) {
                    let what = format!("{name}, {max_batched_tokens} tokens, batch {batch}");
                    assert_eq!(
                        crate::support::tokens(&group),
                        std::slice::from_ref(&want),
                        "{what}"
                    );
                }
            }
            assert_eq!(engine.stats().expect("it runs").blocks_used, 0);
        }
    }
}

/// bf16 keeps 8 bits of every number: each of some seventeen roundings of a layer is off by 2^-9 at
/// most, by that over the root of three on average, and they add up like noise. So do those of the
/// logits, whose spread is their size. Norms and softmax may make noise larger, so four times that
/// is allowed. The reference is the same model, its weights rounded to bf16, in f64.
#[test]
fn bf16_is_as_far_off_as_its_rounding() {
    for name in TINY {
        let checkpoint = tiny_in(name, Kind::BFloat16);
        let mut exact = tiny(name);
        for (wide, narrow) in exact.tensors.iter_mut().zip(&checkpoint.tensors) {
            wide.1 = narrow.1.to_kind(Kind::Double);
        }
        let roundings = 2.0 + 17.0 * checkpoint.config.num_layers as f64;
        let reference = json(&golden(&format!("tiny/{name}/reference.json")));
        let tokens = ids(&reference["input_ids"][0]);
        let (got, want) = (logits(&checkpoint, &tokens), logits(&exact, &tokens));
        assert_eq!((got.kind(), want.kind()), (Kind::Float, Kind::Double));
        let spread = want.std(false).double_value(&[]);
        let error = (&got - &want).square().mean(Kind::Double).sqrt().double_value(&[]);
        let bound = 4.0 * spread * 2f64.powi(-9) * (roundings / 3.0).sqrt();
        println!("{name}: logits off by {error:.2e}, bound {bound:.2e}, spread {spread:.2}");
        assert!(error < bound, "{name}: {error:e} of {spread}, more than {bound:e}");
        assert!(error > 0.0, "{name}: bf16 rounds");
        // What the engine says of its own tokens is what the trainer's path says of them.
        let served = crate::support::start(&checkpoint);
        let params = SamplingParams { prompt_logprobs: Some(0), ..greedy(8) };
        let answer = run(&served, vec![Request::new(tokens.clone(), params)]).remove(0);
        let all: Vec<u32> =
            tokens.iter().copied().chain(crate::support::tokens(&answer)[0].clone()).collect();
        let [logprobs, ..] = columns(&logits(&checkpoint, &all), &all);
        let said = answer.samples[0].tokens.iter().map(|token| token.stats.logprob);
        let said: Vec<f32> = answer.prompt_logprobs.iter().copied().chain(said).collect();
        assert_close(&said, &logprobs[..said.len()], 3.0 * bound as f32, name);
    }
}
