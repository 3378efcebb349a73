//! Training over two servers in other processes, one of which is killed in mid-step.

mod common;

use onpolicy_plugin_api::{Attempt, Score, Verifier};
use onpolicy_trainer::{
    config::Config,
    metrics::{StepMetrics, log},
    run::{Run, RunEvent, parts},
    train::{Parts, Progress},
};
use std::{
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

const STEPS: usize = 4;
/// The step in whose rollouts a server dies.
const DIES: u64 = 2;

/// As good as random, so that most groups are mixed.
struct Lottery;

impl Verifier for Lottery {
    fn verify(&self, attempts: &[Attempt<'_>]) -> Vec<Score> {
        let sum = |text: &str| text.bytes().map(u32::from).sum::<u32>();
        attempts.iter().map(|a| Score::Reward((sum(a.completion) % 3 == 0).into())).collect()
    }
}

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny/llama-tied")
}

fn config(dir: &Path, flags: &[String]) -> Config {
    let text = format!(
        "[model]\npath = {:?}\n[gate]\nname = \"clip_b\"\nmu = 0.5\n[rollout]\n\
         prompts_per_step = 4\ngroup_size = 4\nmax_new_tokens = 16\ntimeout_seconds = 60\n\
         [train]\nsteps = {STEPS}\nlr = 1e-3\n[output]\ndir = {dir:?}\nsample_prompts = 0\n",
        tiny()
    );
    Config::parse(&text, flags).expect("a configuration")
}

fn train(config: &Config, watch: &mut dyn FnMut(&RunEvent<'_>)) -> Vec<StepMetrics> {
    let made = parts(config, |plugins| plugins).expect("built-ins");
    let made = Parts { verifier: Box::new(Lottery), ..made };
    let mut run = Run::start(config.clone(), made, false).expect("the run starts");
    run.train(&AtomicBool::new(false), &mut |event| watch(&event)).expect("the run ends");
    let steps = log::read(&Path::new(&config.output.dir).join("metrics.jsonl")).expect("a log");
    assert_eq!(run.served().engine.weight_version(), steps[STEPS - 1].weight_version);
    run.served().shutdown();
    steps
}

fn version(url: &str) -> serde_json::Value {
    let answer = std::process::Command::new("curl")
        .args(["-sf", "--max-time", "10", &format!("{url}/weight_info")])
        .output()
        .expect("curl");
    serde_json::from_slice(&answer.stdout).expect("JSON")
}

#[test]
fn a_run_over_two_servers_survives_the_death_of_one() {
    let (dir, native) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let transfer = tempfile::tempdir().unwrap();
    let root = transfer.path().display().to_string();
    let flags = ["--set", "engine.kv_memory_mb=16", "--weight-root", &root];
    let start = || common::serve(&tiny(), &flags);
    let (survivor, mut dying) = (start(), Some(start()));
    let urls = format!("{},{}", survivor.url, dying.as_ref().expect("it runs").url);
    let remote = [
        format!("engine.kind={urls:?}"),
        format!("engine.transfer_dir={root:?}"),
        "engine.remote.health_period_seconds=0.2".to_string(),
    ];
    let config = config(dir.path(), &remote);
    let (mut done, mut rollout) = (0, false);
    let steps = train(&config, &mut |event| match event {
        RunEvent::Step(step) => done = step.step,
        RunEvent::Progress(Progress::Phase(phase)) => rollout = *phase == "rollout",
        // The first answer of the step is there, others are not.
        RunEvent::Progress(Progress::Token) if rollout && done + 1 == DIES => drop(dying.take()),
        _ => {}
    });
    assert!(dying.is_none(), "one was killed");

    let native = self::config(native.path(), &["engine.kv_memory_mb=16".to_string()]);
    let native = train(&native, &mut |_| {});
    assert!(native[STEPS - 1].weight_version >= 2, "there is something to compare");
    for (remote, native) in steps.iter().zip(&native) {
        // Samples follow from seed and weights, wherever they are drawn.
        assert_eq!(remote.reward_mean, native.reward_mean, "step {}", remote.step);
        assert_eq!(remote.completion_tokens, native.completion_tokens);
        assert_eq!(remote.weight_version, native.weight_version);
        assert_eq!((remote.samples, remote.groups_failed, remote.staleness_max), (16, 0, 0));
        assert!((remote.entropy - native.entropy).abs() < 1e-5, "{}", remote.entropy);
        assert!(remote.mismatch_max < 1e-5 && remote.mismatch_far == 0.0);
    }
    let newest = steps[STEPS - 1].weight_version.to_string();
    assert_eq!(version(&survivor.url)["weight_version"], newest);
    assert_eq!(std::fs::read_dir(transfer.path()).unwrap().count(), 0, "nothing is left behind");
}
