//! Problems become groups of samples.

use crate::{config::Config, error::TrainError};
use onpolicy_engine::{
    chat::{Chat, ChatTokenizer},
    collect::{Sample, collect},
    sampler::stream_of,
};
use onpolicy_plugin_api::{Engine, FinishReason, Problem, Request, SamplingParams};
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
    /// Longest time for all of them.
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
#[derive(Debug, Clone)]
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

/// Samples a group for every problem. All groups start in the same engine step, and problem `i`
/// draws from stream `i` of the seed. `progress` is told of every new token.
///
/// # Errors
/// A problem that makes no prompt, a prompt that the engine refuses, a failure, or the timeout.
pub fn generate(
    engine: &dyn Engine,
    tokenizer: &ChatTokenizer,
    problems: Vec<Problem>,
    settings: &RolloutSettings,
    progress: &mut dyn FnMut(),
) -> Result<Vec<Rollout>, TrainError> {
    let prompts: Vec<Vec<u32>> = problems
        .iter()
        .map(|problem| tokenizer.encode_chat(&Chat::from_messages(&problem.messages)))
        .collect::<Result<_, _>>()?;
    let requests = prompts.iter().enumerate().map(|(index, prompt)| Request {
        prompt: prompt.clone(),
        params: SamplingParams {
            n: settings.group_size,
            temperature: settings.temperature,
            max_tokens: settings.max_new_tokens,
            seed: Some(stream_of(settings.seed, index)),
            ..SamplingParams::default()
        },
    });
    let deadline = Instant::now() + settings.timeout;
    let groups = collect(engine, requests.collect(), deadline, progress)?;
    let text = |sample: &Sample| {
        let ids: Vec<u32> = sample.tokens.iter().map(|token| token.id).collect();
        tokenizer.decode(&ids, true)
    };
    let rollouts = problems.into_iter().zip(prompts).zip(groups);
    rollouts
        .map(|((problem, prompt), group)| {
            let texts = group.samples.iter().map(text).collect::<Result<_, _>>()?;
            Ok(Rollout { problem, prompt, samples: group.samples, texts })
        })
        .collect()
}
