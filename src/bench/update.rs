//! `onpolicy bench update`: the weights change while samples stream.

use super::{
    cli::{Common, positive},
    report::{Line, Report, Unit, median},
    session::{Round, Session},
    stream::Stream,
    workload::Workload,
};
use anyhow::Context;
use clap::Args;
use onpolicy_engine::{
    model::loading::Checkpoint,
    torch::{autograd::set_grad, stream::synchronize},
};
use onpolicy_trainer::optimizer::{Optimizer, OptimizerSettings};
use std::time::{Duration, Instant};
use tch::{Device, Tensor};

/// Tokens that every sample gets before the update, and again after it.
const TOKENS: usize = 16;
/// Most tokens of a sample; the run is over before.
const MOST_TOKENS: usize = 512;
/// Small, so that many updates leave a model that works.
const LEARNING_RATE: f64 = 1e-6;

/// `onpolicy bench update`.
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Samples that stream while the weights change
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = positive)]
    samples: usize,
    /// Tokens of their prompt
    #[arg(long, value_name = "N", default_value_t = 41, value_parser = positive)]
    prompt_tokens: usize,
}

/// Runs the benchmark.
///
/// # Errors
/// A model or configuration that does not work, or an update that fails.
pub fn run(arguments: &Arguments) -> Result<(), anyhow::Error> {
    let report = measure(arguments)?;
    arguments.common.publish(&report)
}

fn measure(arguments: &Arguments) -> Result<Report, anyhow::Error> {
    let mut workload =
        Workload::custom([1, arguments.samples, arguments.prompt_tokens, MOST_TOKENS]);
    let mut loaded = Vec::new();
    let mut session = Session::start(&arguments.common, |checkpoint: &mut Checkpoint| {
        let room = checkpoint.config.max_position_embeddings.saturating_sub(workload.prompt_tokens);
        workload.new_tokens = room.min(MOST_TOKENS);
        workload.check(&checkpoint.config)?;
        loaded = checkpoint.tensors.iter().map(|(_, tensor)| tensor.data_ptr() as usize).collect();
        let kv = workload.kv_bytes(&checkpoint.config);
        Ok(vec![
            format!("engine.kv_memory_mb={}", (kv >> 20) + 1),
            format!("engine.max_num_seqs={}", workload.samples.max(256)),
            "engine.on_update=\"keep\"".to_string(),
        ])
    })?;
    let mut optimizer =
        Optimizer::new(&session.served.weights, OptimizerSettings::new(&session.config.train))?;
    let mut runs = Vec::new();
    for round in session.rounds() {
        let run;
        (optimizer, run) = one_run(&session, &workload, optimizer, round)?;
        if round.counts {
            runs.push(run);
        }
    }
    let elsewhere = |((_, tensor), served): ((&str, &Tensor), &usize)| {
        let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
        (tensor.data_ptr() as usize != *served).then_some(bytes)
    };
    let weights = session.served.weights.iter().zip(&loaded);
    let copied: Vec<usize> = weights.filter_map(elsewhere).collect();
    let group = format!("an AdamW step while {} samples stream", arguments.samples);
    let refreshed = session.engine.stats()?.copied_bytes;
    let beyond = copied.iter().sum::<usize>() + refreshed;
    let lines = lines(&mut session, &group, &runs, beyond);
    let note = format!(
        "The gap is the longest that a sample waited for a token while the update was applied; \
         allowed are the optimizer's step without load and one decode step.\n{} of the {} tensors \
         that the optimizer writes lie at the address of the served ones.",
        loaded.len() - copied.len(),
        loaded.len(),
    );
    let notes = vec![note];
    Ok(session.report("update", lines, notes))
}

/// Seconds of one run.
struct Run {
    alone: f64,
    written: f64,
    waited: f64,
    decode: f64,
    gap: f64,
}

impl Run {
    fn allowed(&self) -> f64 {
        self.alone + self.decode
    }
}

/// Updates once while nothing runs, and once under load.
fn one_run(
    session: &Session,
    workload: &Workload,
    optimizer: Optimizer,
    round: Round,
) -> Result<(Optimizer, Run), anyhow::Error> {
    let engine = &session.engine;
    let prompt = session.prompts(workload, round.seed)?.remove(0);
    let norm = gradients(session, round.seed)?;
    let (optimizer, alone) = apply(session, optimizer, norm)?;
    let norm = gradients(session, round.seed)?;
    let mut stream = Stream::start(engine, workload, &prompt, round.seed)?;
    stream.wait(TOKENS).context("before the update")?;
    let (optimizer, loaded) = apply(session, optimizer, norm)?;
    stream.wait(TOKENS).context("after the update")?;
    let tokens = stream.stop(engine);
    let run = Run {
        alone: alone.written(),
        written: loaded.written(),
        waited: loaded.waited.as_secs_f64(),
        decode: median(&tokens.gaps(|_, end| end < loaded.start)),
        gap: tokens.longest_gap(|start, end| start < loaded.end && end > loaded.start)?,
    };
    Ok((optimizer, run))
}

/// Gives every weight a random gradient; their norm.
fn gradients(session: &Session, seed: u64) -> Result<f64, anyhow::Error> {
    #[expect(clippy::disallowed_methods, reason = "draws on the device, with no thread beside")]
    tch::manual_seed((seed >> 1).cast_signed());
    let mut squares = 0.0;
    for (_, weight) in session.served.weights.iter() {
        let gradient: Tensor = weight.detach().to_kind(tch::Kind::Float).randn_like() * 1e-3;
        squares += gradient.norm().double_value(&[]).powi(2);
        set_grad(weight, &gradient)?;
    }
    Ok(squares.sqrt())
}

/// When an update was applied, and how long the caller waited for it.
struct Applied {
    start: Instant,
    end: Instant,
    waited: Duration,
}

impl Applied {
    /// Seconds that the optimizer took.
    fn written(&self) -> f64 {
        (self.end - self.start).as_secs_f64()
    }
}

fn apply(
    session: &Session,
    mut optimizer: Optimizer,
    norm: f64,
) -> Result<(Optimizer, Applied), anyhow::Error> {
    let (engine, device) = (&session.engine, session.served.placement().device);
    let asked = Instant::now();
    let ((optimizer, start, end), _) = engine.update(move || {
        let start = Instant::now();
        optimizer.step(LEARNING_RATE, norm).map_err(|error| error.to_string())?;
        if let Device::Cuda(index) = device {
            synchronize(index).map_err(|error| error.to_string())?;
        }
        Ok((optimizer, start, Instant::now()))
    })?;
    Ok((optimizer, Applied { start, end, waited: asked.elapsed() }))
}

fn lines(session: &mut Session, group: &str, runs: &[Run], copied: usize) -> Vec<Line> {
    let need = session.rates().need(&session.costs.optimizer());
    let column = |of: fn(&Run) -> f64| -> Vec<f64> { runs.iter().map(of).collect() };
    let time = |name: &str, of: fn(&Run) -> f64| {
        Line::times(group, name, Unit::Milliseconds, &column(of), None)
    };
    let alone = column(|run| run.alone);
    let gb = session.costs.served_weights() / 1e9;
    let per_gb = alone.iter().map(|seconds| 1e3 * seconds / gb).collect();
    vec![
        Line::times(group, "optimizer, no load", Unit::Milliseconds, &alone, Some(need)),
        Line::values(group, "the same, of served weights", "ms/GB", per_gb),
        time("optimizer, under load", |run| run.written),
        time("update, as its caller waits", |run| run.waited),
        time("decode step", |run| run.decode),
        time("longest gap during the update", |run| run.gap),
        time("allowed gap", Run::allowed),
        Line::values(group, "gap / allowed", "", column(|run| run.gap / run.allowed())),
        Line::values(group, "written beyond the optimizer's", "bytes", vec![copied as f64]),
    ]
}
