//! The table at the end of a run.

use super::{Seconds, StepMetrics};
use std::fmt;

/// How many steps the first and the last reward are averaged over.
const FIRST: usize = 2;
const LAST: usize = 5;

/// A whole run in a few numbers. `Display` writes it as a table. All numbers are 0 for a run
/// without steps.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Summary {
    /// Steps made.
    pub steps: usize,
    /// Samples drawn.
    pub samples: usize,
    /// Tokens of the prompts.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
    /// Seconds by phase, summed over the steps.
    pub seconds: Seconds,
    /// Mean reward over the first two steps.
    pub reward_first: f64,
    /// Mean reward over the last five steps.
    pub reward_last: f64,
    /// Mean staleness of all generated tokens, in weight versions.
    pub staleness_mean: f64,
    /// Largest staleness of a token.
    pub staleness_max: u64,
    /// Entropy of the first step, in nats.
    pub entropy_first: f64,
    /// Entropy of the last step, in nats.
    pub entropy_last: f64,
    /// Share of all generated tokens that the gate dropped.
    pub dropped_fraction: f64,
    /// Mean distance of the engine's log-probs from the trainer's over the steps, in nats.
    pub mismatch_mean: f64,
    /// The largest distance of a token.
    pub mismatch_max: f64,
    /// Best rollout throughput of a step, in tokens per second.
    pub best_throughput: f64,
    /// The step it was reached in.
    pub best_step: u64,
    /// Groups that could not be judged.
    pub groups_failed: usize,
    /// Peak memory, in MiB.
    pub peak_memory_mb: f64,
}

impl From<&[StepMetrics]> for Summary {
    fn from(steps: &[StepMetrics]) -> Self {
        let (Some(first), Some(last)) = (steps.first(), steps.last()) else {
            return Self::default();
        };
        let total = |of: fn(&StepMetrics) -> usize| steps.iter().map(of).sum::<usize>();
        let best = steps
            .iter()
            .filter(|s| !s.tokens_per_second.is_nan())
            .max_by(|a, b| a.tokens_per_second.total_cmp(&b.tokens_per_second));
        let tokens = total(|s| s.completion_tokens);
        let share = |part: f64| if part.is_nan() { 0.0 } else { part / tokens.max(1) as f64 };
        let stale = steps.iter().map(|s| share(s.staleness_mean * s.completion_tokens as f64));
        let dropped = steps.iter().map(|s| share(s.dropped_fraction * s.completion_tokens as f64));
        Self {
            steps: steps.len(),
            samples: total(|s| s.samples),
            prompt_tokens: total(|s| s.prompt_tokens),
            completion_tokens: tokens,
            seconds: sum(steps),
            reward_first: mean_reward(&steps[..FIRST.min(steps.len())]),
            reward_last: mean_reward(&steps[steps.len().saturating_sub(LAST)..]),
            staleness_mean: stale.sum(),
            staleness_max: steps.iter().map(|s| s.staleness_max).max().unwrap_or(0),
            entropy_first: first.entropy,
            entropy_last: last.entropy,
            dropped_fraction: dropped.sum(),
            mismatch_mean: mean(steps.iter().map(|s| s.mismatch_mean)),
            mismatch_max: steps.iter().map(|s| s.mismatch_max).fold(f64::NAN, f64::max),
            best_throughput: best.map_or(0.0, |s| s.tokens_per_second),
            best_step: best.map_or(0, |s| s.step),
            groups_failed: total(|s| s.groups_failed),
            peak_memory_mb: steps.iter().map(|s| s.peak_memory_mb).fold(0.0, f64::max),
        }
    }
}

fn sum(steps: &[StepMetrics]) -> Seconds {
    let total = |of: fn(&Seconds) -> f64| steps.iter().map(|s| of(&s.seconds)).sum();
    Seconds {
        rollout: total(|s| s.rollout),
        rollout_wait: total(|s| s.rollout_wait),
        reward: total(|s| s.reward),
        train: total(|s| s.train),
        update: total(|s| s.update),
        probe: total(|s| s.probe),
        total: total(|s| s.total),
    }
}

/// Mean over the steps that have a reward; NaN if none has.
fn mean_reward(steps: &[StepMetrics]) -> f64 {
    mean(steps.iter().map(|s| s.reward_mean))
}

/// Mean of the numbers there are; NaN if there is none.
fn mean(numbers: impl Iterator<Item = f64>) -> f64 {
    let numbers: Vec<f64> = numbers.filter(|number| !number.is_nan()).collect();
    numbers.iter().sum::<f64>() / numbers.len() as f64
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = self.rows();
        let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        rows.iter().try_for_each(|(name, value)| writeln!(f, "  {name:<width$}  {value}"))
    }
}

impl Summary {
    fn rows(&self) -> Vec<(String, String)> {
        let row = |name: &str, value: String| (name.to_owned(), value);
        let mut rows = vec![
            row("steps", self.steps.to_string()),
            row("samples", thousands(self.samples)),
            row("tokens generated", thousands(self.completion_tokens)),
            row("tokens of prompts", thousands(self.prompt_tokens)),
            row("seconds", format!("{:.1}", self.seconds.total)),
        ];
        for (phase, seconds) in self.seconds.phases() {
            let percent = 100.0 * seconds / self.seconds.total.max(f64::MIN_POSITIVE);
            rows.push(row(&format!("  {phase}"), format!("{seconds:.1} ({percent:.1} %)")));
        }
        if self.seconds.hidden() > 0.0 {
            rows.push(row("  rollout, hidden", format!("{:.1}", self.seconds.hidden())));
        }
        let (first, last) = (FIRST.min(self.steps), LAST.min(self.steps));
        rows.extend([
            row(
                "reward",
                format!(
                    "{:.3} (first {first}) -> {:.3} (last {last})",
                    self.reward_first, self.reward_last
                ),
            ),
            row("entropy", format!("{:.3} -> {:.3} nats", self.entropy_first, self.entropy_last)),
            row(
                "engine - trainer",
                format!("{:.1e} nats (at most {:.1e})", self.mismatch_mean, self.mismatch_max),
            ),
            row("tokens dropped", format!("{:.2} %", 100.0 * self.dropped_fraction)),
            row(
                "best throughput",
                format!("{:.0} tokens/s (step {})", self.best_throughput, self.best_step),
            ),
            row("peak memory", format!("{:.0} MiB", self.peak_memory_mb)),
        ]);
        if self.staleness_max > 0 {
            let (mean, max) = (self.staleness_mean, self.staleness_max);
            rows.push(row("staleness", format!("{mean:.2} versions on average, at most {max}")));
        }
        if self.groups_failed > 0 {
            rows.push(row("groups not judged", self.groups_failed.to_string()));
        }
        rows
    }
}

/// `12345` as `12,345`.
fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let groups = digits.as_bytes().rchunks(3).rev();
    groups.map(String::from_utf8_lossy).collect::<Vec<_>>().join(",")
}
