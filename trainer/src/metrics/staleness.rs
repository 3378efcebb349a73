//! How old the weights were that drew the tokens of a step.

use crate::rollout::Rollout;

/// Versions between the weights that drew a token and those that its gradient is taken at, over
/// the tokens of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Staleness {
    /// Mean over the tokens; NaN if there is none.
    pub mean: f64,
    /// Largest.
    pub max: u64,
}

impl Staleness {
    /// Staleness of the rollouts' tokens at `version` of the weights.
    pub fn of(rollouts: &[&Rollout], version: u64) -> Self {
        let samples = rollouts.iter().flat_map(|rollout| &rollout.samples);
        let tokens = samples.flat_map(|sample| &sample.tokens);
        let (mut count, mut sum, mut max) = (0u64, 0, 0);
        for token in tokens {
            let versions = version.saturating_sub(token.weight_version);
            (count, sum, max) = (count + 1, sum + versions, max.max(versions));
        }
        Self { mean: sum as f64 / count as f64, max }
    }
}
