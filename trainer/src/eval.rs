//! Evaluation: Avg@K and Pass@K on held-out problems.

use crate::{
    config::Config,
    error::TrainError,
    reward::score,
    rollout::{RolloutSettings, generate},
};
use onpolicy_engine::chat::ChatTokenizer;
use onpolicy_plugin_api::{Engine, Problem, TaskSource, Verifier};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A reward from this on counts as a pass.
const PASS: f32 = 0.5;

/// Groups that are submitted at a time.
const GROUPS_AT_A_TIME: usize = 64;

/// The result of an evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalReport {
    /// Version of the weights.
    pub weight_version: u64,
    /// Problems that were judged.
    pub problems: usize,
    /// Problems that could not be judged.
    pub failed: usize,
    /// Samples per problem.
    pub samples: usize,
    /// Mean reward over all samples: Avg@K with K samples.
    pub average: f64,
    /// `(k, Pass@k)`.
    pub pass: Vec<(usize, f64)>,
    /// Mean number of new tokens.
    pub completion_len_mean: f64,
    /// Share of samples that were cut off.
    pub truncated_fraction: f64,
}

/// How an evaluation is done.
#[derive(Debug, Clone, PartialEq)]
pub struct EvalSettings {
    /// How answers are sampled; the group size is K of Avg@K.
    pub rollout: RolloutSettings,
    /// Most held-out problems.
    pub problems: usize,
    /// The k of each Pass@k.
    pub k: Vec<usize>,
}

impl EvalSettings {
    /// What `[eval]` says; the rest as in training.
    pub fn new(config: &Config) -> Self {
        let rollout = RolloutSettings {
            group_size: config.eval.samples,
            temperature: config.eval.temperature as f32,
            ..RolloutSettings::new(config, config.train.seed)
        };
        Self { rollout, problems: config.eval.problems, k: config.eval.k.clone() }
    }
}

/// Samples answers to held-out problems and judges them.
///
/// # Errors
/// As rollouts do; or no problem could be judged.
pub fn evaluate(
    engine: &dyn Engine,
    tokenizer: &ChatTokenizer,
    (task, verifier): (&dyn TaskSource, &dyn Verifier),
    settings: &EvalSettings,
) -> Result<EvalReport, TrainError> {
    let count = settings.problems as u64;
    let problems: Vec<Problem> = (0..count).map_while(|i| task.eval(i)).collect();
    let mut tally = Tally::default();
    for (number, chunk) in problems.chunks(GROUPS_AT_A_TIME).enumerate() {
        let seed = settings.rollout.seed.wrapping_add(number as u64);
        let sampling = RolloutSettings { seed, ..settings.rollout };
        let rollouts = generate(engine, tokenizer, chunk.to_vec(), &sampling, &mut || {})?;
        let (groups, failed) = score(verifier, rollouts);
        tally.failed += failed;
        groups.iter().for_each(|group| tally.add(&group.rewards, &group.rollout));
    }
    if tally.groups.is_empty() {
        return Err(TrainError::Refused(format!(
            "none of {} held-out problems could be judged; look at the verifier and the task",
            problems.len()
        )));
    }
    Ok(tally.report(engine.weight_version(), settings.rollout.group_size, &settings.k))
}

#[derive(Default)]
struct Tally {
    /// Passes and samples of each group.
    groups: Vec<(usize, usize)>,
    reward: f64,
    samples: usize,
    tokens: usize,
    truncated: usize,
    failed: usize,
}

impl Tally {
    fn add(&mut self, rewards: &[f32], rollout: &crate::rollout::Rollout) {
        let passes = rewards.iter().filter(|&&reward| reward >= PASS).count();
        self.groups.push((passes, rewards.len()));
        self.reward += rewards.iter().map(|&reward| f64::from(reward)).sum::<f64>();
        self.samples += rewards.len();
        self.tokens += rollout.new_tokens();
        self.truncated += (0..rewards.len()).filter(|&index| rollout.truncated(index)).count();
    }

    fn report(&self, weight_version: u64, samples: usize, ks: &[usize]) -> EvalReport {
        let pass = |k: usize| {
            let sum: f64 = self.groups.iter().map(|&(c, n)| pass_at_k(n, c, k)).sum();
            (k, sum / self.groups.len() as f64)
        };
        let over_samples = |count: f64| count / self.samples as f64;
        EvalReport {
            weight_version,
            problems: self.groups.len(),
            failed: self.failed,
            samples,
            average: over_samples(self.reward),
            pass: ks.iter().map(|&k| pass(k)).collect(),
            completion_len_mean: over_samples(self.tokens as f64),
            truncated_fraction: over_samples(self.truncated as f64),
        }
    }
}

/// Unbiased estimate of the chance that at least one of `k` samples passes, from `c` passes among
/// `n` samples: `1 - C(n - c, k) / C(n, k)` (arXiv 2107.03374).
pub fn pass_at_k(n: usize, c: usize, k: usize) -> f64 {
    if n - c < k {
        return 1.0;
    }
    let fail = (n - c + 1..=n).map(|i| 1.0 - k as f64 / i as f64);
    1.0 - fail.product::<f64>()
}

impl fmt::Display for EvalReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = |f: &mut fmt::Formatter<'_>, name: &str, value: String| {
            writeln!(f, "  {name:<24}{value:>12}")
        };
        writeln!(f, "evaluation at weight version {}", self.weight_version)?;
        row(f, "problems", self.problems.to_string())?;
        row(f, "samples per problem", self.samples.to_string())?;
        row(f, &format!("Avg@{}", self.samples), format!("{:.3}", self.average))?;
        for (k, pass) in &self.pass {
            row(f, &format!("Pass@{k}"), format!("{pass:.3}"))?;
        }
        row(f, "new tokens, mean", format!("{:.1}", self.completion_len_mean))?;
        row(f, "cut off", format!("{:.1} %", 100.0 * self.truncated_fraction))?;
        if self.failed > 0 {
            row(f, "not judged", self.failed.to_string())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pass_at_k_by_hand() {
        assert_eq!(pass_at_k(4, 0, 1), 0.0);
        assert_eq!(pass_at_k(4, 1, 4), 1.0);
        assert_eq!(pass_at_k(4, 4, 1), 1.0);
        assert!((pass_at_k(4, 1, 1) - 0.25).abs() < 1e-12);
        // 1 - C(2,2)/C(4,2) = 1 - 1/6
        assert!((pass_at_k(4, 2, 2) - 5.0 / 6.0).abs() < 1e-12);
    }
}
