//! A whole training step from top to bottom: problems, rollouts, rewards, advantages, gate, loss,
//! update, metrics.

mod report;

use crate::{
    batch::{MiniBatch, TrainBatch, TrainGroup, TrainSample},
    clock::Clock,
    config::{Config, Mode},
    correction::Correction,
    error::TrainError,
    loss::{Activations, LossSettings, LossSums, accumulate_gradient_with, token_stats},
    metrics::{Seconds, StepMetrics},
    optimizer::Optimizer,
    own_stats,
    queue::{Drawn, RolloutQueue},
    reward::{Scored, score},
    rollout::RolloutSettings,
    room::Room,
    schedule::learning_rate,
    served::Served,
    transfer::Transfer,
};
use onpolicy_engine::{
    engine::EngineHandle, in_place::update_in_place, model::decoder::Decoder, sampler::stream_of,
};
use onpolicy_plugin_api::{Engine, TaskSource, TokenGate, TokenStats, Verifier};
use report::Report;
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
    /// How much goes through the decoder at a time.
    room: Room,
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
        let room = Room::new(config.train.pass_tokens(served.placement().device));
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
            room,
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
        let groups_of_it = self.train_groups(&groups)?;
        let mut batch = TrainBatch::new(groups_of_it, self.parts.gate.as_ref());
        let update = self.learn(&mut batch, progress)?;
        let train = clock.lap() - update.seconds;

        progress(Progress::Phase("probe"));
        let measured = self.measured_entropy_change(&batch, update.updates > 0)?;
        let probe = clock.lap();

        self.step += 1;
        let (update_seconds, total) = (update.seconds, clock.total());
        let seconds =
            Seconds { rollout, rollout_wait, reward, train, update: update_seconds, probe, total };
        let retries = self.room.take_failures();
        let (groups, batch, update) = (&groups[..], &batch, &update);
        let report = Report { groups, failed, batch, update, measured, version, retries };
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
        batch: &mut TrainBatch,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Update, TrainError> {
        let mut update =
            Update { lr: learning_rate(&self.config.train, self.step), ..Update::default() };
        self.note_own_logprobs(batch)?;
        let parts = batch.mini_batches(self.config.train.updates_per_batch, self.room.rows()).len();
        for part in 0..parts {
            self.accumulate((batch, part), &mut update, progress)?;
            progress(Progress::Phase("update"));
            self.update(&mut update)?;
        }
        Ok(update)
    }

    /// Adds up the gradient of one mini-batch, from its beginning where memory did not suffice.
    fn accumulate(
        &mut self,
        (batch, part): (&TrainBatch, usize),
        update: &mut Update,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), TrainError> {
        let (config, decoder, parts) =
            (&self.config, &self.decoder, self.config.train.updates_per_batch);
        let optimizer = self.optimizer.as_mut().ok_or_else(lost)?;
        let activations = match config.train.activation_checkpointing {
            true => Activations::Recomputed,
            false => Activations::Kept,
        };
        let mut begun = false;
        let (sums, kept) = self.room.run(batch.span(), |rows| {
            if std::mem::replace(&mut begun, true) {
                optimizer.zero_grad();
            }
            let mini_batches = batch.mini_batches(parts, rows);
            let all = mini_batches.iter().map(rows_of).sum();
            let mut done = mini_batches[..part].iter().map(rows_of).sum();
            let MiniBatch { micro_batches, kept } = &mini_batches[part];
            let settings = LossSettings::new(config, *kept, update.updates == 0);
            let mut sums = update.sums;
            for micro in micro_batches {
                sums.add(&accumulate_gradient_with(decoder, micro, &settings, activations)?);
                done += micro.pack.len();
                progress(Progress::Rows(done, all));
            }
            Ok((sums, *kept))
        })?;
        update.sums = sums;
        update.kept += kept;
        Ok(())
    }

    /// All groups with their advantages, and statistics of all tokens.
    fn train_groups(&mut self, groups: &[Scored]) -> Result<Vec<TrainGroup>, TrainError> {
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
        let temperature = self.config.rollout.temperature as f32;
        own_stats::complete(&self.decoder, &mut groups, &mut self.room, temperature)?;
        Ok(groups)
    }

    /// Where importance is corrected for, the mini-batches after the first need the trainer's
    /// log-probs under the weights as they are now.
    fn note_own_logprobs(&mut self, batch: &mut TrainBatch) -> Result<(), TrainError> {
        if self.config.train.correction == Correction::None {
            return Ok(());
        }
        let temperature = self.config.rollout.temperature as f32;
        let (decoder, parts) = (&self.decoder, self.config.train.updates_per_batch);
        let (stats, packs) = self.room.run(batch.span(), |rows| {
            let later = batch.mini_batches(parts, rows).into_iter().skip(1);
            let packs: Vec<_> = later.flat_map(|mini_batch| mini_batch.micro_batches).collect();
            let stats = packs.iter().map(|micro| token_stats(decoder, micro, temperature));
            Ok((stats.collect::<Vec<_>>(), packs))
        })?;
        for (micro, stats) in packs.iter().zip(stats) {
            batch.note_own_logprobs(micro, stats.iter().map(|stats| stats.logprob));
        }
        Ok(())
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
    fn measured_entropy_change(
        &mut self,
        batch: &TrainBatch,
        updated: bool,
    ) -> Result<Option<f64>, TrainError> {
        if !updated {
            return Ok(None);
        }
        let (decoder, temperature) = (&self.decoder, self.config.rollout.temperature as f32);
        let changes = self.room.run(batch.span(), |rows| {
            let probe = batch.probe(PROBE_SAMPLES, rows).into_iter();
            let changes = probe.flat_map(|micro| {
                let stats = token_stats(decoder, &micro, temperature).into_iter();
                let change =
                    |(new, old): (TokenStats, f32)| f64::from(new.entropy) - f64::from(old);
                stats.zip(micro.old_entropy).map(change)
            });
            Ok(changes.collect::<Vec<f64>>())
        })?;
        let sum: f64 = changes.iter().sum();
        Ok((!changes.is_empty()).then(|| sum / changes.len() as f64))
    }
}

fn rows_of(mini_batch: &MiniBatch) -> usize {
    mini_batch.micro_batches.iter().map(|micro| micro.pack.len()).sum()
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
