//! Forward and backward passes of one step of the real model (8 prompts of 41 tokens, 8 samples
//! each): packed groups, the same with layers that are run again, and padded batches, in turns;
//! then the optimizer's step. Beside each the rate of matrix products that the machine had in the
//! same run, and the share of it that was reached.
//! `cargo bench -p onpolicy-trainer --bench loss [-- PART]` runs the lines that contain PART; with
//! `OMP_NUM_THREADS=1` only the time on a core counts. Not criterion, which cannot take turns
//! between cases; one micro-batch through criterion is `packed_loss`.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{drawn, groups, padded, settings, smollm2, trainable};
use onpolicy_engine::{
    kernels::matmul::{nn, nt, tn},
    model::{attention::PackedGroup, config::ModelConfig, decoder::Decoder},
    torch::memory::keep_freed,
};
use onpolicy_trainer::{
    batch::{MicroBatch, TrainBatch},
    entropy::KeepAll,
    loss::{Activations, accumulate_gradient_with, token_stats},
    metrics::memory::peak_mb,
    optimizer::{Optimizer, OptimizerSettings},
};
use std::time::Instant;

/// Rounds of every case; medians are printed.
const ROUNDS: usize = 3;
/// Sequences of a padded batch, as TRL's GRPOTrainer has them by default on this step.
const PADDED_ROWS: usize = 16;

fn main() {
    keep_freed();
    let part = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    let (config, weights, decoder) = trainable(&smollm2());
    for (name, responses) in [("64 tokens", 64..=64), ("1 to 64 tokens", 1..=64)] {
        let groups = groups([8, 8, config.vocab_size], 41..=41, responses);
        let groups = drawn(&decoder, groups, 1000);
        let batch = TrainBatch::new(groups.clone(), &KeepAll {});
        let packed = |rows| batch.mini_batches(1, rows).remove(0).micro_batches;
        let cases = [
            Case::new(name, "packed, 512 rows", packed(512), Activations::Kept),
            Case::new(name, "packed, 1024 rows", packed(1024), Activations::Kept),
            Case::new(name, "checkpointed, 512 rows", packed(512), Activations::Recomputed),
            Case::new(name, "padded, 16 x 1", padded(&groups, PADDED_ROWS), Activations::Kept),
        ];
        race(
            cases.into_iter().filter(|case| case.name.contains(&part)).collect(),
            &decoder,
            &config,
        );
    }
    if "optimizer".contains(&part) {
        optimizer(&weights);
    }
}

/// A step, laid out in one way.
struct Case {
    name: String,
    micros: Vec<MicroBatch>,
    activations: Activations,
    seconds: Vec<f64>,
    forward: Vec<f64>,
}

impl Case {
    fn new(step: &str, way: &str, micros: Vec<MicroBatch>, activations: Activations) -> Self {
        let name = format!("{step}: {way}");
        Self { name, micros, activations, seconds: Vec::new(), forward: Vec::new() }
    }

    fn round(&mut self, decoder: &Decoder) {
        let kept = self.micros.iter().map(|micro| micro.targets.len()).sum();
        self.seconds.push(timed(|| {
            for micro in &self.micros {
                accumulate_gradient_with(decoder, micro, &settings(kept), self.activations)
                    .expect("a gradient");
            }
        }));
        self.forward.push(timed(|| {
            for micro in &self.micros {
                token_stats(decoder, micro, 1.0);
            }
        }));
    }

    /// GFLOP of forward and backward pass, without what is computed twice.
    fn work(&self, config: &ModelConfig) -> f64 {
        let shapes = config.tensor_shapes();
        let linear =
            shapes.iter().filter(|(name, shape)| name.contains("layers") && shape.len() == 2);
        let layers: i64 = linear.map(|(_, shape)| shape.iter().product::<i64>()).sum();
        let head = config.vocab_size * config.hidden_size;
        let pairs = |group: &PackedGroup| {
            let (prompt, own) = (group.prompt.len(), |rows: usize| rows * (rows + 1) / 2);
            own(prompt) + group.tails.iter().map(|&tail| tail * prompt + own(tail)).sum::<usize>()
        };
        let attention = config.num_layers * config.num_heads * config.head_dim * 4;
        let flop = |micro: &MicroBatch| {
            let pairs: usize = micro.pack.groups().iter().map(pairs).sum();
            6.0 * micro.pack.len() as f64 * layers as f64
                + 6.0 * micro.targets.len() as f64 * head as f64
                + 3.5 * (pairs * attention) as f64
        };
        1e-9 * self.micros.iter().map(flop).sum::<f64>()
    }
}

/// Seconds that the work takes; on one thread those that it was on a core, so that other work on
/// the machine counts less.
fn timed(work: impl FnOnce()) -> f64 {
    let (started, on_core) = (Instant::now(), seconds_on_core());
    work();
    match (tch::get_num_threads(), on_core, seconds_on_core()) {
        (1, Some(before), Some(after)) => after - before,
        _ => started.elapsed().as_secs_f64(),
    }
}

fn seconds_on_core() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    stat.split_whitespace().next()?.parse::<f64>().ok().map(|nanoseconds| 1e-9 * nanoseconds)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn race(mut cases: Vec<Case>, decoder: &Decoder, config: &ModelConfig) {
    let mut rates = Vec::new();
    for _ in 0..ROUNDS {
        for case in &mut cases {
            rates.push(matrix_rate());
            case.round(decoder);
        }
    }
    for case in &mut cases {
        let rows: usize = case.micros.iter().map(|micro| micro.pack.len()).sum();
        let (work, rate) = (case.work(config), median(&mut rates));
        let (all, forward) = (median(&mut case.seconds), median(&mut case.forward));
        println!(
            "{:40} {rows} rows in {} packs: {all:.2} s (forward alone {forward:.2} s), {:.0} GFLOP/s, \
             {:.0} % of {rate:.0}; peak so far {:.0} MiB",
            case.name,
            case.micros.len(),
            work / all,
            100.0 * work / all / rate,
            peak_mb().unwrap_or(f64::NAN),
        );
    }
}

/// GFLOP/s of the products of a layer's largest weight with 512 rows: forward, by the input, and
/// by the weight; over enough rounds that a clock of whole ticks does not matter.
fn matrix_rate() -> f64 {
    const PRODUCTS: usize = 60;
    let [m, n, k] = [512, 1536, 576];
    let (x, w, y) = (vec![0.5f32; m * k], vec![0.25f32; n * k], vec![0.125f32; m * n]);
    let (mut by_y, mut by_x, mut by_w) = (y.clone(), x.clone(), w.clone());
    let seconds = timed(|| {
        for _ in 0..PRODUCTS {
            nt(&x, &w, None, &mut by_y, [m, n, k]);
            nn(&y, &w, &mut by_x, [m, k, n]);
            tn(&y, &x, true, &mut by_w, [n, k, m]);
        }
    });
    6e-9 * (PRODUCTS * m * n * k) as f64 / seconds
}

fn optimizer(weights: &onpolicy_engine::weights::Weights) {
    let settings =
        OptimizerSettings { betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.0, max_grad_norm: 1.0 };
    let mut optimizer = Optimizer::new(weights, settings).expect("an optimizer");
    let round = |_| {
        timed(|| {
            let norm = optimizer.grad_norm().expect("a norm");
            optimizer.step(1e-6, norm).expect("a step");
        })
    };
    let mut seconds: Vec<f64> = (0..ROUNDS).map(round).collect();
    // Weights and both moments are read and written, gradients read twice and written twice.
    let bytes = (3 * 2 + 4) * weights.bytes();
    let seconds = median(&mut seconds);
    println!(
        "optimizer's step: {:.0} ms, {:.0} GB/s",
        1e3 * seconds,
        1e-9 * bytes as f64 / seconds
    );
}
