//! One whole update against PyTorch's, on the tiny checkpoints (`golden/grpo_step.json`).

use onpolicy_engine::{
    model::{config::ModelConfig, decoder::Decoder, loading::load},
    weights::Weights,
};
use onpolicy_plugin_api::{TokenBatch, TokenGate, TokenStats};
use onpolicy_trainer::{
    advantage::grpo,
    batch::{TrainBatch, TrainGroup, TrainSample},
    entropy::ClipB,
    loss::{LossSettings, LossSums, PpoClip, accumulate_gradient, token_stats},
    optimizer::{Optimizer, OptimizerSettings},
};
use serde_json::Value;
use std::path::{Path, PathBuf};
use tch::Kind;

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(path)
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn integer(value: &Value) -> usize {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no integer")) as usize
}

/// Response tokens of all sequences, flat, out of a `[sequence][token]` matrix whose column `j` is
/// about token `j + 1`.
fn response(case: &Value, column: &str) -> Vec<f32> {
    let rows = case[column].as_array().expect("a matrix").iter().enumerate();
    rows.flat_map(|(row, values)| {
        let (start, end) =
            (integer(&case["prompt_len"][row]) - 1, integer(&case["lengths"][row]) - 1);
        values.as_array().expect("a row")[start..end].iter().map(|v| number(v) as f32)
    })
    .collect()
}

/// The groups of a case with `logprob` (flat) as the log-probs at drawing time.
fn groups(case: &Value, logprob: &[f32]) -> Vec<TrainGroup> {
    let entropy = response(case, "entropy_before");
    let size = integer(&case["group_size"]);
    let rows = case["input_ids"].as_array().expect("rows").len();
    let mut flat = 0;
    (0..rows / size)
        .map(|group| {
            let rows = group * size..(group + 1) * size;
            let rewards: Vec<f32> =
                rows.clone().map(|row| number(&case["rewards"][row]) as f32).collect();
            let advantages = grpo(&rewards);
            for (row, advantage) in rows.clone().zip(&advantages) {
                let want = number(&case["advantages"][row]) as f32;
                assert!((advantage - want).abs() < 1e-5, "advantage {advantage}, not {want}");
            }
            let prompt_len = integer(&case["prompt_len"][rows.start]);
            let tokens = |row: usize| -> Vec<u32> {
                let ids = case["input_ids"][row].as_array().expect("ids");
                ids[..integer(&case["lengths"][row])].iter().map(|id| integer(id) as u32).collect()
            };
            let samples = rows.clone().zip(advantages).map(|(row, advantage)| {
                let tokens = tokens(row)[prompt_len..].to_vec();
                let range = flat..flat + tokens.len();
                flat = range.end;
                TrainSample {
                    logprob: logprob[range.clone()].to_vec(),
                    entropy: entropy[range.clone()].to_vec(),
                    baseline: vec![0.0; range.len()],
                    tokens,
                    advantage,
                }
            });
            TrainGroup {
                prompt: tokens(rows.start)[..prompt_len].to_vec(),
                samples: samples.collect(),
                teaches: true,
            }
        })
        .collect()
}

struct Mask(Vec<bool>);

impl TokenGate for Mask {
    fn keep(&self, _: &TokenBatch<'_>) -> Vec<bool> {
        self.0.clone()
    }
}

fn mask(case: &Value) -> Vec<bool> {
    let want: Vec<bool> = response(case, "keep").iter().map(|&keep| keep == 1.0).collect();
    if case["gate"] == "clip_b" {
        let gate = ClipB { mu: number(&case["gate_mu"]), two_sided: false };
        let batch = TrainBatch::new(groups(case, &response(case, "logp_before")), &gate);
        assert_eq!(batch.keep(), want, "the gate's mask");
    }
    want
}

fn policy(case: &Value, kind: Kind) -> (ModelConfig, Weights) {
    let name = case["model"].as_str().expect("a name");
    let path = golden("tiny").join(name);
    let checkpoint = load(path.to_str().expect("UTF-8")).expect("a golden checkpoint loads");
    let tensors = checkpoint.tensors.into_iter().map(|(name, t)| (name, t.to_kind(kind)));
    (checkpoint.config, Weights::new(tensors.collect()))
}

#[track_caller]
fn assert_close(got: impl Iterator<Item = f32>, want: &[f32], tolerance: f32, what: &str) {
    let got: Vec<f32> = got.collect();
    assert_eq!(got.len(), want.len(), "{what}");
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() < tolerance, "{what}[{index}]: {got}, not {want}");
    }
}

fn check(case: &Value, max_rows: usize, kind: Kind) {
    let what = format!("{} gate {} rows {max_rows} {kind:?}", case["model"], case["gate"]);
    let (config, policy) = policy(case, kind);
    let weights = policy.share_trainable();
    let decoder = Decoder::new(&config, &weights);
    let temperature = number(&case["temperature"]) as f32;
    let batch = TrainBatch::new(groups(case, &response(case, "old_logp")), &Mask(mask(case)));
    let mini_batches = batch.mini_batches(1, max_rows);
    let micros = &mini_batches[0].micro_batches;
    let kept = mini_batches[0].kept;
    let stats = || -> Vec<TokenStats> {
        micros.iter().flat_map(|micro| token_stats(&decoder, micro, temperature)).collect()
    };
    let column = |name: &str| response(case, name);
    let before = stats();
    assert_close(before.iter().map(|s| s.logprob), &column("logp_before"), 1e-4, &what);
    assert_close(before.iter().map(|s| s.entropy), &column("entropy_before"), 1e-4, &what);

    let clip = PpoClip {
        low: number(&case["eps_low"]) as f32,
        high: number(&case["eps_high"]) as f32,
        dual: number(&case["dual_clip"]) as f32,
    };
    let mut sums = LossSums::default();
    for micro in micros {
        let settings = LossSettings { clip, temperature, kept, first: true, tis_cap: None };
        sums.add(&accumulate_gradient(&decoder, micro, &settings).expect("a gradient"));
    }
    let loss = -sums.objective / kept as f64;
    assert!((loss - number(&case["loss"])).abs() < 1e-5, "{what}: loss {loss}");
    let clipped = sums.clipped as f64 / kept as f64;
    assert!((clipped - number(&case["clip_fraction"])).abs() < 1e-6, "{what}: clipped {clipped}");
    for (name, want) in case["grad_norms"].as_object().expect("norms") {
        let grad = weights.get(name).expect("a weight").grad();
        assert!(grad.defined(), "{what}: {name} has no gradient");
        let (got, want) = (grad.norm().double_value(&[]), number(want));
        assert!((got - want).abs() <= 1e-3 * want, "{what}: {name}: gradient {got}, not {want}");
    }

    let settings = OptimizerSettings {
        betas: (number(&case["betas"][0]), number(&case["betas"][1])),
        eps: number(&case["eps"]),
        weight_decay: number(&case["weight_decay"]),
        max_grad_norm: number(&case["max_grad_norm"]),
    };
    let mut optimizer = Optimizer::new(&weights, settings).expect("an optimizer");
    let norm = optimizer.grad_norm().expect("a norm");
    let want = number(&case["grad_norm"]);
    assert!((norm - want).abs() <= 1e-3 * want, "{what}: norm {norm}, not {want}");
    optimizer.step(number(&case["lr"]), norm).expect("a step");
    for (name, want) in case["weight_norms_after"].as_object().expect("norms") {
        // The served handle: the update was written in place.
        let got = policy.get(name).expect("a weight").norm().double_value(&[]);
        assert!((got - number(want)).abs() < 1e-4, "{what}: {name}: norm {got}, not {want}");
    }
    assert_close(stats().iter().map(|s| s.logprob), &column("logp_after"), 1e-4, &what);
}

#[test]
fn one_update_agrees_with_pytorch() {
    let text = std::fs::read_to_string(golden("grpo_step.json")).expect("the golden file");
    let golden: Value = serde_json::from_str(&text).expect("JSON");
    for case in golden["cases"].as_array().expect("cases") {
        for max_rows in [1000, 40, 12] {
            check(case, max_rows, Kind::Float);
            // The libtorch path, which f64 takes.
            check(case, max_rows, Kind::Double);
        }
    }
}
