//! Training with bf16 weights through the libtorch path, engine and trainer on one set of them:
//! gradients near those of f32, twenty steps that learn, and a run that goes on after a stop.

mod common;

use onpolicy_engine::{device::Placement, model::decoder::Decoder, weights::Weights};
use onpolicy_plugin_api::{Attempt, Score, Verifier};
use onpolicy_trainer::{
    batch::{TrainBatch, TrainGroup},
    config::Config,
    entropy::KeepAll,
    loss::{Activations, LossSums, accumulate_gradient_with},
    metrics::{StepMetrics, log},
    optimizer::{Optimizer, OptimizerSettings},
    run::{Run, RunEvent, parts},
    train::Parts,
};
use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};
use tch::{Kind, Tensor};

const MODELS: [&str; 4] = ["llama-tied", "mistral-window", "qwen2", "qwen3"];

/// The gradient of all weights, flat, in f64; and what the loss came to.
fn gradient(
    model: &str,
    kind: Kind,
    groups: &[TrainGroup],
    activations: Activations,
) -> (Tensor, LossSums) {
    let (config, wide, _) = common::trainable(&common::tiny(model));
    let of_kind = |(name, t): (&str, &Tensor)| (name.to_string(), t.detach().to_kind(kind));
    let policy = Weights::new(wide.iter().map(of_kind).collect());
    let weights = policy.share_trainable();
    let settings =
        OptimizerSettings { betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.0, max_grad_norm: 1.0 };
    let optimizer = Optimizer::new(&weights, settings).expect("an optimizer");
    let decoder = Decoder::new(&config, &weights);
    let batch = TrainBatch::new(groups.to_vec(), &KeepAll {});
    let mut sums = LossSums::default();
    for part in batch.mini_batches(1, 60) {
        for micro in &part.micro_batches {
            let settings = common::settings(part.kept);
            let of_micro = accumulate_gradient_with(&decoder, micro, &settings, activations);
            sums.add(&of_micro.expect("a gradient"));
        }
    }
    let norm = optimizer.grad_norm().expect("a norm");
    let flat: Vec<Tensor> = weights
        .iter()
        .map(|(name, weight)| {
            let gradient = weight.grad();
            let wide = if kind == Kind::Double { Kind::Double } else { Kind::Float };
            assert_eq!(gradient.kind(), wide, "{name}: micro-batches add up in f32");
            gradient.to_kind(Kind::Double).flatten(0, -1)
        })
        .collect();
    let flat = Tensor::cat(&flat, 0);
    assert!((flat.norm().double_value(&[]) / norm - 1.0).abs() < 1e-4);
    (flat, sums)
}

fn relative(got: &Tensor, want: &Tensor) -> f64 {
    (got - want).norm().double_value(&[]) / want.norm().double_value(&[])
}

#[test]
fn gradients_are_those_of_the_native_path() {
    for model in MODELS {
        let (config, _, decoder) = common::trainable(&common::tiny(model));
        let groups = common::groups([3, 4, config.vocab_size], 3..=12, 1..=14);
        let groups = common::drawn(&decoder, groups, 60);
        let (want, sums) = gradient(model, Kind::Float, &groups, Activations::Kept);
        for activations in [Activations::Kept, Activations::Recomputed] {
            let (exact, exact_sums) = gradient(model, Kind::Double, &groups, activations);
            let off = relative(&exact, &want);
            assert!(off < 1e-5, "{model}, f64: {off:e}");
            assert!((exact_sums.objective - sums.objective).abs() < 1e-4, "{model}, f64");
            let (narrow, narrow_sums) = gradient(model, Kind::BFloat16, &groups, activations);
            let off = relative(&narrow, &want);
            println!("{model}: bf16 gradient off by {off:e}, {narrow_sums:?}");
            // Ratios are moved across the bounds of clipping, too.
            assert!(off < 0.25, "{model}, bf16: {off:e}");
            assert_eq!(narrow_sums.tokens, sums.tokens);
            let off = (narrow_sums.objective - sums.objective) / sums.tokens as f64;
            assert!(off.abs() < 0.02, "{model}, bf16: a token's objective is off by {off}");
        }
    }
}

/// Rewards digits below 5, of which the tiny models' tokens are full.
struct SmallDigits;

impl Verifier for SmallDigits {
    fn verify(&self, attempts: &[Attempt<'_>]) -> Vec<Score> {
        let share = |text: &str| {
            let digits = || text.chars().filter(char::is_ascii_digit);
            let small = digits().filter(|digit| *digit < '5').count();
            small as f32 / digits().count().max(1) as f32
        };
        attempts.iter().map(|attempt| Score::Reward(share(attempt.completion))).collect()
    }
}

fn config(dir: &Path, flags: &[&str]) -> Config {
    let text = format!(
        "[model]\npath = {:?}\ndtype = \"bf16\"\n[engine]\nkv_memory_mb = 16\nmax_num_seqs = 64\n\
         [gate]\nname = \"none\"\n[rollout]\nprompts_per_step = 4\ngroup_size = 16\n\
         max_new_tokens = 16\n[train]\nsteps = 20\nlr = 3e-3\nseed = 7\n\
         [output]\ndir = {dir:?}\nsample_prompts = 0\n",
        common::tiny("llama-tied"),
    );
    let flags: Vec<String> = flags.iter().map(ToString::to_string).collect();
    Config::parse(&text, &flags).expect("a configuration")
}

/// Runs until after step `last`.
fn run(config: &Config, resume: bool, last: u64) -> Vec<StepMetrics> {
    let parts = parts(config, |plugins| plugins).expect("built-ins");
    let parts = Parts { verifier: Box::new(SmallDigits), ..parts };
    let mut run = Run::start(config.clone(), parts, resume).expect("the run starts");
    assert_eq!(run.served().placement().kind, Kind::BFloat16);
    let plan = run.memory_plan().expect("a plan").to_string();
    assert!(plan.contains("f32 masters"), "{plan}");
    let stop = AtomicBool::new(false);
    let mut watch = |event: RunEvent<'_>| {
        if let RunEvent::Step(step) = event {
            stop.store(step.step >= last, Ordering::Relaxed);
        }
    };
    run.train(&stop, &mut watch).expect("the run ends");
    run.served().shutdown();
    log::read(&Path::new(&config.output.dir).join("metrics.jsonl")).expect("a log")
}

#[test]
fn twenty_steps_learn() {
    for flags in [&[][..], &["train.activation_checkpointing=true", "train.updates_per_batch=2"]] {
        let dir = tempfile::tempdir().expect("a folder");
        let steps = run(&config(dir.path(), flags), false, 20);
        let mean = |steps: &[StepMetrics]| {
            steps.iter().map(|step| step.reward_mean).sum::<f64>() / steps.len() as f64
        };
        let (first, last) = (mean(&steps[..4]), mean(&steps[16..]));
        println!("{flags:?}: reward {first} to {last}");
        assert!(last > first + 0.1, "{flags:?}: reward {first} to {last}");
        for step in &steps {
            assert!(step.mismatch_mean < 0.05, "step {}: {}", step.step, step.mismatch_mean);
            assert!(step.grad_norm.is_finite() && step.memory_retries == 0);
        }
    }
}

#[test]
fn a_run_that_goes_on_is_the_run_that_was_left_alone() {
    let (whole, halves) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let alone = run(&config(whole.path(), &["train.steps=6"]), false, 6);
    let halves = config(halves.path(), &["train.steps=6"]);
    run(&halves, false, 3);
    let resumed = run(&halves, true, 6);
    let timeless = |step: &StepMetrics| StepMetrics {
        seconds: Default::default(),
        tokens_per_second: 0.0,
        elapsed_seconds: 0.0,
        peak_memory_mb: 0.0,
        ..step.clone()
    };
    let timeless = |steps: &[StepMetrics]| steps.iter().map(timeless).collect::<Vec<_>>();
    assert_eq!(timeless(&alone), timeless(&resumed));
    // Saved as they are served.
    let saved = Path::new(&halves.output.dir).join("checkpoint-000006");
    let placement = Placement { kind: Kind::BFloat16, ..Placement::NATIVE };
    let config = std::fs::read_to_string(saved.join("config.json")).expect("the file");
    assert!(config.contains("\"bfloat16\""), "{config}");
    let spec = saved.to_string_lossy();
    let loaded = onpolicy_engine::model::loading::load_to(&spec, placement).expect("it loads");
    assert!(loaded.tensors.iter().all(|(_, tensor)| tensor.kind() == Kind::BFloat16));
}
