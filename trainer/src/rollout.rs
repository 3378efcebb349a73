//! Problems become groups of samples.

use crate::{config::Config, error::TrainError};
use onpolicy_engine::{
    chat::{Chat, ChatTokenizer},
    collect::{self, Collected, Pending, Sample},
    sampler::stream_of,
};
use onpolicy_plugin_api::{Engine, FinishReason, Problem, Request, SamplingParams};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// How groups are sampled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RolloutSettings {
    /// Samples per problem.
    pub group_size: usize,
    /// Most new tokens per sample.
    pub max_new_tokens: usize,
    /// Sampling temperature.
    pub temperature: f32,
    /// Longest time to wait for all of them.
    pub timeout: Duration,
    /// Same seed, same weights, same samples.
    pub seed: u64,
}

impl RolloutSettings {
    /// What `[rollout]` says, with samples drawn from `seed`.
    pub fn new(config: &Config, seed: u64) -> Self {
        let rollout = &config.rollout;
        Self {
            group_size: rollout.group_size,
            max_new_tokens: rollout.max_new_tokens,
            temperature: rollout.temperature as f32,
            timeout: Duration::from_secs(rollout.timeout_seconds),
            seed,
        }
    }
}

/// A problem, its prompt, and the samples of the policy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// The problem.
    pub problem: Problem,
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// The samples.
    pub samples: Vec<Sample>,
    /// Their texts, special tokens left out.
    pub texts: Vec<String>,
}

impl Rollout {
    /// True if sample `index` was cut off by the token limit.
    pub fn truncated(&self, index: usize) -> bool {
        self.samples[index].finish == FinishReason::Length
    }

    /// New tokens of all samples.
    pub fn new_tokens(&self) -> usize {
        self.samples.iter().map(|sample| sample.tokens.len()).sum()
    }
}

/// Rollouts that the engine works on. Dropping it aborts them.
pub struct PendingRollouts {
    problems: Vec<Problem>,
    prompts: Vec<Vec<u32>>,
    samples: Pending,
    timeout: Duration,
}

/// Asks the engine for a group for every problem. All groups start in the same engine step if
/// there is room, and problem `i` draws from stream `i` of the seed.
///
/// # Errors
/// A problem that makes no prompt, or a prompt that the engine refuses.
pub fn submit(
    engine: &dyn Engine,
    tokenizer: &ChatTokenizer,
    problems: Vec<Problem>,
    settings: &RolloutSettings,
) -> Result<PendingRollouts, TrainError> {
    let prompts: Vec<Vec<u32>> = problems
        .iter()
        .map(|problem| tokenizer.encode_chat(&Chat::from_messages(&problem.messages)))
        .collect::<Result<_, _>>()?;
    let requests = prompts.iter().enumerate().map(|(index, prompt)| {
        let params = SamplingParams {
            n: settings.group_size,
            temperature: settings.temperature,
            max_tokens: settings.max_new_tokens,
            seed: Some(stream_of(settings.seed, index)),
            ..SamplingParams::default()
        };
        Request::new(prompt.clone(), params)
    });
    let samples = collect::submit(engine, requests.collect())?;
    Ok(PendingRollouts { problems, prompts, samples, timeout: settings.timeout })
}

impl PendingRollouts {
    /// Blocks until all samples have ended; also says when the last one did. `progress` is told of
    /// every new token.
    ///
    /// # Errors
    /// A failure, or the timeout, counted from now.
    pub fn wait(
        self,
        engine: &dyn Engine,
        tokenizer: &ChatTokenizer,
        progress: &mut dyn FnMut(),
    ) -> Result<(Vec<Rollout>, Instant), TrainError> {
        let deadline = Instant::now() + self.timeout;
        let Collected { groups, ended } = self.samples.wait(engine, deadline, progress)?;
        let text = |sample: &Sample| {
            let ids: Vec<u32> = sample.tokens.iter().map(|token| token.id).collect();
            tokenizer.decode(&ids, true)
        };
        let rollouts = self.problems.into_iter().zip(self.prompts).zip(groups);
        let rollouts = rollouts.map(|((problem, prompt), group)| {
            let texts = group.samples.iter().map(text).collect::<Result<_, _>>()?;
            Ok(Rollout { problem, prompt, samples: group.samples, texts })
        });
        Ok((rollouts.collect::<Result<_, TrainError>>()?, ended))
    }
}

/// Asks for rollouts and waits for them; see [`submit`] and [`PendingRollouts::wait`].
///
/// # Errors
/// As they have.
pub fn generate(
    engine: &dyn Engine,
    tokenizer: &ChatTokenizer,
    problems: Vec<Problem>,
    settings: &RolloutSettings,
    progress: &mut dyn FnMut(),
) -> Result<Vec<Rollout>, TrainError> {
    let pending = submit(engine, tokenizer, problems, settings)?;
    Ok(pending.wait(engine, tokenizer, progress)?.0)
}
