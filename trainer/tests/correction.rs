//! Truncated importance sampling makes the gradient of samples that a narrow engine drew the
//! trainer's own: exactly, by enumeration of every answer of one token.

use onpolicy_engine::{
    collect::collect,
    engine::{EngineConfig, EngineHandle, Model},
    model::{config::ModelConfig, decoder::Decoder, loading::load},
    weights::{ServeDtype, Weights},
};
use onpolicy_plugin_api::{Request, SamplingParams};
use onpolicy_trainer::{
    batch::{MiniBatch, TrainBatch, TrainGroup, TrainSample},
    entropy::KeepAll,
    loss::{LossSettings, LossSums, PpoClip, accumulate_gradient, token_stats},
};
use std::{
    path::Path,
    time::{Duration, Instant},
};
use tch::Tensor;

const PROMPT: [u32; 12] = [5, 9, 101, 44, 7, 7, 130, 21, 88, 3, 64, 12];

fn policy() -> (ModelConfig, Weights) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tiny/qwen3");
    let checkpoint = load(path.to_str().expect("UTF-8")).expect("a golden checkpoint loads");
    (checkpoint.config, Weights::new(checkpoint.tensors))
}

/// Log-prob of every token after the prompt, as the engine has it.
fn engine_logprobs(config: &ModelConfig, weights: &Weights, serve_dtype: ServeDtype) -> Vec<f32> {
    let model = Model {
        name: "tiny".into(),
        config: config.clone(),
        weights: weights.share(),
        tokenizer: None,
    };
    let settings = EngineConfig { kv_memory: 8 << 20, serve_dtype, ..EngineConfig::default() };
    let engine = EngineHandle::start(model, settings).expect("the engine starts");
    let params =
        SamplingParams { prompt_logprobs: Some(0), max_tokens: 1, ..SamplingParams::default() };
    let prompt = |token| [&PROMPT[..], &[token]].concat();
    let requests = (0..config.vocab_size as u32)
        .map(|token| Request::new(prompt(token), params.clone()))
        .collect();
    let deadline = Instant::now() + Duration::from_secs(60);
    let answers = collect(&engine, requests, deadline, &mut || {}).expect("the engine answers");
    answers.iter().map(|answer| answer.prompt_logprobs[PROMPT.len() - 1]).collect()
}

/// Every answer once, with its probability in its advantage: the batch's gradient is the
/// expectation over answers drawn with `logprobs`.
fn expectation(logprobs: &[f32]) -> MiniBatch {
    let reward = |token: usize| [1.0, -0.5, 0.25, -0.75][token % 4];
    let sample = |(token, &logprob): (usize, &f32)| TrainSample {
        tokens: vec![token as u32],
        logprob: vec![logprob],
        entropy: vec![0.0],
        baseline: vec![0.0],
        advantage: reward(token) * logprob.exp() * logprobs.len() as f32,
    };
    let samples = logprobs.iter().enumerate().map(sample).collect();
    let group = TrainGroup { prompt: PROMPT.to_vec(), samples, teaches: true };
    TrainBatch::new(vec![group], &KeepAll {}).mini_batches(1, 4096).remove(0)
}

/// Tight clipping, so that a ratio that is not 1 shows.
const CLIP: PpoClip = PpoClip { low: 1e-4, high: 1e-4, dual: 3.0 };

fn gradient(
    (config, weights): (&ModelConfig, &Weights),
    batch: &MiniBatch,
    tis_cap: Option<f32>,
) -> (Tensor, LossSums) {
    let weights = weights.share_trainable();
    let decoder = Decoder::new(config, &weights);
    let settings =
        LossSettings { clip: CLIP, temperature: 1.0, kept: batch.kept, first: true, tis_cap };
    let mut sums = LossSums::default();
    for micro in &batch.micro_batches {
        sums.add(&accumulate_gradient(&decoder, micro, &settings).expect("a gradient"));
    }
    let flat: Vec<Tensor> =
        weights.iter().map(|(_, tensor)| tensor.grad().flatten(0, -1)).collect();
    (Tensor::cat(&flat, 0), sums)
}

fn relative(got: &Tensor, want: &Tensor) -> f64 {
    (got - want).norm().double_value(&[]) / want.norm().double_value(&[])
}

#[test]
fn the_gradient_of_narrow_samples_becomes_the_trainers_own() {
    let (config, weights) = policy();
    let policy = (&config, &weights);
    let exact = engine_logprobs(&config, &weights, ServeDtype::F32);
    let (want, sums) = gradient(policy, &expectation(&exact), Some(2.0));
    assert!(sums.mismatch.mean() < 1e-5 && sums.mismatch.far() == 0.0);
    for dtype in [ServeDtype::F16, ServeDtype::Bf16, ServeDtype::Int8] {
        let narrow = engine_logprobs(&config, &weights, dtype);
        let batch = expectation(&narrow);
        let (corrected, sums) = gradient(policy, &batch, Some(2.0));
        let (uncorrected, _) = gradient(policy, &batch, None);
        let distances = exact.iter().zip(&narrow).map(|(a, b)| f64::from((a - b).abs()));
        let (mean, most) = (distances.clone().sum::<f64>() / 160.0, distances.fold(0.0, f64::max));
        let errors = [relative(&corrected, &want), relative(&uncorrected, &want)];
        println!("{dtype}: log-probs differ by {mean:e}, at most {most:e}; gradients {errors:?}");
        assert!((sums.mismatch.mean() - mean).abs() < 1e-5, "{:?}", sums.mismatch);
        assert!((sums.mismatch.largest() - most).abs() < 1e-4, "{:?}", sums.mismatch);
        assert!(errors[0] < 1e-4, "{dtype} with correction: {errors:?}");
        assert!(errors[1] > 0.05, "{dtype} without correction: {errors:?}");
    }
}

#[test]
fn weights_are_truncated() {
    let (config, weights) = policy();
    let policy = (&config, &weights);
    let exact = engine_logprobs(&config, &weights, ServeDtype::F32);
    let (want, _) = gradient(policy, &expectation(&exact), None);
    // Samples from an engine that gives every token a third of its probability.
    let third: Vec<f32> = exact.iter().map(|logprob| logprob - 3f32.ln()).collect();
    let (got, sums) = gradient(policy, &expectation(&third), Some(2.0));
    assert!(relative(&got, &(want * (2.0 / 3.0))) < 1e-4, "2 in place of 3");
    assert!((sums.mismatch.mean() - 3f64.ln()).abs() < 1e-5 && sums.mismatch.far() == 1.0);
}

#[test]
fn later_updates_keep_the_old_policy_of_the_first() {
    let (config, weights) = policy();
    let exact = engine_logprobs(&config, &weights, ServeDtype::F32);
    let trainable = weights.share_trainable();
    let decoder = Decoder::new(&config, &trainable);
    let mut batch = expectation(&exact);
    let micro = &mut batch.micro_batches[0];
    // The engine was off by a factor of 1.5; the policy has moved by a factor of 1.25 since.
    let own: Vec<f32> = token_stats(&decoder, micro, 1.0).iter().map(|s| s.logprob).collect();
    micro.own_logprob = own.iter().map(|logprob| logprob - 1.25f32.ln()).collect();
    micro.old_logprob = own.iter().map(|logprob| logprob - 1.875f32.ln()).collect();
    let clip = PpoClip { low: 0.5, high: 0.5, dual: 3.0 };
    let (kept, advantage) = (batch.kept, batch.micro_batches[0].advantage.clone());
    let settings = LossSettings { clip, temperature: 1.0, kept, first: false, tis_cap: Some(2.0) };
    let sums =
        accumulate_gradient(&decoder, &batch.micro_batches[0], &settings).expect("a gradient");
    assert!((sums.ratio / sums.tokens as f64 - 1.25).abs() < 1e-4, "PPO's ratio");
    assert!((sums.mismatch.mean() - 1.5f64.ln()).abs() < 1e-4, "{:?}", sums.mismatch);
    let total: f64 = advantage.iter().map(|&a| f64::from(a)).sum();
    assert!((sums.objective - 1.5 * 1.25 * total).abs() < 1e-3 * total.abs(), "the weighted loss");
}
