//! `onpolicy bench step`: a whole GRPO step through the trainer, phase by phase.

use super::{
    cli::{Common, positive},
    report::{Line, Report, Unit},
    roofline::Work,
    session::{Session, peak_memory},
    train,
    workload::Workload,
};
use anyhow::ensure;
use clap::Args;
use onpolicy_engine::model::loading::Checkpoint;
use onpolicy_plugin_api::{Attempt, Score, Verifier};
use onpolicy_trainer::{
    batch::{TrainGroup, TrainSample},
    memory_plan::{MemoryPlan, Subject},
    metrics::{Seconds, StepMetrics},
    optimizer::{Optimizer, OptimizerSettings},
    run,
    train::Trainer,
};
use std::collections::VecDeque;

/// Longest prompt that memory is set aside for; those of the task have about 40 tokens.
const PROMPT_TOKENS: usize = 128;

/// `onpolicy bench step`.
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Problems of the step (of the task that the configuration names; one-digit sums)
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = positive)]
    prompts: usize,
    /// Samples of each problem, at least 2
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = positive)]
    samples: usize,
    /// Tokens of each sample; none ends before
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = positive)]
    new_tokens: usize,
}

/// Runs the benchmark.
///
/// # Errors
/// A model or configuration that does not work, or a step that fails.
pub fn run(arguments: &Arguments) -> Result<(), anyhow::Error> {
    let report = measure(arguments)?;
    arguments.common.publish(&report)
}

fn measure(arguments: &Arguments) -> Result<Report, anyhow::Error> {
    ensure!(arguments.samples > 1, "--samples must be at least 2: one has nothing to beat");
    let prepare = |checkpoint: &mut Checkpoint| prepare(arguments, checkpoint);
    let mut session = Session::start(&arguments.common, prepare)?;
    let mut trainer = trainer(&session)?;
    let (mut times, mut last) = (Vec::new(), None);
    for round in session.rounds() {
        let step = trainer.step(&mut |_| {})?;
        check(arguments, &step)?;
        if round.counts {
            times.push(step.seconds);
        }
        last = Some(step);
    }
    let last = last.ok_or_else(|| anyhow::anyhow!("no step was taken"))?;
    let group = format!(
        "a GRPO step of {} x {} samples of {} tokens, {} prompt tokens in all",
        arguments.prompts, arguments.samples, arguments.new_tokens, last.prompt_tokens
    );
    let memory = peak_memory(&group);
    let works = works(&session, arguments, &last);
    let mut lines = lines(&mut session, &group, &times, &works);
    lines.extend(memory);
    lines.push(planned(&session, arguments, &last, &group));
    Ok(session.report("step", lines, Vec::new()))
}

/// Checks that the model can do it. No token ends a sample, so that all are of the same length.
fn prepare(
    arguments: &Arguments,
    checkpoint: &mut Checkpoint,
) -> Result<Vec<String>, anyhow::Error> {
    let Arguments { prompts, samples, new_tokens, .. } = *arguments;
    let workload = Workload::custom([prompts, samples, PROMPT_TOKENS, new_tokens]);
    workload.check(&checkpoint.config)?;
    checkpoint.config.eos_token_ids.clear();
    Ok(vec![
        format!("engine.kv_memory_mb={}", (workload.kv_bytes(&checkpoint.config) >> 20) + 1),
        format!("engine.max_num_seqs={}", workload.all_samples().max(256)),
        format!("engine.max_waiting={}", prompts.max(1024)),
        format!("rollout.prompts_per_step={prompts}"),
        format!("rollout.group_size={samples}"),
        format!("rollout.max_new_tokens={new_tokens}"),
    ])
}

/// Rewards every second sample, so that every group teaches something.
struct EverySecond;

impl Verifier for EverySecond {
    fn verify(&self, attempts: &[Attempt<'_>]) -> Vec<Score> {
        (0..attempts.len()).map(|index| Score::Reward((index % 2) as f32)).collect()
    }
}

fn trainer(session: &Session) -> Result<Trainer, anyhow::Error> {
    let (served, config) = (&session.served, &session.config);
    let mut parts = run::parts(config, |plugins| plugins)?;
    parts.verifier = Box::new(EverySecond);
    let optimizer = Optimizer::new(&served.weights, OptimizerSettings::new(&config.train))?;
    Ok(Trainer::new(config.clone(), parts, served, optimizer, (0, VecDeque::new())))
}

fn check(arguments: &Arguments, metrics: &StepMetrics) -> Result<(), anyhow::Error> {
    let wanted = arguments.prompts * arguments.samples * arguments.new_tokens;
    ensure!(
        metrics.completion_tokens == wanted && metrics.groups_mixed == arguments.prompts,
        "the step made {} tokens in {} groups that teach, where {wanted} and {} were asked for",
        metrics.completion_tokens,
        metrics.groups_mixed,
        arguments.prompts
    );
    Ok(())
}

/// What was planned of the memory, libraries apart.
fn planned(session: &Session, arguments: &Arguments, last: &StepMetrics, group: &str) -> Line {
    let prompts = vec![last.prompt_tokens.div_ceil(arguments.prompts); arguments.prompts];
    let plan = MemoryPlan::new(&Subject {
        model: session.served.model(),
        config: &session.config,
        prompts: &prompts,
        placement: session.served.placement(),
        others: 0,
        memory: None,
    });
    Line::values(group, "memory planned", "MiB", vec![plan.total_mb()])
}

/// What rollout, training and update take.
struct Works {
    rollout: Work,
    train: Work,
    update: Work,
}

fn works(session: &Session, arguments: &Arguments, last: &StepMetrics) -> Works {
    let Arguments { prompts, samples, new_tokens, .. } = *arguments;
    let mean = last.prompt_tokens.div_ceil(prompts);
    let workload = Workload::custom([prompts, samples, mean, new_tokens]);
    let group = train_group(&workload);
    let rows = session.config.train.pass_tokens(session.served.placement().device);
    Works {
        rollout: session.costs.rollout(&workload, true),
        train: train::work(&session.costs, &vec![group; prompts], rows),
        update: session.costs.optimizer(),
    }
}

/// A group of the workload's size. What its tokens are does not matter.
fn train_group(workload: &Workload) -> TrainGroup {
    let zeros = vec![0.0; workload.new_tokens];
    let sample = TrainSample {
        tokens: vec![0; workload.new_tokens],
        logprob: zeros.clone(),
        entropy: zeros.clone(),
        baseline: zeros,
        ..TrainSample::default()
    };
    TrainGroup {
        prompt: vec![0; workload.prompt_tokens],
        samples: vec![sample; workload.samples],
        teaches: true,
    }
}

fn lines(session: &mut Session, group: &str, times: &[Seconds], works: &Works) -> Vec<Line> {
    let rates = session.rates();
    let phase = |name: &str, seconds: Vec<f64>| {
        let work = match name {
            "rollout" => Some(&works.rollout),
            "train" => Some(&works.train),
            "update" => Some(&works.update),
            _ => None,
        };
        Line::times(group, name, Unit::Seconds, &seconds, work.map(|work| rates.need(work)))
    };
    let names = Seconds::default().phases().map(|(name, _)| name);
    let mut lines: Vec<Line> = names
        .iter()
        .enumerate()
        .map(|(index, name)| phase(name, times.iter().map(|t| t.phases()[index].1).collect()))
        .collect();
    let all = works.rollout.clone().then(&works.train).then(&works.update);
    let total: Vec<f64> = times.iter().map(|seconds| seconds.total).collect();
    lines.push(Line::times(group, "whole step", Unit::Seconds, &total, Some(rates.need(&all))));
    lines
}
