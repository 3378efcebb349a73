//! `onpolicy bench loop`: online rollouts against batch training. The same model, problems, seed
//! and number of samples in the three modes of `train.mode`, in turn.

use super::{
    cli::{Common, positive},
    report::{Line, Report},
    session::{Round, Session, peak_memory},
};
use anyhow::Context;
use clap::Args;
use onpolicy_trainer::{
    config::{Config, Mode},
    eval::{EvalSettings, evaluate},
    metrics::{StepMetrics, Summary},
    optimizer::{Optimizer, OptimizerSettings},
    plot::{self, LearningCurve, Standing},
    run::parts,
    train::Trainer,
};
use serde::Serialize;
use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    time::Instant,
};
use tch::Tensor;

const MODES: [Mode; 3] = [Mode::Online, Mode::Overlapped, Mode::Batch];

/// `onpolicy bench loop`.
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Training steps of each run; a run that warms up has one
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = positive)]
    steps: usize,
    /// Evaluate on held-out problems after every so many steps, while the clock stands still
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = positive)]
    eval_every: usize,
    /// Folder for loop.json, steps.json (every step of every run), loop.svg and loop.png
    #[arg(short, long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Runs the benchmark.
///
/// # Errors
/// A model or configuration that does not work, or a file that cannot be written.
pub fn run(arguments: &Arguments) -> Result<(), anyhow::Error> {
    let (report, runs) = measure(arguments)?;
    arguments.common.publish(&report)?;
    if let Some(folder) = &arguments.out {
        report.write(&folder.join("loop.json"))?;
        write_steps(&runs, &folder.join("steps.json"))?;
        for picture in ["loop.svg", "loop.png"] {
            plot::learning(&curves(&runs), &folder.join(picture))?;
        }
    }
    Ok(())
}

/// One run in one mode.
#[derive(Debug, Serialize)]
struct Run {
    mode: Mode,
    seed: u64,
    steps: Vec<StepMetrics>,
    /// Where it stood at its beginning, when the first samples were there, and at each evaluation.
    standings: Vec<Standing>,
}

fn measure(arguments: &Arguments) -> Result<(Report, Vec<Run>), anyhow::Error> {
    let steps = format!("train.steps={}", arguments.steps);
    let mut session = Session::start(&arguments.common, |_| Ok(vec![steps]))?;
    let start = Start::of(&session);
    let mut runs = Vec::new();
    for round in session.rounds() {
        for mode in MODES {
            eprintln!("  {mode} ...");
            start.restore(&session)?;
            let run = train(arguments, &session, mode, round)?;
            runs.extend(round.counts.then_some(run));
        }
    }
    let memory = peak_memory("memory");
    session.rates();
    let lines = lines(&runs).into_iter().chain(memory).collect();
    let note = format!(
        "each run: {} steps of {} prompts x {} samples; evaluations are not counted as time",
        arguments.steps, session.config.rollout.prompts_per_step, session.config.rollout.group_size,
    );
    Ok((session.report("loop", lines, vec![note]), runs))
}

/// The weights that every run starts from.
struct Start(Vec<Tensor>);

impl Start {
    fn of(session: &Session) -> Self {
        Self(session.served.weights.iter().map(|(_, weight)| weight.detach().copy()).collect())
    }

    /// Writes them where they are served. The version goes up, so that no KV of other weights is
    /// found again.
    fn restore(&self, session: &Session) -> Result<(), anyhow::Error> {
        let served = session.served.weights.iter().map(|(_, weight)| weight.detach());
        let pairs: Vec<_> = served.zip(self.0.iter().map(Tensor::shallow_clone)).collect();
        session.engine.update(move || {
            pairs.into_iter().for_each(|(mut served, start)| served.copy_(&start));
            Ok(())
        })?;
        Ok(())
    }
}

/// Trains from the start in one mode.
fn train(
    arguments: &Arguments,
    session: &Session,
    mode: Mode,
    round: Round,
) -> Result<Run, anyhow::Error> {
    let (served, mut config) = (&session.served, session.config.clone());
    config.train.mode = mode;
    // The configuration has room for 63 bits.
    config.train.seed = round.seed >> 1;
    config.train.steps = if round.counts { arguments.steps as u64 } else { 1 };
    let optimizer = Optimizer::new(&served.weights, OptimizerSettings::new(&config.train))?;
    let parts = parts(&config, |plugins| plugins)?;
    let trainer = Trainer::new(config.clone(), parts, served, optimizer, (0, VecDeque::new()));
    let mut runner = Runner { session, config, trainer, seconds: 0.0, samples: 0 };
    let seed = runner.config.train.seed;
    let mut run = Run { mode, seed, steps: vec![], standings: vec![] };
    run.standings.push(runner.evaluate()?);
    while runner.trainer.steps_done() < runner.config.train.steps {
        let step = runner.step()?;
        if run.steps.is_empty() {
            // Until then the weights were those of the beginning.
            run.standings.push(Standing { seconds: step.seconds.rollout_wait, ..run.standings[0] });
        }
        run.steps.push(step);
        let done = runner.trainer.steps_done();
        if done.is_multiple_of(arguments.eval_every as u64) || done == runner.config.train.steps {
            run.standings.push(runner.evaluate()?);
        }
    }
    Ok(run)
}

/// A run under way.
struct Runner<'a> {
    session: &'a Session,
    config: Config,
    trainer: Trainer,
    /// Of training; evaluations are left out.
    seconds: f64,
    /// Trained on so far.
    samples: usize,
}

impl Runner<'_> {
    fn step(&mut self) -> Result<StepMetrics, anyhow::Error> {
        let started = Instant::now();
        let mut step = self.trainer.step(&mut |_| {})?;
        self.seconds += started.elapsed().as_secs_f64();
        self.samples += step.samples;
        step.elapsed_seconds = self.seconds;
        Ok(step)
    }

    /// Waits for rollouts that are under way, which counts as time, and evaluates, which does not.
    fn evaluate(&mut self) -> Result<Standing, anyhow::Error> {
        self.seconds += self.trainer.settle()?;
        let (served, parts) = (&self.session.served, self.trainer.parts());
        let judges = (parts.task.as_ref(), parts.verifier.as_ref());
        let settings = EvalSettings::new(&self.config);
        let report = evaluate(&*served.engine, &served.tokenizer, judges, &settings)?;
        let (seconds, samples) = (self.seconds, self.samples as f64);
        Ok(Standing { seconds, samples, reward: report.average })
    }
}

/// What is shown of a run: group, unit, and how to get it.
type Shown = (&'static str, &'static str, fn(&Run) -> f64);

const SHOWN: [Shown; 15] = [
    ("wall time", "s", seconds),
    ("samples", "samples/s", |run| run.summary().samples as f64 / seconds(run)),
    ("tokens generated", "tokens/s", |run| run.summary().completion_tokens as f64 / seconds(run)),
    ("time: drawing samples (the engine)", "s", |run| run.summary().seconds.rollout),
    ("time: waiting for samples", "s", |run| run.summary().seconds.rollout_wait),
    ("time: forward and backward", "s", |run| run.summary().seconds.train),
    ("time: update", "s", |run| run.summary().seconds.update),
    ("time: measuring the change of entropy", "s", |run| run.summary().seconds.probe),
    ("time: rewards and the rest", "s", |run| {
        run.summary().seconds.reward + run.summary().seconds.other()
    }),
    ("staleness, mean", "versions", |run| run.summary().staleness_mean),
    ("staleness, largest", "versions", |run| run.summary().staleness_max as f64),
    ("reward of the samples, first steps", "reward", |run| run.summary().reward_first),
    ("reward of the samples, last steps", "reward", |run| run.summary().reward_last),
    ("reward on held-out problems, before", "reward", |run| reward(run.standings.first())),
    ("reward on held-out problems, after", "reward", |run| reward(run.standings.last())),
];

impl Run {
    fn summary(&self) -> Summary {
        Summary::from(&self.steps[..])
    }
}

fn seconds(run: &Run) -> f64 {
    run.summary().seconds.total
}

fn reward(standing: Option<&Standing>) -> f64 {
    standing.map_or(f64::NAN, |standing| standing.reward)
}

fn lines(runs: &[Run]) -> Vec<Line> {
    let line = |(group, unit, of): &Shown, mode: Mode| {
        let values = runs.iter().filter(|run| run.mode == mode).map(of).collect();
        Line::values(group, &mode.to_string(), unit, values)
    };
    SHOWN.iter().flat_map(|shown| MODES.map(|mode| line(shown, mode))).collect()
}

/// One curve for each mode: where its runs stood on average.
fn curves(runs: &[Run]) -> Vec<LearningCurve> {
    let curve = |mode: Mode| {
        let runs: Vec<&Run> = runs.iter().filter(|run| run.mode == mode).collect();
        let points = runs.first().map_or(0, |run| run.standings.len());
        let mean = |point: usize, of: fn(&Standing) -> f64| {
            runs.iter().map(|run| of(&run.standings[point])).sum::<f64>() / runs.len() as f64
        };
        let standing = |point| Standing {
            seconds: mean(point, |at| at.seconds),
            samples: mean(point, |at| at.samples),
            reward: mean(point, |at| at.reward),
        };
        (mode.to_string(), (0..points).map(standing).collect())
    };
    MODES.map(curve).into()
}

fn write_steps(runs: &[Run], path: &Path) -> Result<(), anyhow::Error> {
    let text = serde_json::to_string(runs)? + "\n";
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments() -> Arguments {
        let set = ["engine.kv_memory_mb=16", "eval.problems=8", "train.lr=1e-2", "gate.name=none"];
        let common = Common {
            model: concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/tiny/llama-tied").into(),
            device: None,
            dtype: None,
            random: None,
            seed: 1,
            warmup: 1,
            runs: 1,
            threads: None,
            json: None,
            plot: None,
            set: set.map(String::from).into(),
        };
        Arguments { common, steps: 5, eval_every: 2, out: None }
    }

    #[test]
    fn every_mode_starts_from_the_same_weights_and_is_measured_alike() {
        let (report, runs) = measure(&arguments()).expect("it runs");
        assert_eq!(runs.iter().map(|run| run.mode).collect::<Vec<_>>(), MODES);
        for run in &runs {
            assert!(run.steps[4].weight_version > run.steps[0].weight_version, "{}", run.mode);
            let first = |run: &Run| (run.steps[0].completion_tokens, run.steps[0].entropy);
            assert_eq!(first(run), first(&runs[0]), "{}", run.mode);
            let standings = &run.standings;
            let samples: Vec<f64> = standings.iter().map(|at| at.samples).collect();
            assert_eq!(samples, [0.0, 0.0, 128.0, 256.0, 320.0], "{}", run.mode);
            assert!(standings.is_sorted_by_key(|at| at.seconds) && standings[0].seconds < 1e-3);
            assert_eq!(standings[0].reward, runs[0].standings[0].reward);
            // The clock holds the steps, and waiting for rollouts between them.
            let last = run.steps[4].elapsed_seconds;
            assert!(last >= seconds(run), "{last} and {}", seconds(run));
            assert!(standings[4].seconds >= last && standings[3].seconds <= last);
        }
        let median = |group: &str, mode: &str| {
            let line = report.lines.iter().find(|line| line.group == group && line.name == mode);
            line.unwrap_or_else(|| panic!("{group} of {mode}")).median
        };
        let stale = MODES.map(|mode| median("staleness, largest", &mode.to_string()));
        assert!(stale[0] == 0.0 && stale[1] <= 1.0 && stale[2] >= 1.0, "{stale:?}");
        assert_eq!(report.lines.iter().filter(|line| line.name == "batch").count(), SHOWN.len());
        let curves = curves(&runs);
        assert_eq!(curves[2], ("batch".to_string(), runs[2].standings.clone()));
    }
}
