//! The engine's log-probs against the trainer's: how far they are apart, and what corrects for it.
//!
//! Samples are drawn from the engine's distribution, gradients taken in the trainer's. In f32 the
//! two agree to rounding errors. Where the engine serves narrow weights they do not, and a gradient
//! that takes the one for the other is biased. Truncated importance sampling (Yao et al. 2025,
//! "Your efficient RL framework secretly brings you off-policy training"; verl's rollout
//! correction, token level) weighs each token's loss with min(p_trainer / p_engine, cap), both
//! before the batch's first update, and PPO's ratio is taken against the trainer's own log-probs.

use serde::{Deserialize, Serialize};

/// Ratios p_trainer / p_engine within this range count as near 1.
const NEAR: std::ops::RangeInclusive<f64> = 0.9..=1.1;

/// What is done about the distance of the engine's log-probs from the trainer's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Correction {
    /// Nothing: the engine's log-probs are PPO's old ones.
    #[default]
    None,
    /// Truncated importance sampling: the trainer's own log-probs are PPO's old ones.
    Tis,
}

/// min(e^difference, cap), where `difference` is the trainer's log-prob minus the engine's.
pub fn truncated_weight(difference: f32, cap: f32) -> f32 {
    difference.exp().min(cap)
}

/// How far the trainer's log-probs are from the engine's, over some tokens. Sums, so that
/// micro-batches add up.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Mismatch {
    tokens: usize,
    distance: f64,
    largest: f64,
    far: usize,
}

impl Mismatch {
    /// Adds a token: `difference` is the trainer's log-prob minus the engine's.
    pub fn push(&mut self, difference: f32) {
        let difference = f64::from(difference);
        self.tokens += 1;
        self.distance += difference.abs();
        self.largest = self.largest.max(difference.abs());
        self.far += usize::from(!NEAR.contains(&difference.exp()));
    }

    /// Adds other tokens.
    pub fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.distance += other.distance;
        self.largest = self.largest.max(other.largest);
        self.far += other.far;
    }

    /// Mean distance, in nats; NaN without tokens.
    pub fn mean(&self) -> f64 {
        self.distance / self.tokens as f64
    }

    /// Largest distance, in nats; NaN without tokens.
    pub fn largest(&self) -> f64 {
        if self.tokens == 0 { f64::NAN } else { self.largest }
    }

    /// Share of the tokens whose ratio p_trainer / p_engine is outside of 0.9 to 1.1; NaN without
    /// tokens.
    pub fn far(&self) -> f64 {
        self.far as f64 / self.tokens as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_by_hand() {
        assert_eq!(truncated_weight(0.0, 2.0), 1.0);
        assert!((truncated_weight(0.5f32.ln(), 2.0) - 0.5).abs() < 1e-6);
        assert_eq!(truncated_weight(3.0f32.ln(), 2.0), 2.0);
        assert_eq!(truncated_weight(f32::INFINITY, 2.0), 2.0);
    }

    #[test]
    fn distances_by_hand() {
        let mut mismatch = Mismatch::default();
        assert!(mismatch.mean().is_nan() && mismatch.largest().is_nan() && mismatch.far().is_nan());
        [0.0, -0.25, 0.0625].into_iter().for_each(|d| mismatch.push(d));
        let mut other = Mismatch::default();
        other.push(0.125);
        mismatch.add(&other);
        assert_eq!((mismatch.mean(), mismatch.largest(), mismatch.far()), (0.109375, 0.25, 0.5));
    }
}
