//! The CPU kernels at the sizes of SmolLM2-135M (9 query heads, 3 KV heads, head_dim 64; one
//! layer): attention over pages, statistics of logits, sampling. Where criterion counts elements
//! of attention, they are floating-point operations; of logits, they are logits.
//! `cargo bench --workspace --bench kernels [-- PART]` runs those whose name contains PART.

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
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
/// Numbers in the keys of a block, and in its values.
const BLOCK_LEN: usize = KV_HEADS * DIM * BLOCK;
/// Bytes of a token's key and value.
const TOKEN_BYTES: usize = 8 * KV_HEADS * DIM;
const VOCAB: usize = 49_152;
const ROWS: usize = 64;

criterion_group! {
    name = kernels;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = decode, prefill, writing, statistics, sampling
}
criterion_main!(kernels);

/// Benches that take milliseconds: equally many runs for every sample.
fn slow<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.sampling_mode(SamplingMode::Flat);
    group
}

fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i.wrapping_mul(2_654_435_761) % 2048) as f32 / 1024.0 - 1.0).collect()
}

/// Block tables, and the keys and values that they name.
struct Cache {
    keys: Vec<f32>,
    values: Vec<f32>,
    tables: Vec<Vec<u32>>,
}

impl Cache {
    /// `groups` times `samples` tables for `context` tokens; the first `shared` tokens are the same
    /// blocks for all samples of a group.
    fn new([groups, samples]: [usize; 2], context: usize, shared: usize) -> Self {
        let (prompt, all) = (shared / BLOCK, context.div_ceil(BLOCK));
        let blocks = groups * (prompt + samples * (all - prompt));
        // An odd stride, so that neighbours in a sequence are not neighbours in memory.
        let stride = (blocks / 3) | 1;
        let mut ids = (0..blocks).map(|i| (i * stride % blocks) as u32);
        let mut tables = Vec::new();
        for _ in 0..groups {
            let common: Vec<u32> = ids.by_ref().take(prompt).collect();
            for _ in 0..samples {
                let own = ids.by_ref().take(all - prompt);
                tables.push(common.iter().copied().chain(own).collect());
            }
        }
        let len = blocks * BLOCK_LEN;
        Self { keys: numbers(len), values: numbers(len), tables }
    }

    /// Times attention of the last `rows` tokens of every sequence.
    fn attend(&self, bench: &mut criterion::Bencher, context: usize, rows: usize) {
        let pages =
            Pages { keys: &self.keys, values: &self.values, kv_heads: KV_HEADS, head_dim: DIM };
        let span = |(i, blocks)| Span {
            rows: i * rows..(i + 1) * rows,
            first_position: context - rows,
            blocks,
        };
        let tables = self.tables.iter().map(Vec::as_slice);
        let spans: Vec<Span> = tables.enumerate().map(span).collect();
        let q = numbers(spans.len() * rows * HEADS * DIM);
        let mut out = vec![0.0; q.len()];
        bench.iter(|| paged_attention(&q, &mut out, &pages, &spans, None));
    }
}

/// One new token of every sample. The bytes are those of the keys and values of all its tokens, also
/// where several samples share them: the rate of shared ones may exceed the memory's.
fn decode(criterion: &mut Criterion) {
    let mut group = slow(criterion, "attention, decode");
    for (name, counts, context, shared) in [
        ("64 sequences of 512", [64, 1], 512, 0),
        ("1 sequence of 2000", [1, 1], 2000, 0),
        ("4 groups of 16, 960 of 1024 tokens shared", [4, 16], 1024, 960),
        ("4 groups of 16, nothing of 1024 tokens shared", [4, 16], 1024, 0),
    ] {
        let cache = Cache::new(counts, context, shared);
        let tokens = counts[0] * counts[1] * context;
        group.throughput(Throughput::Bytes((tokens * TOKEN_BYTES) as u64));
        group.bench_function(name, |bench| cache.attend(bench, context, 1));
    }
}

fn prefill(criterion: &mut Criterion) {
    let mut group = slow(criterion, "attention, prefill");
    let context = 512;
    let pairs = context * (context + 1) / 2;
    for sequences in [1, 8] {
        let cache = Cache::new([sequences, 1], context, 0);
        group.throughput(Throughput::Elements((4 * sequences * pairs * HEADS * DIM) as u64));
        group.bench_function(format!("{sequences} x {context}"), |bench| {
            cache.attend(bench, context, context);
        });
    }
}

fn writing(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("write_pages");
    for rows in [64, 512] {
        let len = usize::div_ceil(rows, BLOCK) * BLOCK_LEN;
        let (mut keys, mut values) = (vec![0.0; len], vec![0.0; len]);
        let k = numbers(rows * KV_HEADS * DIM);
        let slots: Vec<u32> = (0..rows as u32).collect();
        group.throughput(Throughput::Bytes((rows * TOKEN_BYTES) as u64));
        group.bench_function(format!("{rows} tokens"), |bench| {
            bench.iter(|| {
                let (keys, values) = (&mut keys[..], &mut values[..]);
                let mut pages = PagesMut { keys, values, kv_heads: KV_HEADS, head_dim: DIM };
                write_pages(&k, &k, &mut pages, &slots);
            });
        });
    }
}

/// Logits about as spread as a language model's at an entropy of 2 nats: a few likely tokens and
/// a long tail.
fn logits() -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(0);
    let mut noise = || (0..4).map(|_| rng.random::<f32>() - 0.5).sum::<f32>() * 4.0;
    (0..ROWS * VOCAB).map(|i| noise() + if i % 2500 == 0 { 12.0 } else { 0.0 }).collect()
}

fn statistics(criterion: &mut Criterion) {
    let mut group = slow(criterion, &format!("logits, {ROWS} x {VOCAB}"));
    group.throughput(Throughput::Elements((ROWS * VOCAB) as u64));
    let mut logits = logits();
    let tokens: Vec<u32> = (0..ROWS as u32).collect();
    group.bench_function("statistics", |bench| {
        bench.iter(|| batch_stats(black_box(&logits), VOCAB, &tokens, 1.0));
    });
    // Overwritten by its own gradient each time; the time does not depend on the values.
    group.bench_function("gradient", |bench| {
        bench.iter(|| logprob_gradient(&mut logits, VOCAB, &tokens, &[1.0; ROWS], 1.0));
    });
}

fn sampling(criterion: &mut Criterion) {
    let mut group = slow(criterion, &format!("sampling, {ROWS} x {VOCAB}"));
    group.throughput(Throughput::Elements((ROWS * VOCAB) as u64));
    let logits = logits();
    for (name, params) in [
        ("plain", SamplingParams::default()),
        ("greedy", SamplingParams { temperature: 0.0, ..Default::default() }),
        ("top_k 50", SamplingParams { top_k: 50, ..Default::default() }),
        ("top_p 0.95", SamplingParams { top_p: 0.95, ..Default::default() }),
        ("min_p 0.05", SamplingParams { min_p: 0.05, ..Default::default() }),
        ("top_logprobs 5", SamplingParams { top_logprobs: 5, ..Default::default() }),
    ] {
        let draw = |row| Draw {
            row,
            params: &params,
            stream: row as u64,
            position: 0,
            forbidden: &[],
            mask: None,
        };
        let draws: Vec<Draw> = (0..ROWS).map(draw).collect();
        group.bench_function(name, |bench| {
            bench.iter(|| sample(black_box(&logits), VOCAB, &draws));
        });
    }
}
