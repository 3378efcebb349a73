//! The tiny checkpoints against what transformers computes for them, through the trainer's path
//! and through the pages.

mod common;

use common::{TINY, assert_close, engine, floats, golden, ids, json, tiny};
use onpolicy_engine::{
    block_manager::BLOCK_SIZE,
    collect::collect,
    engine::EngineConfig,
    kernels::attention::Span,
    kv_cache::KvCache,
    logits::batch_stats,
    model::{
        attention::{Attention, Pack, PagedBatch},
        decoder::Decoder,
        loading::Checkpoint,
    },
    torch::slices,
    weights::Weights,
};
use onpolicy_plugin_api::{FinishReason, Request, SamplingParams};
use serde_json::Value;
use std::time::{Duration, Instant};
use tch::Tensor;

const TOLERANCE: f32 = 2e-4;

fn decoder(checkpoint: &Checkpoint) -> Decoder {
    let weights = checkpoint.tensors.iter().map(|(n, t)| (n.clone(), t.shallow_clone()));
    Decoder::new(&checkpoint.config, &Weights::new(weights.collect()))
}

/// Logits of all rows against the reference of sequence `row`.
fn check_logits(name: &str, reference: &Value, row: usize, logits: &Tensor) {
    let tokens = ids(&reference["input_ids"][row]);
    let vocab = logits.size()[1] as usize;
    // The last position predicts a token that the reference does not name; any will do.
    let mut next = tokens[1..].to_vec();
    next.push(0);
    let stats = batch_stats(slices::floats(logits), vocab, &next, 1.0);
    let column = |f: fn(&onpolicy_plugin_api::TokenStats) -> f32| -> Vec<f32> {
        stats.iter().map(f).collect()
    };
    let (logprob, entropy) = (column(|s| s.logprob), column(|s| s.entropy));
    let want = floats(&reference["next_token_logprobs"][row]);
    assert_close(&logprob[..want.len()], &want, TOLERANCE, &format!("{name} logprob"));
    let want = floats(&reference["entropy"][row]);
    assert_close(&entropy, &want, TOLERANCE, &format!("{name} entropy"));
    let want = floats(&reference["expected_s"][row]);
    assert_close(&column(|s| s.baseline), &want, TOLERANCE, &format!("{name} E_p[S]"));
    let last = &slices::floats(logits)[(tokens.len() - 1) * vocab..];
    let want = floats(&reference["last_logits"][row]);
    assert_close(last, &want, TOLERANCE, &format!("{name} last logits"));
}

#[test]
fn the_trainers_path_meets_the_reference() {
    for name in TINY {
        let checkpoint = tiny(name);
        let decoder = decoder(&checkpoint);
        let reference = json(&golden(&format!("tiny/{name}/reference.json")));
        for row in 0..2 {
            let tokens = ids(&reference["input_ids"][row]);
            for prompt_len in [1, 13, 39, 40] {
                let (prompt, tail) = tokens.split_at(prompt_len);
                // A second tail of another length must change nothing.
                let mut pack = Pack::default();
                pack.push(&tokens[..5], &[&tokens[5..9]]);
                let group = pack.push(prompt, &[tail, &tokens[..7]]).clone();
                let hidden = decoder.hidden(
                    &pack.tokens(),
                    &pack.positions(),
                    &mut Attention::Causal(&pack),
                );
                let rows = hidden.narrow(0, group.prompt.start as i64, tokens.len() as i64);
                check_logits(name, &reference, row, &decoder.logits(&rows));
            }
        }
    }
}

/// Runs whole sequences through the pages in chunks of `chunk` tokens; hidden states of each.
fn paged_hidden(
    checkpoint: &Checkpoint,
    decoder: &Decoder,
    sequences: &[Vec<u32>],
    chunk: usize,
) -> Vec<Tensor> {
    let len = sequences[0].len();
    let blocks = len.div_ceil(BLOCK_SIZE);
    let mut cache = KvCache::new(&checkpoint.config, blocks * sequences.len());
    // Block tables that interleave the sequences and run backwards.
    let table = |s: usize| -> Vec<u32> {
        (0..blocks).rev().map(|b| (b * sequences.len() + s) as u32).collect()
    };
    let tables: Vec<Vec<u32>> = (0..sequences.len()).map(table).collect();
    let mut hidden: Vec<Vec<Tensor>> = sequences.iter().map(|_| Vec::new()).collect();
    for start in (0..len).step_by(chunk) {
        let range = start..(start + chunk).min(len);
        let (mut tokens, mut positions, mut slots) = (Vec::new(), Vec::new(), Vec::new());
        let mut spans = Vec::new();
        for (sequence, table) in sequences.iter().zip(&tables) {
            let row = tokens.len();
            for position in range.clone() {
                tokens.push(i64::from(sequence[position]));
                positions.push(position as i64);
                let slot = table[position / BLOCK_SIZE] as usize * BLOCK_SIZE;
                slots.push((slot + position % BLOCK_SIZE) as u32);
            }
            let rows = row..row + range.len();
            spans.push(Span { rows, first_position: start, blocks: table });
        }
        let batch = PagedBatch { cache: &mut cache, spans, slots };
        let (tokens, positions) = (Tensor::from_slice(&tokens), Tensor::from_slice(&positions));
        let out = decoder.hidden(&tokens, &positions, &mut Attention::Paged(batch));
        for (index, hidden) in hidden.iter_mut().enumerate() {
            let first = (index * range.len()) as i64;
            hidden.push(out.narrow(0, first, range.len() as i64));
        }
    }
    hidden.iter().map(|parts| Tensor::cat(parts, 0)).collect()
}

#[test]
fn the_pages_meet_the_reference_at_every_chunk_size() {
    for name in TINY {
        let checkpoint = tiny(name);
        let decoder = decoder(&checkpoint);
        let reference = json(&golden(&format!("tiny/{name}/reference.json")));
        let rows: Vec<Vec<u32>> = (0..2).map(|row| ids(&reference["input_ids"][row])).collect();
        onpolicy_engine::torch::no_grad(|| {
            for chunk in (1..=40).chain([64]) {
                for batch in [1, 8] {
                    let sequences: Vec<Vec<u32>> =
                        (0..batch).map(|index| rows[index % 2].clone()).collect();
                    let hidden = paged_hidden(&checkpoint, &decoder, &sequences, chunk);
                    for (index, hidden) in hidden.iter().enumerate() {
                        let what = format!("{name}, chunk {chunk}, batch {batch}");
                        check_logits(&what, &reference, index % 2, &decoder.logits(hidden));
                    }
                }
            }
        });
    }
}

#[test]
fn the_engine_decodes_greedily_as_the_reference() {
    for name in TINY {
        let checkpoint = tiny(name);
        let reference = json(&golden(&format!("tiny/{name}/reference.json")));
        let (prompt, want) = (ids(&reference["greedy_prompt"]), ids(&reference["greedy_ids"]));
        for max_batched_tokens in [1, 3, 16, 2048] {
            let config = EngineConfig {
                max_batched_tokens: max_batched_tokens.max(8),
                max_num_seqs: 8,
                kv_memory: 4 << 20,
                ..EngineConfig::default()
            };
            let engine = engine(&checkpoint, config);
            for batch in [1, 8] {
                let params = SamplingParams {
                    temperature: 0.0,
                    max_tokens: want.len(),
                    ignore_eos: true,
                    ..SamplingParams::default()
                };
                let request = Request::new(prompt.clone(), params);
                let deadline = Instant::now() + Duration::from_secs(60);
                let groups = collect(&engine, vec![request; batch], deadline, &mut || {});
                for group in groups.expect("the engine answers") {
                    let sample = &group.samples[0];
                    let got: Vec<u32> = sample.tokens.iter().map(|token| token.id).collect();
                    assert_eq!(got, want, "{name}, {max_batched_tokens} tokens, batch {batch}");
                    assert_eq!(sample.finish, FinishReason::Length);
                }
            }
            assert_eq!(
                engine.stats().expect("the engine runs").blocks_used,
                0,
                "{name}: all blocks are back"
            );
            engine.shutdown();
        }
    }
}
