//! A whole training step from top to bottom: problems, rollouts, rewards, advantages, gate, loss,
//! update, metrics.

use crate::{
    batch::{MiniBatch, TrainBatch, TrainGroup, TrainSample},
    clock::Clock,
    config::{Config, Mode},
    correction::Correction,
    entropy::EntropyReport,
    error::TrainError,
    loss::{Activations, LossSettings, LossSums, accumulate_gradient_with, token_stats},
    metrics::{Seconds, Staleness, StepMetrics, memory},
    optimizer::Optimizer,
    own_stats,
    queue::{Drawn, RolloutQueue},
    reward::{Scored, score},
    rollout::{Rollout, RolloutSettings},
    schedule::learning_rate,
    served::Served,
    transfer::Transfer,
};
use onpolicy_engine::{
    engine::EngineHandle, in_place::update_in_place, model::decoder::Decoder, sampler::stream_of,
};
use onpolicy_plugin_api::{Engine, TaskSource, TokenGate, Verifier};
use std::{collections::VecDeque, sync::Arc, time::Instant};

/// Samples whose tokens are looked at again after the update, to measure the change of entropy.
const PROBE_SAMPLES: usize = 8;

/// What a step reports while it runs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Progress {
    /// A phase has begun.
    Phase(&'static str),
    /// A token was generated.
    Token,
    /// Rows of the forward and backward passes that are done, and all of them.
    Rows(usize, usize),
}

/// The parts of a run that judge and choose.
pub struct Parts {
    /// Where problems come from.
    pub task: Box<dyn TaskSource>,
    /// Judges completions.
    pub verifier: Box<dyn Verifier>,
    /// Chooses the tokens of the loss.
    pub gate: Box<dyn TokenGate>,
    /// Draws the samples, if the configuration names the engine of a plug-in.
    pub engine: Option<Arc<dyn Engine>>,
}

/// The trainer: weights and their optimizer, and an engine that serves them or copies of them.
pub struct Trainer {
    config: Config,
    parts: Parts,
    engine: Arc<dyn Engine>,
    native: Option<EngineHandle>,
    /// How the engine gets new weights, if it has its own.
    transfer: Option<Transfer>,
    queue: RolloutQueue,
    decoder: Decoder,
    optimizer: Option<Optimizer>,
    step: u64,
    /// Steps whose rollouts have been asked for.
    asked: u64,
    /// Seconds of waiting between two steps.
    settled: f64,
}

impl Trainer {
    /// A trainer at `step`, with the rollouts of the next steps that are drawn already.
    /// `optimizer` is over the weights of `served`.
    pub fn new(
        config: Config,
        parts: Parts,
        served: &Served,
        optimizer: Optimizer,
        (step, drawn): (u64, VecDeque<Drawn>),
    ) -> Self {
        let (engine, tokenizer) = (served.engine.clone(), served.tokenizer.clone());
        let queue = RolloutQueue::new(&config, engine.clone(), tokenizer, drawn);
        Self {
            config,
            parts,
            engine,
            native: served.native().cloned(),
            transfer: None,
            asked: step + queue.len() as u64,
            queue,
            decoder: served.decoder(),
            optimizer: Some(optimizer),
            step,
            settled: 0.0,
        }
    }

    /// Gives new weights to the engine by `transfer`: for one that has weights of its own.
    #[must_use]
    pub fn with_transfer(self, transfer: Option<Transfer>) -> Self {
        Self { transfer, ..self }
    }

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// The parts that judge and choose.
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// The optimizer, for a checkpoint.
    ///
    /// # Errors
    /// It is gone after an update that failed; the run cannot go on then.
    pub fn optimizer(&self) -> Result<&Optimizer, TrainError> {
        self.optimizer.as_ref().ok_or_else(lost)
    }

    /// Waits for the rollouts that are under way; the time counts as the next step's waiting.
    /// Returns how many seconds that took.
    ///
    /// # Errors
    /// As rollouts have.
    pub fn settle(&mut self) -> Result<f64, TrainError> {
        let started = Instant::now();
        self.queue.settle(&mut || {})?;
        let seconds = started.elapsed().as_secs_f64();
        self.settled += seconds;
        Ok(seconds)
    }

    /// Rollouts of the next steps that are drawn already, for a checkpoint.
    pub fn drawn(&self) -> &VecDeque<Drawn> {
        self.queue.drawn()
    }

    /// Takes one step.
    ///
    /// # Errors
    /// Whatever went wrong; the weights are those before or after the update, never between.
    pub fn step(&mut self, progress: &mut dyn FnMut(Progress)) -> Result<StepMetrics, TrainError> {
        let mut clock = Clock::start(std::mem::take(&mut self.settled));

        progress(Progress::Phase("rollout"));
        let Drawn { rollouts, seconds: rollout } =
            self.generate(&mut || progress(Progress::Token))?;
        let rollout_wait = clock.lap();

        progress(Progress::Phase("reward"));
        let (groups, failed) = score(self.parts.verifier.as_ref(), rollouts);
        let reward = clock.lap();

        progress(Progress::Phase("train"));
        let version = self.engine.weight_version();
        let batch = TrainBatch::new(self.train_groups(&groups), self.parts.gate.as_ref());
        let update = self.learn(&batch, progress)?;
        let train = clock.lap() - update.seconds;

        progress(Progress::Phase("probe"));
        let measured = self.measured_entropy_change(&batch, update.updates > 0);
        let probe = clock.lap();

        self.step += 1;
        let (update_seconds, total) = (update.seconds, clock.total());
        let seconds =
            Seconds { rollout, rollout_wait, reward, train, update: update_seconds, probe, total };
        let report =
            Report { groups: &groups, failed, batch: &batch, update: &update, measured, version };
        Ok(self.metrics(&report, seconds))
    }

    /// Rollouts of this step; starts those of the steps that the mode draws ahead.
    fn generate(&mut self, progress: &mut dyn FnMut()) -> Result<Drawn, TrainError> {
        let (mode, next) = (self.config.train.mode, self.step + 1);
        let steps = self.config.train.steps.max(next);
        if mode == Mode::Batch {
            self.draw_until(steps, progress)?;
            self.queue.settle(progress)?;
        }
        self.draw_until(next, progress)?;
        let drawn = self.queue.pop(progress)?;
        if mode == Mode::Overlapped {
            self.draw_until(steps.min(next + 1), progress)?;
        }
        Ok(drawn)
    }

    /// Asks for the rollouts of all steps up to number `end` that have not been asked for.
    fn draw_until(&mut self, end: u64, progress: &mut dyn FnMut()) -> Result<(), TrainError> {
        let count = self.config.rollout.prompts_per_step as u64;
        for step in self.asked..end {
            let problems = (step * count..(step + 1) * count).map(|i| self.parts.task.train(i));
            let seed = stream_of(self.config.train.seed, step as usize);
            let settings = RolloutSettings::new(&self.config, seed);
            self.queue.push(problems.collect(), &settings, progress)?;
            self.asked += 1;
        }
        Ok(())
    }

    /// Adds up gradients and updates the weights, once for each mini-batch.
    fn learn(
        &mut self,
        batch: &TrainBatch,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Update, TrainError> {
        let train = &self.config.train;
        let mut mini_batches =
            batch.mini_batches(train.updates_per_batch, train.micro_batch_tokens);
        let packs = mini_batches.iter().flat_map(|mini_batch| &mini_batch.micro_batches);
        let rows = packs.map(|micro| micro.pack.len()).sum();
        let mut update = Update { lr: learning_rate(train, self.step), ..Update::default() };
        let activations = match train.activation_checkpointing {
            true => Activations::Recomputed,
            false => Activations::Kept,
        };
        let mut done = 0;
        self.note_own_logprobs(&mut mini_batches);
        for mini_batch in &mini_batches {
            let settings = LossSettings::new(&self.config, mini_batch.kept, update.updates == 0);
            for micro in &mini_batch.micro_batches {
                let decoder = &self.decoder;
                let sums = accumulate_gradient_with(decoder, micro, &settings, activations)?;
                update.sums.add(&sums);
                done += micro.pack.len();
                progress(Progress::Rows(done, rows));
            }
            update.kept += mini_batch.kept;
            progress(Progress::Phase("update"));
            self.update(&mut update)?;
        }
        Ok(update)
    }

    /// All groups with their advantages, and statistics of all tokens.
    fn train_groups(&self, groups: &[Scored]) -> Vec<TrainGroup> {
        let group = |scored: &Scored| {
            let advantages = self.config.train.advantage.of(&scored.rewards);
            let samples = scored.rollout.samples.iter().zip(advantages);
            let samples = samples.filter(|(sample, _)| !sample.tokens.is_empty());
            TrainGroup {
                prompt: scored.rollout.prompt.clone(),
                samples: samples.map(|(s, advantage)| TrainSample::new(s, advantage)).collect(),
                teaches: scored.is_mixed(),
            }
        };
        let mut groups: Vec<TrainGroup> = groups.iter().map(group).collect();
        let (rows, rollout) = (self.config.train.micro_batch_tokens, &self.config.rollout);
        own_stats::complete(&self.decoder, &mut groups, rows, rollout.temperature as f32);
        groups
    }

    /// Where importance is corrected for, the mini-batches after the first need the trainer's
    /// log-probs under the weights as they are now.
    fn note_own_logprobs(&self, mini_batches: &mut [MiniBatch]) {
        if self.config.train.correction == Correction::None {
            return;
        }
        let temperature = self.config.rollout.temperature as f32;
        for micro in mini_batches.iter_mut().skip(1).flat_map(|batch| &mut batch.micro_batches) {
            let stats = token_stats(&self.decoder, micro, temperature);
            micro.own_logprob = stats.iter().map(|stats| stats.logprob).collect();
        }
    }

    /// Lets the optimizer write the weights: the served ones between two steps of the engine, or
    /// the trainer's own, which the engine is given then.
    fn update(&mut self, update: &mut Update) -> Result<(), TrainError> {
        let started = Instant::now();
        let mut optimizer = self.optimizer.take().ok_or_else(lost)?;
        let norm = optimizer.grad_norm()?;
        let lr = update.lr;
        self.optimizer = Some(match &mut self.transfer {
            Some(transfer) => {
                optimizer.step(lr, norm)?;
                transfer.deliver(self.engine.weight_version() + 1)?;
                optimizer
            }
            None => {
                let write = move || {
                    optimizer.step(lr, norm).map_err(|error| error.to_string())?;
                    Ok(optimizer)
                };
                update_in_place(&*self.engine, write)?.0
            }
        });
        update.grad_norm = update.grad_norm.max(norm);
        update.updates += 1;
        update.seconds += started.elapsed().as_secs_f64();
        Ok(())
    }

    /// Mean entropy over the probe's tokens under the new weights, minus that when they were drawn.
    fn measured_entropy_change(&self, batch: &TrainBatch, updated: bool) -> Option<f64> {
        if !updated {
            return None;
        }
        let probe = batch.probe(PROBE_SAMPLES);
        let stats = token_stats(&self.decoder, &probe, self.config.rollout.temperature as f32);
        let change = stats.iter().zip(&probe.old_entropy);
        let sum: f64 = change.map(|(new, old)| f64::from(new.entropy) - f64::from(*old)).sum();
        (!stats.is_empty()).then(|| sum / stats.len() as f64)
    }

    fn refresh_seconds(&self) -> f64 {
        let Some(native) = &self.native else { return 0.0 };
        native.stats().map_or(f64::NAN, |stats| stats.refresh.as_secs_f64())
    }

    fn metrics(&self, report: &Report<'_>, seconds: Seconds) -> StepMetrics {
        let rollouts: Vec<&Rollout> = report.groups.iter().map(|group| &group.rollout).collect();
        let rewards: Vec<f64> = report
            .groups
            .iter()
            .flat_map(|group| group.rewards.iter().map(|&reward| f64::from(reward)))
            .collect();
        let tokens: usize = rollouts.iter().map(|rollout| rollout.new_tokens()).sum();
        let gate =
            EntropyReport::new(&report.batch.tokens(), report.batch.keep(), None, report.update.lr);
        let update = report.update;
        let staleness = Staleness::of(&rollouts, report.version);
        let samples: usize = rollouts.iter().map(|rollout| rollout.samples.len()).sum();
        let truncated = rollouts
            .iter()
            .map(|rollout| (0..rollout.samples.len()).filter(|&i| rollout.truncated(i)).count())
            .sum::<usize>();
        let over_samples = |count: usize| count as f64 / samples.max(1) as f64;
        let over_kept = |sum: f64| sum / update.kept.max(1) as f64;
        let over_tokens = |sum: f64| sum / update.sums.tokens.max(1) as f64;
        StepMetrics {
            step: self.step,
            weight_version: self.engine.weight_version(),
            reward_mean: mean(&rewards),
            reward_std: std(&rewards),
            groups: rollouts.len() + report.failed,
            groups_mixed: report.groups.iter().filter(|group| group.is_mixed()).count(),
            groups_failed: report.failed,
            samples,
            prompt_tokens: rollouts.iter().map(|rollout| rollout.prompt.len()).sum(),
            completion_tokens: tokens,
            completion_len_mean: over_samples(tokens),
            staleness_mean: staleness.mean,
            staleness_max: staleness.max,
            truncated_fraction: over_samples(truncated),
            entropy: gate.entropy,
            entropy_predicted: gate.predicted_change,
            entropy_measured: report.measured,
            score_mean: gate.score_mean,
            score_std: gate.score_std,
            score_gap_mean: gate.gap_mean,
            dropped_fraction: gate.dropped,
            dropped_positive: gate.dropped_positive,
            dropped_negative: gate.dropped_negative,
            loss: -over_kept(update.sums.objective),
            clip_fraction: over_kept(update.sums.clipped as f64),
            grad_norm: update.grad_norm,
            lr: update.lr,
            ratio_mean: over_tokens(update.sums.ratio),
            ratio_max_deviation: update.sums.ratio_deviation,
            approx_kl: over_tokens(update.sums.kl),
            mismatch_mean: update.sums.mismatch.mean(),
            mismatch_max: update.sums.mismatch.largest(),
            mismatch_far: update.sums.mismatch.far(),
            refresh_seconds: self.refresh_seconds(),
            seconds,
            tokens_per_second: tokens as f64 / seconds.rollout.max(1e-9),
            peak_memory_mb: memory::peak_mb().unwrap_or(f64::NAN),
            elapsed_seconds: 0.0,
        }
    }
}

fn lost() -> TrainError {
    TrainError::Refused(
        "an update failed and the optimizer's state is lost; resume from the last checkpoint"
            .into(),
    )
}

/// What the updates of one step came to.
#[derive(Default)]
struct Update {
    lr: f64,
    sums: LossSums,
    /// Tokens that stayed in the loss, over all updates.
    kept: usize,
    grad_norm: f64,
    updates: usize,
    /// Of the updates alone.
    seconds: f64,
}

/// What a step's metrics are made from.
struct Report<'a> {
    groups: &'a [Scored],
    failed: usize,
    batch: &'a TrainBatch,
    update: &'a Update,
    measured: Option<f64>,
    /// Version of the weights before the updates.
    version: u64,
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Population standard deviation.
fn std(values: &[f64]) -> f64 {
    let mean = mean(values);
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len().max(1) as f64).sqrt()
}
