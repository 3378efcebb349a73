//! Countdown: make a target from given numbers.

use super::generator::{Draft, Recipe};
use crate::verifiers::countdown::Goal;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;

/// Make the target from the numbers with `+`, `-`, `*`, `/` and brackets, each number exactly
/// once. Every problem has a solution. The verifier `countdown` judges it.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Countdown {
    /// How many numbers, 2 to 6. Default 3.
    pub numbers: usize,
    /// Largest number, 2 to 1000. Default 20. The smallest is 1.
    pub max_number: i64,
    /// Largest target, 10 to 1,000,000. Default 100. The smallest is 1.
    pub max_target: i64,
}

impl Default for Countdown {
    fn default() -> Self {
        Self { numbers: 3, max_number: 20, max_target: 100 }
    }
}

impl Recipe for Countdown {
    fn validate(&self) -> Result<(), String> {
        if !(2..=6).contains(&self.numbers) {
            return Err(format!("numbers = {} must be between 2 and 6", self.numbers));
        }
        if !(2..=1000).contains(&self.max_number) {
            return Err(format!("max_number = {} must be between 2 and 1000", self.max_number));
        }
        if !(10..=1_000_000).contains(&self.max_target) {
            let target = self.max_target;
            return Err(format!("max_target = {target} must be between 10 and 1000000"));
        }
        Ok(())
    }

    fn draw(&self, rng: &mut ChaCha8Rng) -> Draft {
        loop {
            let numbers: Vec<i64> =
                (0..self.numbers).map(|_| rng.random_range(1..=self.max_number)).collect();
            let target = combine(rng, numbers.clone());
            if (1..=self.max_target).contains(&target) {
                return draft(numbers, target);
            }
        }
    }

    /// Sorted tuples of numbers, the targets not counted: `(max + n - 1 over n)`.
    fn space(&self) -> u128 {
        let (n, max) = (self.numbers as u128, self.max_number as u128);
        (1..=n).fold(1, |ways, i| ways * (max + i - 1) / i)
    }
}

/// Joins two random numbers by a random operator until one is left. A division that leaves a
/// rest is not made; a subtraction is made the way round that is not negative.
fn combine(rng: &mut ChaCha8Rng, mut numbers: Vec<i64>) -> i64 {
    while numbers.len() > 1 {
        let a = numbers.swap_remove(rng.random_range(0..numbers.len()));
        let b = numbers.swap_remove(rng.random_range(0..numbers.len()));
        numbers.push(match rng.random_range(0..4) {
            0 => a.saturating_add(b),
            1 => (a - b).abs(),
            2 if b != 0 && a % b == 0 => a / b,
            _ => a.saturating_mul(b),
        });
    }
    numbers[0]
}

fn draft(numbers: Vec<i64>, target: i64) -> Draft {
    let list = numbers.iter().map(i64::to_string).collect::<Vec<_>>().join(", ");
    let question = format!(
        "Make {target} from the numbers {list}. Use each of them exactly once, with +, -, *, / \
         and brackets. Write the finished expression alone on the last line."
    );
    let mut sorted = numbers.clone();
    sorted.sort_unstable();
    let key = format!("{target}:{sorted:?}");
    Draft { question, answer: Goal { target, numbers }.to_string(), key }
}
