//! Entropy dynamics: which tokens a gate drops, and how an update should move the entropy.
//!
//! Source of the rules and formulas: arXiv 2602.03392. For one position with the distribution `p`
//! (after the sampling temperature), its entropy `H` in nats and the drawn token `k`:
//! the score of a token is `S_i = p_i (H + ln p_i)`, the discriminator `S*` is the score of `k`,
//! the baseline is `E_p[S] = sum_i p_i S_i`. A GRPO step changes the entropy by
//! `-alpha (S* - E_p[S]) + O(alpha^2)` with `alpha = learning rate * ratio * advantage`, in logit
//! space: coupling between positions is left out.
//!
//! All sums run in f64; the statistics of a batch are those of all its valid response tokens.

use onpolicy_plugin_api::{Options, TokenBatch, TokenGate};
use serde::{Deserialize, Serialize};

/// Below this standard deviation of the scores, [`ClipB`] drops nothing.
const MIN_SIGMA: f64 = 1e-12;

/// The gate `none`: every token stays.
#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KeepAll {}

/// The gate `clip_b` (batch-normalised): of the tokens with a negative advantage, drops those
/// whose score lies more than `mu` standard deviations below the batch's mean score.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClipB {
    /// Threshold in standard deviations; at least 0.
    pub mu: f64,
    /// Also drop tokens with a positive advantage whose score lies as far above the mean.
    pub two_sided: bool,
}

/// The gate `clip_v` (vocabulary-normalised): with `D = E_p[S] - S*`, of the tokens with a
/// negative advantage, drops those with `D > mu * std(D)`; at most `max_frac` of all tokens (but
/// at least one), those with the largest `D`.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClipV {
    /// Threshold in standard deviations; at least 0.
    pub mu: f64,
    /// Most tokens dropped, as a share of the batch; above 0, at most 1.
    pub max_frac: f64,
    /// Also drop tokens with a positive advantage and `-D > mu * std(D)`, under the same cap.
    pub two_sided: bool,
}

impl Default for ClipB {
    fn default() -> Self {
        Self { mu: 2.5, two_sided: false }
    }
}

impl Default for ClipV {
    fn default() -> Self {
        Self { mu: 8.5, max_frac: 1e-4, two_sided: false }
    }
}

impl KeepAll {
    /// Reads the options of the gate: it has none.
    ///
    /// # Errors
    /// Any key.
    pub fn from_options(options: &Options) -> Result<Self, String> {
        options.parse()
    }
}

impl ClipB {
    /// Reads `mu` and `two_sided`.
    ///
    /// # Errors
    /// An unknown key, a wrong type, or a value out of range.
    pub fn from_options(options: &Options) -> Result<Self, String> {
        let gate: Self = options.parse()?;
        check_mu(gate.mu)?;
        Ok(gate)
    }
}

impl ClipV {
    /// Reads `mu`, `max_frac` and `two_sided`.
    ///
    /// # Errors
    /// An unknown key, a wrong type, or a value out of range.
    pub fn from_options(options: &Options) -> Result<Self, String> {
        let gate: Self = options.parse()?;
        check_mu(gate.mu)?;
        if gate.max_frac > 0.0 && gate.max_frac <= 1.0 {
            return Ok(gate);
        }
        Err(format!("max_frac = {} must be above 0 and at most 1", gate.max_frac))
    }
}

fn check_mu(mu: f64) -> Result<(), String> {
    if mu.is_finite() && mu >= 0.0 {
        return Ok(());
    }
    Err(format!("mu = {mu} must be a finite number, at least 0"))
}

impl TokenGate for KeepAll {
    fn keep(&self, batch: &TokenBatch<'_>) -> Vec<bool> {
        vec![true; batch.len()]
    }
}

impl TokenGate for ClipB {
    fn keep(&self, batch: &TokenBatch<'_>) -> Vec<bool> {
        let scores = batch.discriminator();
        let (mean, sigma) = mean_and_std(&scores);
        if sigma < MIN_SIGMA {
            return vec![true; batch.len()];
        }
        let limit = self.mu * sigma;
        let dropped = |(&score, &advantage): (&f32, &f32)| {
            let deviation = f64::from(score) - mean;
            (advantage < 0.0 && deviation < -limit)
                || (self.two_sided && advantage > 0.0 && deviation > limit)
        };
        scores.iter().zip(batch.advantage).map(|token| !dropped(token)).collect()
    }
}

impl TokenGate for ClipV {
    fn keep(&self, batch: &TokenBatch<'_>) -> Vec<bool> {
        let gaps = score_gaps(batch);
        let limit = self.mu * mean_and_std(&gaps).1;
        // How far a token lies on the side that may be dropped; None if it stays in any case.
        let excess = |t: usize| {
            let below = -f64::from(gaps[t]);
            match batch.advantage[t] {
                a if a < 0.0 && below > limit => Some(below),
                a if self.two_sided && a > 0.0 && -below > limit => Some(-below),
                _ => None,
            }
        };
        let mut dropped: Vec<(usize, f64)> =
            (0..batch.len()).filter_map(|t| excess(t).map(|e| (t, e))).collect();
        dropped.sort_by(|a, b| b.1.total_cmp(&a.1));
        dropped.truncate(((self.max_frac * batch.len() as f64) as usize).max(1));
        let mut keep = vec![true; batch.len()];
        dropped.iter().for_each(|&(t, _)| keep[t] = false);
        keep
    }
}

/// `S* - E_p[S]` of each token.
pub fn score_gaps(batch: &TokenBatch<'_>) -> Vec<f32> {
    batch.discriminator().iter().zip(batch.baseline).map(|(score, base)| score - base).collect()
}

/// The entropy change that one update should cause at each token, in nats:
/// `-alpha (S* - E_p[S])` with `alpha = lr * ratio * advantage`. `ratio` holds the importance
/// ratio `p_new / p_old` of each token; `None` stands for 1 everywhere (on-policy).
///
/// # Panics
/// If `ratio` has not one entry per token.
pub fn predicted_changes(batch: &TokenBatch<'_>, ratio: Option<&[f32]>, lr: f64) -> Vec<f64> {
    if let Some(ratio) = ratio {
        assert_eq!(ratio.len(), batch.len(), "one ratio per token");
    }
    let alpha = |t: usize| lr * ratio.map_or(1.0, |r| r[t].into()) * f64::from(batch.advantage[t]);
    let gaps = score_gaps(batch);
    gaps.iter().enumerate().map(|(t, &gap)| -alpha(t) * f64::from(gap)).collect()
}

/// What a step's metrics say about the entropy of one training batch. All numbers are 0 for an
/// empty batch.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct EntropyReport {
    /// Mean entropy of the tokens, in nats.
    pub entropy: f64,
    /// Mean of the score `S*`.
    pub score_mean: f64,
    /// Population standard deviation of `S*`.
    pub score_std: f64,
    /// Mean of `S* - E_p[S]`; near 0 on-policy.
    pub gap_mean: f64,
    /// Share of the tokens that the gate dropped.
    pub dropped: f64,
    /// Share of the tokens with a positive advantage that the gate dropped.
    pub dropped_positive: f64,
    /// Share of the tokens with a negative advantage that the gate dropped.
    pub dropped_negative: f64,
    /// Predicted change of the mean entropy, in nats: the mean over all tokens of
    /// [`predicted_changes`], where a dropped token counts as 0.
    pub predicted_change: f64,
}

impl EntropyReport {
    /// Looks at one batch. `keep` is the gate's mask; `ratio` and `lr` are as in
    /// [`predicted_changes`].
    ///
    /// # Panics
    /// If `keep` or `ratio` has not one entry per token.
    pub fn new(batch: &TokenBatch<'_>, keep: &[bool], ratio: Option<&[f32]>, lr: f64) -> Self {
        assert_eq!(keep.len(), batch.len(), "one mask entry per token");
        let (score_mean, score_std) = mean_and_std(&batch.discriminator());
        let changes = predicted_changes(batch, ratio, lr);
        let kept_changes = changes.iter().zip(keep).filter(|(_, kept)| **kept);
        let dropped_where = |wanted: fn(f32) -> bool| {
            let of_kind = || batch.advantage.iter().zip(keep).filter(|(a, _)| wanted(**a));
            share(of_kind().filter(|(_, kept)| !**kept).count(), of_kind().count())
        };
        Self {
            entropy: mean_and_std(batch.entropy).0,
            score_mean,
            score_std,
            gap_mean: mean_and_std(&score_gaps(batch)).0,
            dropped: dropped_where(|_| true),
            dropped_positive: dropped_where(|advantage| advantage > 0.0),
            dropped_negative: dropped_where(|advantage| advantage < 0.0),
            predicted_change: kept_changes.map(|(change, _)| change).sum::<f64>()
                / batch.len().max(1) as f64,
        }
    }
}

fn share(part: usize, whole: usize) -> f64 {
    part as f64 / whole.max(1) as f64
}

/// Mean and population standard deviation; zeros for an empty slice.
fn mean_and_std(values: &[f32]) -> (f64, f64) {
    if values.is_empty() {
        return (0.0, 0.0);
    }
    let n = values.len() as f64;
    let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let variance = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n;
    (mean, variance.sqrt())
}
