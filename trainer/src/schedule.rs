//! The learning rate of each step.

use crate::config::{Schedule, Train};
use std::f64::consts::PI;

/// Learning rate of the step after `done` steps: a linear warm-up that reaches `lr` with the last
/// warm-up step, then constant, or half a cosine down to `min_lr_ratio * lr` at the last step.
pub fn learning_rate(train: &Train, done: u64) -> f64 {
    if done < train.warmup_steps {
        return train.lr * (done + 1) as f64 / train.warmup_steps as f64;
    }
    match train.schedule {
        Schedule::Constant => train.lr,
        Schedule::Cosine => {
            let last = train.steps.saturating_sub(train.warmup_steps + 1).max(1);
            let part = ((done - train.warmup_steps) as f64 / last as f64).min(1.0);
            let weight = 0.5 * (1.0 + (PI * part).cos());
            train.lr * (train.min_lr_ratio + (1.0 - train.min_lr_ratio) * weight)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_then_cosine() {
        let train = Train {
            steps: 7,
            lr: 1.0,
            warmup_steps: 2,
            schedule: Schedule::Cosine,
            min_lr_ratio: 0.2,
            ..Train::default()
        };
        let rates: Vec<f64> = (0..8).map(|step| learning_rate(&train, step)).collect();
        let want = [0.5, 1.0, 1.0, 0.8828427, 0.6, 0.3171573, 0.2, 0.2];
        for (got, want) in rates.iter().zip(want) {
            assert!((got - want).abs() < 1e-6, "{rates:?}");
        }
    }

    #[test]
    fn constant_after_the_warm_up() {
        let train = Train { lr: 2.0, warmup_steps: 4, ..Train::default() };
        let rates: Vec<f64> = (0..6).map(|step| learning_rate(&train, step)).collect();
        assert_eq!(rates, [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]);
    }
}
