//! Allocations that fail in a forward or backward pass: the pass is run again in smaller ones, and
//! the update is the one that it would have been.

use onpolicy_plugin_api::{Attempt, Score, Verifier};
use onpolicy_trainer::{
    config::Config,
    metrics::{StepMetrics, log},
    run::{Run, RunEvent, parts},
    train::{Parts, Progress},
};
use std::{path::Path, sync::atomic::AtomicBool};
use tch::{Device, Kind, Tensor};

const STEPS: u64 = 3;

struct Lottery;

impl Verifier for Lottery {
    fn verify(&self, attempts: &[Attempt<'_>]) -> Vec<Score> {
        let reward = |text: &str| text.bytes().map(u32::from).sum::<u32>() % 3 == 0;
        attempts.iter().map(|a| Score::Reward(f32::from(u8::from(reward(a.completion))))).collect()
    }
}

fn config(dir: &Path, flags: &[&str]) -> Config {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tiny/llama-tied");
    let text = format!(
        "[model]\npath = {model:?}\n[engine]\nkv_memory_mb = 16\nmax_num_seqs = 32\n\
         [gate]\nname = \"none\"\n[rollout]\nprompts_per_step = 4\ngroup_size = 4\n\
         max_new_tokens = 16\n[train]\nsteps = {STEPS}\nlr = 1e-3\nseed = 7\n\
         [output]\ndir = {dir:?}\nsample_prompts = 0\n"
    );
    let flags: Vec<String> = flags.iter().map(ToString::to_string).collect();
    Config::parse(&text, &flags).expect("a configuration")
}

/// A run in which an allocation fails after the first pass of the `fail`-th try of step 2.
struct Outcome {
    steps: Vec<StepMetrics>,
    weights: Vec<Tensor>,
    error: Option<String>,
}

fn train(flags: &[&str], failures: usize) -> Outcome {
    let dir = tempfile::tempdir().expect("a folder");
    let config = config(dir.path(), flags);
    let parts = parts(&config, |plugins| plugins).expect("built-ins");
    let parts = Parts { verifier: Box::new(Lottery), ..parts };
    let mut run = Run::start(config, parts, false).expect("the run starts");
    let (mut step, mut left) = (1, failures);
    let mut watch = |event: RunEvent<'_>| match event {
        RunEvent::Step(metrics) => step = metrics.step + 1,
        RunEvent::Progress(Progress::Rows(..)) if step == 2 && left > 0 => {
            left -= 1;
            // More than any machine has: libtorch's allocator fails, and tch panics.
            let _ = Tensor::empty([1 << 50], (Kind::Float, Device::Cpu));
        }
        _ => {}
    };
    let error = run.train(&AtomicBool::new(false), &mut watch).err().map(|e| e.to_string());
    run.served().shutdown();
    let weights = run.served().weights.iter().map(|(_, t)| t.detach()).collect();
    let steps = log::read(&dir.path().join("metrics.jsonl")).expect("a log");
    Outcome { steps, weights, error }
}

fn distance(one: &[Tensor], other: &[Tensor]) -> f64 {
    let off = one.iter().zip(other).map(|(a, b)| (a - b).square().sum(Kind::Double));
    off.map(|square| square.double_value(&[])).sum::<f64>().sqrt()
}

#[test]
fn a_failed_pass_is_run_again_in_smaller_ones() {
    for flags in [&[][..], &["train.updates_per_batch=2", "train.correction=tis"]] {
        let (whole, halved) = (train(flags, 0), train(flags, 2));
        assert_eq!((&whole.error, &halved.error), (&None, &None));
        let column = |outcome: &Outcome, of: fn(&StepMetrics) -> usize| -> Vec<usize> {
            outcome.steps.iter().map(of).collect()
        };
        assert_eq!(column(&whole, |s| s.memory_retries), [0, 0, 0]);
        assert_eq!(column(&halved, |s| s.memory_retries), [0, 2, 0]);
        assert_eq!(column(&whole, |s| s.micro_batch_tokens), [512; 3]);
        let rows = column(&halved, |s| s.micro_batch_tokens);
        assert_eq!((rows[0], rows[1]), (512, rows[2]), "the smaller number stays");
        assert!((20..=128).contains(&rows[1]), "{rows:?}");
        // Sums in another order, and AdamW in between. A lost micro-batch moves most of the 60,000
        // weights by a good part of 1e-3: 0.1 in all.
        let off = distance(&whole.weights, &halved.weights);
        assert!(off < 5e-3, "{off:e}");
        for (whole, halved) in whole.steps.iter().zip(&halved.steps) {
            assert!((whole.grad_norm / halved.grad_norm - 1.0).abs() < 1e-3, "step {}", whole.step);
            assert_eq!(whole.completion_tokens, halved.completion_tokens);
        }
    }
}

#[test]
fn a_sample_that_does_not_fit_ends_the_run_with_what_to_do() {
    let outcome = train(&[], 1000);
    let error = outcome.error.expect("an error");
    assert!(error.contains("memory does not suffice for a pass over one sample"), "{error}");
    assert!(error.contains("can't allocate memory"), "{error}");
    assert_eq!(outcome.steps.len(), 1);
}
