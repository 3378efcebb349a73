//! `onpolicy bench train`: forward and backward pass of one batch, without rollouts.

use super::{
    arithmetic::{Costs, Pass},
    cli::{Common, positive},
    report::{Line, Report, Unit},
    roofline::{Need, Rates, Work},
    session::{Session, peak_memory},
};
use clap::Args;
use onpolicy_engine::{model::decoder::Decoder, sampler::stream_of};
use onpolicy_plugin_api::TokenStats;
use onpolicy_trainer::{
    advantage::Advantage,
    batch::{MicroBatch, TrainBatch, TrainGroup, TrainSample},
    entropy::KeepAll,
    loss::{LossSettings, accumulate_gradient, token_stats},
};
use std::time::Instant;
use tch::Tensor;

/// `onpolicy bench train`.
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Groups of the batch
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = positive)]
    prompts: usize,
    /// Samples of each group
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = positive)]
    samples: usize,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 41, value_parser = positive)]
    prompt_tokens: usize,
    /// Tokens of each sample
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = positive)]
    new_tokens: usize,
    /// Also measure the same samples with a prompt for each of them, as a padded batch has it; the
    /// peak of memory is then that of both
    #[arg(long)]
    no_sharing: bool,
}

/// Runs the benchmark.
///
/// # Errors
/// A model or configuration that does not work.
pub fn run(arguments: &Arguments) -> Result<(), anyhow::Error> {
    let report = measure(arguments)?;
    arguments.common.publish(&report)
}

fn measure(arguments: &Arguments) -> Result<Report, anyhow::Error> {
    let mut session = Session::start(&arguments.common, |_| Ok(Vec::new()))?;
    let decoder = session.served.decoder();
    let vocab = session.served.weights.get("model.embed_tokens.weight").map_or(2, |t| t.size()[0]);
    let groups = groups(arguments, vocab as u64);
    let mut contestants = vec![Contestant::new("shared prompts", groups, &decoder, &session)];
    if arguments.no_sharing {
        let groups = unshared(&contestants[0].groups);
        contestants.push(Contestant::new("a prompt for each sample", groups, &decoder, &session));
    }
    for round in session.rounds() {
        for contestant in &mut contestants {
            let seconds = contestant.pass(&decoder)?;
            zero_gradients(&session);
            if round.counts {
                contestant.seconds.push(seconds);
            }
        }
    }
    let group = format!(
        "forward and backward of {} x {} samples, {} prompt + {} new tokens",
        arguments.prompts, arguments.samples, arguments.prompt_tokens, arguments.new_tokens
    );
    let memory = peak_memory(&group);
    let rates = session.rates();
    let of = |contestant: &Contestant| contestant.lines(&group, &session.costs, &rates);
    let lines = contestants.iter().flat_map(of).chain(memory).collect();
    Ok(session.report("train", lines, Vec::new()))
}

/// One way to lay out the batch.
struct Contestant {
    name: &'static str,
    groups: Vec<TrainGroup>,
    packs: Vec<MicroBatch>,
    settings: LossSettings,
    seconds: Vec<f64>,
}

impl Contestant {
    /// Packs the groups. What the engine would have reported of their tokens is computed first, so
    /// that every importance ratio is 1, as on-policy.
    fn new(
        name: &'static str,
        mut groups: Vec<TrainGroup>,
        decoder: &Decoder,
        session: &Session,
    ) -> Self {
        let (config, device) = (&session.config, session.served.placement().device);
        let rows = config.train.pass_tokens(device);
        let temperature = config.rollout.temperature as f32;
        let packs = packs(&groups, rows);
        let stats = packs.iter().flat_map(|micro| token_stats(decoder, micro, temperature));
        fill_in(&mut groups, &stats.collect::<Vec<_>>());
        let packs = self::packs(&groups, rows);
        let kept = packs.iter().map(|micro| micro.targets.len()).sum();
        let settings = LossSettings::new(config, kept, true);
        Self { name, groups, packs, settings, seconds: Vec::new() }
    }

    /// Seconds of a forward and backward pass over the batch.
    fn pass(&self, decoder: &Decoder) -> Result<f64, anyhow::Error> {
        let started = Instant::now();
        for micro in &self.packs {
            accumulate_gradient(decoder, micro, &self.settings)?;
        }
        Ok(started.elapsed().as_secs_f64())
    }

    fn lines(&self, group: &str, costs: &Costs, rates: &Rates) -> Vec<Line> {
        let work = costs.training(&self.passes());
        let need = rates.need(&work);
        let rows: usize = self.packs.iter().map(|micro| micro.pack.len()).sum();
        let line = |unit: Unit, need: Option<Need>| {
            Line::times(group, self.name, unit, &self.seconds, need)
        };
        vec![
            line(Unit::Seconds, Some(need)),
            line(Unit::PerSecond(rows as f64, "rows"), None),
            line(Unit::PerSecond(work.flop() / 1e9, "GFLOP"), None),
        ]
    }

    fn passes(&self) -> Vec<Pass> {
        self.packs.iter().map(pass_of).collect()
    }
}

/// What a pack costs.
fn pass_of(micro: &MicroBatch) -> Pass {
    let positions = Vec::<i64>::try_from(micro.pack.positions()).expect("positions are a vector");
    Pass {
        positions: positions.into_iter().map(|position| position as usize).collect(),
        targets: micro.targets.len(),
    }
}

/// What the trainer's forward and backward passes over these groups cost, `rows` at most each.
pub fn work(costs: &Costs, groups: &[TrainGroup], rows: usize) -> Work {
    let packs = packs(groups, rows);
    costs.training(&packs.iter().map(pass_of).collect::<Vec<_>>())
}

fn packs(groups: &[TrainGroup], rows: usize) -> Vec<MicroBatch> {
    let batch = TrainBatch::new(groups.to_vec(), &KeepAll {});
    batch.mini_batches(1, rows).into_iter().flat_map(|mini| mini.micro_batches).collect()
}

/// Groups of random tokens; every second sample of a group is rewarded.
fn groups(arguments: &Arguments, vocab: u64) -> Vec<TrainGroup> {
    let tokens = |stream: usize, count: usize| -> Vec<u32> {
        let seed = stream_of(arguments.common.seed, stream);
        (0..count).map(|index| (stream_of(seed, index) % vocab) as u32).collect()
    };
    let rewards: Vec<f32> = (0..arguments.samples).map(|index| (index % 2) as f32).collect();
    let advantages = Advantage::Grpo.of(&rewards);
    let group = |number: usize| {
        let first = number * (arguments.samples + 1);
        let sample = |(index, &advantage): (usize, &f32)| TrainSample {
            tokens: tokens(first + 1 + index, arguments.new_tokens),
            advantage,
            ..TrainSample::default()
        };
        let mut group = TrainGroup {
            prompt: tokens(first, arguments.prompt_tokens),
            samples: advantages.iter().enumerate().map(sample).collect(),
            teaches: true,
        };
        let blank = vec![TokenStats::default(); arguments.samples * arguments.new_tokens];
        fill_in(std::slice::from_mut(&mut group), &blank);
        group
    };
    (0..arguments.prompts).map(group).collect()
}

/// Each sample as a group of its own.
fn unshared(groups: &[TrainGroup]) -> Vec<TrainGroup> {
    let of = |group: &TrainGroup| {
        let (prompt, samples) = (group.prompt.clone(), group.samples.clone());
        samples.into_iter().map(move |sample| TrainGroup {
            prompt: prompt.clone(),
            samples: vec![sample],
            teaches: true,
        })
    };
    groups.iter().flat_map(of).collect()
}

/// Writes the statistics of all tokens, in the batch's order, into the samples.
fn fill_in(groups: &mut [TrainGroup], stats: &[TokenStats]) {
    let mut stats = stats.iter();
    for sample in groups.iter_mut().flat_map(|group| &mut group.samples) {
        let of_sample: Vec<&TokenStats> = stats.by_ref().take(sample.tokens.len()).collect();
        let column = |f: fn(&TokenStats) -> f32| of_sample.iter().map(|stats| f(stats)).collect();
        sample.logprob = column(|stats| stats.logprob);
        sample.entropy = column(|stats| stats.entropy);
        sample.baseline = column(|stats| stats.baseline);
    }
}

fn zero_gradients(session: &Session) {
    for (_, weight) in session.served.weights.iter() {
        Tensor::zero_grad(&mut weight.shallow_clone());
    }
}
