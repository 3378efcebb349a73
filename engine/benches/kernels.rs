//! Time of the CPU kernels at the sizes of SmolLM2-135M (9 query heads, 3 KV heads, head_dim 64).
//! `cargo bench -p onpolicy-engine --bench kernels`

use std::time::Instant;

use onpolicy_engine::kernels::attention::{
    BLOCK, Pages, PagesMut, Span, paged_attention, write_pages,
};
use onpolicy_engine::logits::{batch_stats, logprob_gradient};
use onpolicy_engine::sampler::{Draw, sample};
use onpolicy_plugin_api::SamplingParams;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const DIM: usize = 64;
const VOCAB: usize = 49_152;
const ROWS: usize = 64;

fn main() {
    attention("decode, 64 sequences of 512", 64, 512, 1);
    attention("decode, 1 sequence of 2000", 1, 2000, 1);
    attention("prefill, 1 sequence of 512", 1, 512, 512);
    attention("prefill, 8 sequences of 512", 8, 512, 512);
    writing(512);
    statistics();
    for (name, params) in [
        ("plain", SamplingParams::default()),
        ("greedy", SamplingParams { temperature: 0.0, ..Default::default() }),
        ("top_logprobs 5", SamplingParams { top_logprobs: 5, ..Default::default() }),
        ("top_k 50", SamplingParams { top_k: 50, ..Default::default() }),
        ("top_p 0.95", SamplingParams { top_p: 0.95, ..Default::default() }),
        ("min_p 0.05", SamplingParams { min_p: 0.05, ..Default::default() }),
    ] {
        sampling(name, &params);
    }
}

/// The best time of some runs, in seconds.
fn best(mut work: impl FnMut()) -> f64 {
    let started = Instant::now();
    let mut best = f64::INFINITY;
    while started.elapsed().as_secs_f64() < 1.0 {
        let run = Instant::now();
        work();
        best = best.min(run.elapsed().as_secs_f64());
    }
    best
}

fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i.wrapping_mul(2_654_435_761) % 2048) as f32 / 1024.0 - 1.0).collect()
}

fn attention(name: &str, sequences: usize, context: usize, rows: usize) {
    let per_sequence = context.div_ceil(BLOCK);
    let blocks = sequences * per_sequence;
    let len = blocks * KV_HEADS * DIM * BLOCK;
    let (keys, values) = (numbers(len), numbers(len));
    let pages = Pages { keys: &keys, values: &values, kv_heads: KV_HEADS, head_dim: DIM };
    let q = numbers(sequences * rows * HEADS * DIM);
    let mut out = vec![0.0; q.len()];
    // An odd stride, so that neighbours in a sequence are not neighbours in memory.
    let stride = (blocks / 3) | 1;
    let table: Vec<u32> = (0..blocks).map(|i| (i * stride % blocks) as u32).collect();
    let spans: Vec<Span> = (0..sequences)
        .map(|i| Span {
            rows: i * rows..(i + 1) * rows,
            first_position: context - rows,
            blocks: &table[i * per_sequence..(i + 1) * per_sequence],
        })
        .collect();
    let seconds = best(|| paged_attention(&q, &mut out, &pages, &spans, None));
    let pairs: usize = (context - rows + 1..=context).sum::<usize>() * sequences;
    let flops = 4.0 * (pairs * HEADS * DIM) as f64;
    let bytes = (8 * sequences * context * KV_HEADS * DIM) as f64;
    println!(
        "attention, {name}: {:.3} ms, {:.1} GFLOP/s, {:.1} GB/s of pages",
        seconds * 1e3,
        flops / seconds / 1e9,
        bytes / seconds / 1e9
    );
}

fn writing(rows: usize) {
    let blocks = rows / BLOCK;
    let len = blocks * KV_HEADS * DIM * BLOCK;
    let (mut keys, mut values) = (vec![0.0; len], vec![0.0; len]);
    let k = numbers(rows * KV_HEADS * DIM);
    let slots: Vec<u32> = (0..rows as u32).collect();
    let seconds = best(|| {
        let (keys, values) = (&mut keys[..], &mut values[..]);
        let mut pages = PagesMut { keys, values, kv_heads: KV_HEADS, head_dim: DIM };
        write_pages(&k, &k, &mut pages, &slots);
    });
    println!("write_pages, {rows} rows: {:.3} ms", seconds * 1e3);
}

/// Logits about as spread as a language model's at an entropy of 2 nats: a few likely tokens and
/// a long tail.
fn logits() -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(0);
    let mut noise = || (0..4).map(|_| rng.random::<f32>() - 0.5).sum::<f32>() * 4.0;
    (0..ROWS * VOCAB).map(|i| noise() + if i % 2500 == 0 { 12.0 } else { 0.0 }).collect()
}

fn statistics() {
    let logits = logits();
    let tokens: Vec<u32> = (0..ROWS as u32).collect();
    let seconds = best(|| {
        std::hint::black_box(batch_stats(&logits, VOCAB, &tokens, 1.0));
    });
    let entropy = batch_stats(&logits, VOCAB, &tokens, 1.0)[0].entropy;
    println!("entropy of a row: {entropy:.2} nats");
    println!("statistics, {ROWS} x {VOCAB}: {:.3} ms", seconds * 1e3);
    // Overwritten by its own gradient each time; the time does not depend on the values.
    let mut rows = logits.clone();
    let seconds = best(|| logprob_gradient(&mut rows, VOCAB, &tokens, &[1.0; ROWS], 1.0));
    println!("gradient, {ROWS} x {VOCAB}: {:.3} ms", seconds * 1e3);
}

fn sampling(name: &str, params: &SamplingParams) {
    let logits = logits();
    let draws: Vec<Draw> = (0..ROWS)
        .map(|row| Draw { row, params, stream: row as u64, position: 0, forbidden: &[] })
        .collect();
    let seconds = best(|| {
        std::hint::black_box(sample(&logits, VOCAB, &draws));
    });
    println!("sampling, {name}, {ROWS} x {VOCAB}: {:.3} ms", seconds * 1e3);
}
