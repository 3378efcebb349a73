//! Output head, statistics and draw at the sizes of SmolLM2-135M: through logits in memory, and
//! summed up as they are made, in turns. `cargo bench -p onpolicy-engine --bench head [-- ROWS]`
//! Not criterion, which cannot take turns between two cases.

use std::time::Instant;

use onpolicy_engine::head::Head;
use onpolicy_engine::logits::batch_stats;
use onpolicy_engine::ops::linear::linear;
use onpolicy_engine::sampler::{Draw, sample};
use onpolicy_engine::torch::{memory::keep_freed, random, slices::floats};
use onpolicy_plugin_api::SamplingParams;
use tch::Tensor;

const WIDTH: i64 = 576;
const VOCAB: i64 = 49_152;
/// Seconds and rounds for one line, at least.
const SECONDS: f64 = 3.0;
const ROUNDS: usize = 11;

fn main() {
    let only = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    keep_freed();
    random::seed(1);
    let _guard = tch::no_grad_guard();
    // Hidden states after a norm, and logits of about the spread of a language model's.
    let weight = random::normal(&[VOCAB, WIDTH]) * 0.1;
    println!("milliseconds through logits in memory, summed up, and how many times as fast");
    for rows in [1, 4, 8, 16, 64, 256] {
        if only.as_ref().is_none_or(|only| *only == rows.to_string()) {
            race_rows(&weight, rows);
        }
    }
}

fn race_rows(weight: &Tensor, rows: usize) {
    let hidden = random::normal(&[rows as i64, WIDTH]);
    let head = Head::new(weight);
    let params = [("sample", 1.0), ("greedy", 0.0)]
        .map(|(name, temperature)| (name, SamplingParams { temperature, ..Default::default() }));
    for (name, params) in &params {
        let draws: Vec<Draw> =
            (0..rows).map(|row| Draw { stream: row as u64, ..Draw::new(row, params) }).collect();
        race(
            name,
            rows,
            [
                &mut || {
                    let logits = linear(&hidden, weight, None);
                    std::hint::black_box(sample(floats(&logits), VOCAB as usize, &draws));
                },
                &mut || {
                    std::hint::black_box(head.sample(floats(&hidden), &draws));
                },
            ],
        );
    }
    let tokens: Vec<u32> = (0..rows as u32).map(|row| row * 97).collect();
    race(
        "log-probs",
        rows,
        [
            &mut || {
                let logits = linear(&hidden, weight, None);
                std::hint::black_box(batch_stats(floats(&logits), VOCAB as usize, &tokens, 1.0));
            },
            &mut || {
                std::hint::black_box(head.logprobs(floats(&hidden), &tokens));
            },
        ],
    );
    let product = median(&mut || {
        let _ = std::hint::black_box(linear(&hidden, weight, None));
    });
    println!("{rows:4} rows, the product alone: {product:.3}");
}

fn median(work: &mut dyn FnMut()) -> f64 {
    let mut times = Vec::new();
    let started = Instant::now();
    while started.elapsed().as_secs_f64() < SECONDS / 2.0 || times.len() < ROUNDS {
        let run = Instant::now();
        work();
        times.push(run.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Runs both in turns; prints medians and best times.
fn race(name: &str, rows: usize, mut work: [&mut dyn FnMut(); 2]) {
    let mut times = [Vec::new(), Vec::new()];
    let started = Instant::now();
    while started.elapsed().as_secs_f64() < SECONDS || times[0].len() < ROUNDS {
        for (work, times) in work.iter_mut().zip(&mut times) {
            let run = Instant::now();
            work();
            times.push(run.elapsed().as_secs_f64() * 1e3);
        }
    }
    let [old, new] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        [times[times.len() / 2], times[times.len() / 10], times[0]]
    });
    let ratio = |i: usize| format!("{:.3} {:.3} x{:.3}", old[i], new[i], old[i] / new[i]);
    println!(
        "{rows:4} rows, {name:9}: median {}, 10th percentile {}, best {}",
        ratio(0),
        ratio(1),
        ratio(2)
    );
}
