//! Rewards of one group become advantages.

use serde::{Deserialize, Serialize};

/// Added to the standard deviation, so that a group without spread gets zeros.
const EPSILON: f64 = 1e-6;

/// How advantages are made from the rewards of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Advantage {
    /// `(R - mean) / (std + 1e-6)`, as [`grpo`] computes it.
    #[default]
    Grpo,
    /// `R - mean`, as [`centered`] computes it.
    Centered,
}

impl Advantage {
    /// The advantages of one group, in the order of its rewards.
    pub fn of(self, rewards: &[f32]) -> Vec<f32> {
        match self {
            Self::Grpo => grpo(rewards),
            Self::Centered => centered(rewards),
        }
    }
}

/// GRPO (arXiv 2402.03300): `(R - mean) / (std + 1e-6)` with the unbiased standard deviation. A
/// group of one has mean 0 and standard deviation 1.
pub fn grpo(rewards: &[f32]) -> Vec<f32> {
    let mean = mean(rewards);
    let scale = 1.0 / (unbiased_std(rewards) + EPSILON);
    rewards.iter().map(|&r| ((f64::from(r) - mean) * scale) as f32).collect()
}

/// Dr. GRPO (arXiv 2503.20783): `R - mean`, not divided, so that easy and hard groups weigh the
/// same. A group of one has mean 0.
pub fn centered(rewards: &[f32]) -> Vec<f32> {
    let mean = mean(rewards);
    rewards.iter().map(|&r| (f64::from(r) - mean) as f32).collect()
}

/// True if the rewards of a group differ. Without spread every advantage is 0 and the group
/// teaches nothing.
pub fn has_spread(rewards: &[f32]) -> bool {
    rewards.windows(2).any(|pair| pair[0] != pair[1])
}

fn mean(rewards: &[f32]) -> f64 {
    if rewards.len() < 2 {
        return 0.0;
    }
    rewards.iter().map(|&r| f64::from(r)).sum::<f64>() / rewards.len() as f64
}

fn unbiased_std(rewards: &[f32]) -> f64 {
    if rewards.len() < 2 {
        return 1.0;
    }
    let mean = mean(rewards);
    let squares: f64 = rewards.iter().map(|&r| (f64::from(r) - mean).powi(2)).sum();
    (squares / (rewards.len() - 1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(actual: &[f32], expected: &[f32]) {
        assert_eq!(actual.len(), expected.len());
        for (a, e) in actual.iter().zip(expected) {
            assert!((a - e).abs() < 2e-6, "{actual:?} is not {expected:?}");
        }
    }

    #[test]
    fn grpo_divides_by_the_unbiased_deviation() {
        close(&grpo(&[1.0, 0.0, 0.0, 0.0]), &[1.499997, -0.499999, -0.499999, -0.499999]);
        close(&grpo(&[0.5, 0.5]), &[0.0, 0.0]);
        close(&grpo(&[0.1; 7]), &[0.0; 7]);
        close(&grpo(&[2.0]), &[1.999998]);
        assert!(grpo(&[]).is_empty());
    }

    #[test]
    fn centered_only_subtracts_the_mean() {
        close(&Advantage::Centered.of(&[1.0, 0.0, 0.0, 0.0]), &[0.75, -0.25, -0.25, -0.25]);
        close(&centered(&[3.0]), &[3.0]);
    }

    #[test]
    fn spread_means_that_two_rewards_differ() {
        assert!(has_spread(&[1.0, 1.0, 0.0]));
        assert!(!has_spread(&[1.0, 1.0]));
        assert!(!has_spread(&[1.0]));
        assert!(!has_spread(&[]));
    }

    #[test]
    fn names_in_a_configuration_file() {
        let parse = |name: &str| serde_json::from_value::<Advantage>(name.into()).ok();
        assert_eq!(parse("grpo"), Some(Advantage::Grpo));
        assert_eq!(parse("centered"), Some(Advantage::Centered));
        assert_eq!(parse("gae"), None);
    }
}
