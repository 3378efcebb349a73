//! Online, overlapped and batch: the same problems in the same order, tokens as stale as the mode
//! says, and runs that go on after a stop with what was drawn.

use onpolicy_plugin_api::{Attempt, Problem, Score, TokenStats, Verifier};
use onpolicy_trainer::{
    builtins,
    checkpoint::{self, drawn},
    config::Config,
    metrics::{Staleness, StepMetrics, log},
    run::{Run, RunEvent, parts},
    train::Parts,
};
use rand::{Rng, SeedableRng};
use std::{
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

const STEPS: u64 = 6;
const MODES: [&str; 3] = ["online", "overlapped", "batch"];
const PROMPTS: usize = 4;
const GROUP: usize = 4;

/// Problems in the order in which they were judged, each once.
type Seen = Arc<Mutex<Vec<Problem>>>;

/// Judges the text alone, by `reward`, and remembers the problems.
struct Judge {
    reward: fn(&str) -> f32,
    seen: Seen,
}

impl Verifier for Judge {
    fn verify(&self, attempts: &[Attempt<'_>]) -> Vec<Score> {
        let problems = attempts.iter().step_by(GROUP).map(|attempt| attempt.problem.clone());
        self.seen.lock().unwrap().extend(problems);
        attempts.iter().map(|attempt| Score::Reward((self.reward)(attempt.completion))).collect()
    }
}

/// As good as random, so that most groups are mixed.
fn lottery(text: &str) -> f32 {
    f32::from(u8::from(text.bytes().map(u32::from).sum::<u32>() % 3 == 0))
}

fn config(mode: &str, dir: &Path, flags: &[&str]) -> Config {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tiny/llama-tied");
    let text = format!(
        "[model]\npath = {model:?}\n[engine]\nkv_memory_mb = 16\nmax_num_seqs = 32\n\
         [gate]\nname = \"none\"\n[rollout]\nprompts_per_step = {PROMPTS}\n\
         group_size = {GROUP}\nmax_new_tokens = 16\n[train]\nmode = \"{mode}\"\n\
         steps = {STEPS}\nlr = 1e-3\nseed = 7\n[output]\ndir = {dir:?}\nsample_prompts = 0\n"
    );
    let flags: Vec<String> = flags.iter().map(ToString::to_string).collect();
    Config::parse(&text, &flags).expect("a configuration")
}

fn judged_by(reward: fn(&str) -> f32, config: &Config) -> (Parts, Seen) {
    let seen = Seen::default();
    let verifier = Box::new(Judge { reward, seen: seen.clone() });
    let parts = parts(config, |plugins| plugins).expect("built-ins");
    (Parts { verifier, ..parts }, seen)
}

/// Runs until after step `last`, and returns the steps of the whole log and the problems seen.
fn run(config: &Config, resume: bool, last: u64) -> (Vec<StepMetrics>, Vec<Problem>) {
    let (parts, seen) = judged_by(lottery, config);
    let mut run = Run::start(config.clone(), parts, resume).expect("the run starts");
    let stop = AtomicBool::new(false);
    let mut watch = |event: RunEvent<'_>| {
        if let RunEvent::Step(step) = event {
            stop.store(step.step >= last, Ordering::Relaxed);
        }
    };
    run.train(&stop, &mut watch).expect("the run ends");
    run.served().shutdown();
    let steps = log::read(&Path::new(&config.output.dir).join("metrics.jsonl")).expect("a log");
    let seen = seen.lock().unwrap().clone();
    (steps, seen)
}

/// The metrics without those of the clock.
fn timeless(steps: &[StepMetrics]) -> Vec<StepMetrics> {
    let timeless = |step: &StepMetrics| StepMetrics {
        seconds: Default::default(),
        tokens_per_second: 0.0,
        elapsed_seconds: 0.0,
        peak_memory_mb: 0.0,
        ..step.clone()
    };
    steps.iter().map(timeless).collect()
}

#[test]
fn modes_differ_in_staleness_alone() {
    let runs = MODES.map(|mode| {
        let dir = tempfile::tempdir().expect("a folder");
        run(&config(mode, dir.path(), &[]), false, STEPS)
    });
    let [(online, problems), (overlapped, _), (batch, _)] = &runs;
    assert_eq!(problems.len(), PROMPTS * STEPS as usize);
    let task = builtins::register(Default::default(), 7).make_task("sum", &Default::default());
    let task = task.expect("a built-in");
    for (index, problem) in problems.iter().enumerate() {
        assert_eq!(*problem, task.train(index as u64), "problem {index}");
    }
    for (steps, seen) in &runs {
        assert_eq!(seen, problems);
        assert_eq!(steps.len() as u64, STEPS);
        let updates = steps.last().unwrap().weight_version;
        assert!(updates >= 4, "{updates} updates show nothing");
        // The first step has no weights but the first.
        assert_eq!(timeless(&steps[..1]), timeless(&online[..1]));
    }
    for step in online {
        assert_eq!((step.staleness_mean, step.staleness_max), (0.0, 0));
    }
    for (before, step) in overlapped.iter().zip(&overlapped[1..]) {
        assert!(step.staleness_max <= 1, "step {}: {}", step.step, step.staleness_max);
        assert!(step.staleness_max as f64 >= step.staleness_mean);
        let unchanged = before.weight_version == before.step - 1;
        assert!(!unchanged || step.staleness_max == 0, "no update, nothing stale");
    }
    for (before, step) in batch.iter().zip(&batch[1..]) {
        // All tokens are of version 0.
        assert_eq!(step.staleness_max, before.weight_version);
        assert_eq!(step.staleness_mean, before.weight_version as f64);
    }
}

#[test]
fn time_is_counted_once() {
    for mode in MODES {
        let dir = tempfile::tempdir().expect("a folder");
        let (steps, _) = run(&config(mode, dir.path(), &["eval.every=2"]), false, STEPS);
        let drawn: f64 = steps.iter().map(|s| s.seconds.rollout).sum();
        let waited: f64 = steps.iter().map(|s| s.seconds.rollout_wait).sum();
        let total: f64 = steps.iter().map(|s| s.seconds.total).sum();
        assert!(drawn > 0.0 && drawn <= total, "{mode}: {drawn} of {total}");
        match mode {
            "online" => {
                assert!(steps.iter().all(|s| s.seconds.rollout <= s.seconds.rollout_wait))
            }
            "batch" => {
                assert!(drawn <= steps[0].seconds.rollout_wait);
                let later = steps[1..].iter().map(|s| s.seconds.rollout_wait);
                assert!(later.sum::<f64>() < steps[0].seconds.rollout_wait);
                let pace = steps[0].tokens_per_second;
                assert!(steps.iter().all(|s| (s.tokens_per_second / pace - 1.0).abs() < 1e-6));
            }
            _ => assert!(waited < total),
        }
        for step in &steps {
            let phases: f64 = step.seconds.phases().iter().map(|(_, seconds)| seconds).sum();
            assert!((phases - step.seconds.total).abs() < 1e-9, "{mode}: {:?}", step.seconds);
        }
        let elapsed = steps.last().unwrap().elapsed_seconds;
        assert!((elapsed - total).abs() < 0.01 + 0.01 * total, "{mode}: {elapsed} and {total}");
    }
}

/// A number as it comes back from `metrics.jsonl`: reading JSON may change its last bit.
fn as_logged(number: f64) -> f64 {
    let text = serde_json::to_string(&number).expect("JSON");
    serde_json::from_str(&text).expect("a number")
}

#[test]
fn a_stopped_run_goes_on_with_what_was_drawn() {
    for (mode, ahead) in MODES.into_iter().zip([0, 1, 3]) {
        let dir = tempfile::tempdir().expect("a folder");
        let config = config(mode, dir.path(), &[]);
        let (_, before) = run(&config, false, 3);
        let kept = drawn(&checkpoint::latest(dir.path()).expect("a checkpoint")).expect("kept");
        assert_eq!(kept.len(), ahead, "{mode}");
        let (steps, after) = run(&config, true, STEPS);
        assert_eq!(steps.len() as u64, STEPS, "{mode}");
        assert_eq!([before, after].concat().len(), PROMPTS * STEPS as usize, "{mode}");
        for (step, kept) in steps[3..].iter().zip(&kept) {
            let rollouts: Vec<_> = kept.rollouts.iter().collect();
            let version = steps[step.step as usize - 2].weight_version;
            let staleness = Staleness::of(&rollouts, version);
            let mean = as_logged(staleness.mean);
            assert_eq!((step.staleness_mean, step.staleness_max), (mean, staleness.max));
            let tokens: usize = rollouts.iter().map(|rollout| rollout.new_tokens()).sum();
            assert_eq!(step.completion_tokens, tokens, "{mode}");
        }
    }
}

#[test]
fn online_and_batch_runs_resume_exactly() {
    for mode in ["online", "batch"] {
        let (calm, stopped) =
            (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        let (undisturbed, problems) = run(&config(mode, calm.path(), &[]), false, STEPS);
        let stopping = config(mode, stopped.path(), &[]);
        let (_, before) = run(&stopping, false, 2);
        let (resumed, after) = run(&stopping, true, STEPS);
        assert_eq!(timeless(&resumed), timeless(&undisturbed), "{mode}");
        assert_eq!([before, after].concat(), problems, "{mode}");
    }
}

#[test]
fn statistics_survive_the_checkpoint_bit_by_bit() {
    let mut rng = rand::rngs::StdRng::seed_from_u64(1);
    for _ in 0..100_000 {
        let mut number = || f32::from_bits(rng.random_range(0..0x7f00_0000)) - 8.0;
        let stats =
            TokenStats { logprob: number(), entropy: number() + 8.0, baseline: number() / 3.0 };
        let text = serde_json::to_string(&stats).expect("JSON");
        assert_eq!(serde_json::from_str::<TokenStats>(&text).expect("JSON"), stats);
    }
}

#[test]
fn a_short_online_run_learns() {
    let dir = tempfile::tempdir().expect("a folder");
    let flags = ["train.steps=25", "train.lr=5e-3", "rollout.group_size=8"];
    let config = config("online", dir.path(), &flags);
    // The vocabulary's words are t3 to t159.
    let ones =
        |text: &str| text.matches("t1").count() as f32 / text.matches('t').count().max(1) as f32;
    let (parts, _) = judged_by(ones, &config);
    let mut run = Run::start(config, parts, false).expect("the run starts");
    let summary = run.train(&AtomicBool::new(false), &mut |_| {}).expect("the run ends");
    let (first, last) = (summary.reward_first, summary.reward_last);
    assert!(first < 0.6 && last > first + 0.2, "reward {first} to {last}");
}

#[test]
fn the_weights_of_a_run_are_not_given_back() {
    use onpolicy_plugin_api::{EngineError, Sleep};
    let dir = tempfile::tempdir().expect("a folder");
    let config = config("online", dir.path(), &[]);
    let (parts, _) = judged_by(lottery, &config);
    let run = Run::start(config, parts, false).expect("the run starts");
    let refused = run.served().engine.sleep(Sleep::Weights);
    assert!(matches!(refused, Err(EngineError::Unsupported(_))), "{refused:?}");
}
