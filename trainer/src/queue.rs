//! Rollouts that are under way, or drawn and not yet trained on, oldest first.

use crate::{
    config::Config,
    error::TrainError,
    rollout::{PendingRollouts, Rollout, RolloutSettings, submit},
};
use onpolicy_engine::chat::ChatTokenizer;
use onpolicy_plugin_api::{Engine, Problem};
use serde::{Deserialize, Serialize};
use std::{collections::VecDeque, sync::Arc, time::Instant};

/// The rollouts of one step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Drawn {
    /// A group for each problem.
    pub rollouts: Vec<Rollout>,
    /// Seconds that the engine took. Steps that were drawn together share theirs by the token.
    pub seconds: f64,
}

impl Drawn {
    fn new_tokens(&self) -> usize {
        self.rollouts.iter().map(Rollout::new_tokens).sum()
    }
}

/// The rollouts of the next steps, in the order of the steps.
pub struct RolloutQueue {
    engine: Arc<dyn Engine>,
    tokenizer: ChatTokenizer,
    /// Steps whose rollouts are under way at a time, at most.
    window: usize,
    pending: VecDeque<(Instant, PendingRollouts)>,
    drawn: VecDeque<Drawn>,
    last_ended: Option<Instant>,
}

impl RolloutQueue {
    /// A queue over `engine` that begins with what a checkpoint held.
    pub fn new(
        config: &Config,
        engine: Arc<dyn Engine>,
        tokenizer: ChatTokenizer,
        drawn: VecDeque<Drawn>,
    ) -> Self {
        let (pending, last_ended) = (VecDeque::new(), None);
        Self { engine, tokenizer, window: window(config), pending, drawn, last_ended }
    }

    /// Steps in the queue.
    pub fn len(&self) -> usize {
        self.drawn.len() + self.pending.len()
    }

    /// True if there is no step in the queue.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Steps that are drawn and not yet trained on.
    pub fn drawn(&self) -> &VecDeque<Drawn> {
        &self.drawn
    }

    /// Asks the engine for the rollouts of one more step. Waits for the oldest if more would be
    /// under way than keep the engine busy. `progress` is told of every new token.
    ///
    /// # Errors
    /// As rollouts have.
    pub fn push(
        &mut self,
        problems: Vec<Problem>,
        settings: &RolloutSettings,
        progress: &mut dyn FnMut(),
    ) -> Result<(), TrainError> {
        while self.pending.len() >= self.window {
            self.wait_for_oldest(progress)?;
        }
        let submitted = Instant::now();
        let pending = submit(&*self.engine, &self.tokenizer, problems, settings)?;
        self.pending.push_back((submitted, pending));
        Ok(())
    }

    /// Takes the rollouts of the oldest step out; waits for them if they are under way.
    ///
    /// # Errors
    /// As rollouts have.
    ///
    /// # Panics
    /// If the queue is empty.
    pub fn pop(&mut self, progress: &mut dyn FnMut()) -> Result<Drawn, TrainError> {
        if self.drawn.is_empty() {
            self.wait_for_oldest(progress)?;
        }
        Ok(self.drawn.pop_front().expect("the oldest step was waited for"))
    }

    /// Waits until nothing is under way.
    ///
    /// # Errors
    /// As rollouts have.
    pub fn settle(&mut self, progress: &mut dyn FnMut()) -> Result<(), TrainError> {
        while !self.pending.is_empty() {
            self.wait_for_oldest(progress)?;
        }
        let seconds: f64 = self.drawn.iter().map(|drawn| drawn.seconds).sum();
        let tokens: usize = self.drawn.iter().map(Drawn::new_tokens).sum();
        for drawn in &mut self.drawn {
            drawn.seconds = seconds * drawn.new_tokens() as f64 / tokens.max(1) as f64;
        }
        Ok(())
    }

    /// The seconds of the oldest count from the end of the one before, so that none counts twice.
    fn wait_for_oldest(&mut self, progress: &mut dyn FnMut()) -> Result<(), TrainError> {
        let (submitted, pending) = self.pending.pop_front().expect("rollouts are under way");
        let (rollouts, ended) = pending.wait(&*self.engine, &self.tokenizer, progress)?;
        let began = self.last_ended.map_or(submitted, |last| last.max(submitted));
        let seconds = ended.saturating_duration_since(began).as_secs_f64();
        self.last_ended = Some(ended.max(began));
        self.drawn.push_back(Drawn { rollouts, seconds });
        Ok(())
    }
}

/// As many steps as fill the engine, and one to follow; as far as it lets requests wait.
fn window(config: &Config) -> usize {
    let (prompts, group) = (config.rollout.prompts_per_step, config.rollout.group_size);
    let filling = config.engine.max_num_seqs.div_ceil(prompts * group) + 1;
    filling.min(config.engine.max_waiting / prompts).max(1)
}
