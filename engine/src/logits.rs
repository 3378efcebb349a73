//! Logits to log-prob, entropy and discriminator: the only such code, for engine and trainer.
//!
//! With z the logits over the temperature, p = softmax(z), m = max z and d = z - m, one pass sums
//! Z = sum e^d, A1 = sum e^d d, B = sum e^2d and C = sum e^2d d. From these (arXiv 2602.03392, for
//! the scores S_i = p_i (H + ln p_i)) come H = ln Z - A1 / Z, sum p^2 = B / Z^2 and
//! E_p\[S\] = (C - B A1 / Z) / Z^2.

use onpolicy_plugin_api::TokenStats;

use crate::kernels::disjoint;
use crate::kernels::rows::{self, Moments, Scale};
use crate::kernels::simd::Level;

pub(crate) mod merge;

/// Sums over one row of logits, from which the statistics of its tokens follow.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowStats {
    /// Largest logit, before the temperature.
    pub max: f32,
    /// One over the temperature.
    pub inv_temperature: f32,
    /// Sum of e^d; at least 1.
    pub z: f64,
    /// Sum of e^d d.
    pub a1: f64,
    /// Sum of e^2d.
    pub b: f64,
    /// Sum of e^2d d.
    pub c: f64,
}

/// The sums of one row. A logit of minus infinity has probability 0.
pub fn row_stats(logits: &[f32], inv_temperature: f32) -> RowStats {
    stats_at(Level::best(), logits, inv_temperature, None)
}

/// As [`row_stats`]; also fills `masses` with the sum of e^d of each
/// [`ROW_BLOCK`](rows::ROW_BLOCK) logits.
pub(crate) fn row_stats_and_masses(
    logits: &[f32],
    inv_temperature: f32,
    masses: &mut Vec<f64>,
) -> RowStats {
    stats_at(Level::best(), logits, inv_temperature, Some(masses))
}

fn stats_at(
    level: Level,
    logits: &[f32],
    inv_temperature: f32,
    masses: Option<&mut Vec<f64>>,
) -> RowStats {
    let max = rows::max(level, logits);
    let Moments { z, a1, b, c } =
        rows::moments(level, logits, Scale { max, inv_temperature }, masses);
    RowStats { max, inv_temperature, z, a1, b, c }
}

impl RowStats {
    /// Whether the row is a distribution: no NaN, no plus infinity, and some finite logit.
    pub fn is_valid(&self) -> bool {
        self.max.is_finite() && self.z.is_finite() && self.z > 0.0
    }

    /// ln p, in nats, of the token with this logit.
    pub fn logprob(&self, logit: f32) -> f32 {
        let d = (f64::from(logit) - f64::from(self.max)) * f64::from(self.inv_temperature);
        (d - self.z.ln()) as f32
    }

    /// Entropy H, in nats.
    pub fn entropy(&self) -> f32 {
        (self.z.ln() - self.a1 / self.z) as f32
    }

    /// Baseline E_p\[S\].
    pub fn baseline(&self) -> f32 {
        ((self.c - self.b * self.a1 / self.z) / (self.z * self.z)) as f32
    }

    /// Statistics of the token with this logit.
    pub fn token(&self, logit: f32) -> TokenStats {
        TokenStats {
            logprob: self.logprob(logit),
            entropy: self.entropy(),
            baseline: self.baseline(),
        }
    }

    /// The weights e^d / Z come from here.
    pub(crate) fn scale(&self) -> Scale {
        Scale { max: self.max, inv_temperature: self.inv_temperature }
    }

    /// Overwrites the row that the sums are of by d (scale * ln p_token) / d logits, which is
    /// `scale * inv_temperature * (onehot(token) - p)`.
    ///
    /// # Panics
    /// If `token` is outside of the row.
    pub fn gradient(&self, row: &mut [f32], token: u32, scale: f32) {
        let scale = scale * self.inv_temperature;
        if scale == 0.0 {
            row.fill(0.0);
            return;
        }
        let factor = (-f64::from(scale) / self.z) as f32;
        rows::weigh(Level::best(), row, self.scale(), factor);
        row[token as usize] += scale;
    }
}

/// Statistics of token `tokens[i]` in row `i` of `logits`, `[tokens.len(), vocab]`.
///
/// # Panics
/// If the shapes do not fit, or a token is not below `vocab`.
pub fn batch_stats(
    logits: &[f32],
    vocab: usize,
    tokens: &[u32],
    inv_temperature: f32,
) -> Vec<TokenStats> {
    check_shapes(logits, vocab, tokens);
    disjoint::map(tokens.len(), &|i| {
        let row = &logits[i * vocab..(i + 1) * vocab];
        row_stats(row, inv_temperature).token(row[tokens[i] as usize])
    })
}

/// Overwrites a row of logits z by `scale * inv_temperature * (onehot(token) - p)` with
/// p = softmax(z * inv_temperature): the gradient of `scale * ln p_token`.
///
/// # Panics
/// If `token` is outside of the row.
pub fn softmax_minus_onehot(logits_row: &mut [f32], token: u32, scale: f32, inv_temperature: f32) {
    row_stats(logits_row, inv_temperature).gradient(logits_row, token, scale);
}

/// Overwrites `logits`, `[tokens.len(), vocab]`, by the gradient of
/// `sum_i scales[i] * ln p_i(tokens[i])`, where p_i is the softmax of row `i` times
/// `inv_temperature`.
///
/// # Panics
/// If the shapes do not fit, or a token is not below `vocab`.
pub fn logprob_gradient(
    logits: &mut [f32],
    vocab: usize,
    tokens: &[u32],
    scales: &[f32],
    inv_temperature: f32,
) {
    check_shapes(logits, vocab, tokens);
    assert_eq!(scales.len(), tokens.len(), "one scale per token");
    disjoint::for_each_chunk(logits, vocab, &|i, row| {
        softmax_minus_onehot(row, tokens[i], scales[i], inv_temperature);
    });
}

/// Checked before any thread begins.
fn check_shapes(logits: &[f32], vocab: usize, tokens: &[u32]) {
    assert!(vocab > 0, "a vocabulary has at least one token");
    assert_eq!(logits.len(), tokens.len() * vocab, "one row of logits per token");
    assert!(tokens.iter().all(|&token| (token as usize) < vocab), "a token is outside of vocab");
}

#[cfg(test)]
mod tests;
