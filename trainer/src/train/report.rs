//! What a step came to, as metrics.

use super::{Trainer, Update};
use crate::{
    batch::TrainBatch,
    entropy::EntropyReport,
    metrics::{Seconds, Staleness, StepMetrics, memory},
    reward::Scored,
    rollout::Rollout,
};

/// What a step's metrics are made from.
pub(super) struct Report<'a> {
    pub groups: &'a [Scored],
    pub failed: usize,
    pub batch: &'a TrainBatch,
    pub update: &'a Update,
    pub measured: Option<f64>,
    /// Version of the weights before the updates.
    pub version: u64,
    /// How often memory did not suffice.
    pub retries: usize,
}

impl Trainer {
    fn refresh_seconds(&self) -> f64 {
        let Some(native) = &self.native else { return 0.0 };
        native.stats().map_or(f64::NAN, |stats| stats.refresh.as_secs_f64())
    }

    pub(super) fn metrics(&self, report: &Report<'_>, seconds: Seconds) -> StepMetrics {
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
            micro_batch_tokens: self.room.rows(),
            memory_retries: report.retries,
            seconds,
            tokens_per_second: tokens as f64 / seconds.rollout.max(1e-9),
            peak_memory_mb: memory::peak_mb().unwrap_or(f64::NAN),
            peak_device_memory_mb: memory::device_peak_mb(self.decoder.embedding().device()),
            elapsed_seconds: 0.0,
        }
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Population standard deviation.
fn std(values: &[f64]) -> f64 {
    let mean = mean(values);
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len().max(1) as f64).sqrt()
}
