//! Sums, products and chains of random numbers.

use super::generator::{Draft, Recipe};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;

/// `What is 3+5?`: the sum of `terms` numbers of at most `digits` digits each.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sum {
    /// Most digits of a number, 1 to 9. Default 1.
    pub digits: u32,
    /// How many numbers, 2 to 16. Default 2.
    pub terms: u32,
}

/// `What is 3*5?`: the product of `terms` numbers of at most `digits` digits each.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Product {
    /// Most digits of a number, 1 to 9. Default 1.
    pub digits: u32,
    /// How many numbers, 2 to 4. Default 2.
    pub terms: u32,
}

/// `What is 3+5-4?`: numbers joined by plus and minus at random. The answer may be negative.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Chain {
    /// Most digits of a number, 1 to 9. Default 1.
    pub digits: u32,
    /// How many numbers, 2 to 16. Default 3.
    pub terms: u32,
}

impl Default for Sum {
    fn default() -> Self {
        Self { digits: 1, terms: 2 }
    }
}

impl Default for Product {
    fn default() -> Self {
        Self { digits: 1, terms: 2 }
    }
}

impl Default for Chain {
    fn default() -> Self {
        Self { digits: 1, terms: 3 }
    }
}

impl Recipe for Sum {
    fn validate(&self) -> Result<(), String> {
        check(self.digits, self.terms, 16)
    }

    fn draw(&self, rng: &mut ChaCha8Rng) -> Draft {
        let numbers = numbers(rng, self.digits, self.terms);
        let answer = numbers.iter().sum::<i128>();
        commutative(numbers, "+", answer)
    }

    fn space(&self) -> u128 {
        space(self.digits, self.terms)
    }
}

impl Recipe for Product {
    fn validate(&self) -> Result<(), String> {
        check(self.digits, self.terms, 4)
    }

    fn draw(&self, rng: &mut ChaCha8Rng) -> Draft {
        let numbers = numbers(rng, self.digits, self.terms);
        let answer = numbers.iter().product::<i128>();
        commutative(numbers, "*", answer)
    }

    fn space(&self) -> u128 {
        space(self.digits, self.terms)
    }
}

impl Recipe for Chain {
    fn validate(&self) -> Result<(), String> {
        check(self.digits, self.terms, 16)
    }

    fn draw(&self, rng: &mut ChaCha8Rng) -> Draft {
        let numbers = numbers(rng, self.digits, self.terms);
        let mut chain = numbers[0].to_string();
        let mut answer = numbers[0];
        for number in &numbers[1..] {
            let minus = rng.random::<bool>();
            chain += &format!("{}{number}", if minus { '-' } else { '+' });
            answer += if minus { -number } else { *number };
        }
        Draft { question: question(&chain), answer: answer.to_string(), key: chain }
    }

    fn space(&self) -> u128 {
        space(self.digits, self.terms) << (self.terms - 1)
    }
}

fn check(digits: u32, terms: u32, most_terms: u32) -> Result<(), String> {
    if !(1..=9).contains(&digits) {
        return Err(format!("digits = {digits} must be between 1 and 9"));
    }
    if !(2..=most_terms).contains(&terms) {
        return Err(format!("terms = {terms} must be between 2 and {most_terms}"));
    }
    Ok(())
}

fn numbers(rng: &mut ChaCha8Rng, digits: u32, terms: u32) -> Vec<i128> {
    let end = 10_u64.pow(digits);
    (0..terms).map(|_| rng.random_range(0..end).into()).collect()
}

/// How many ways there are to write down the numbers; at most 10^144 is asked for, so it
/// saturates.
fn space(digits: u32, terms: u32) -> u128 {
    10_u128.saturating_pow(digits.saturating_mul(terms).min(36))
}

fn question(formula: &str) -> String {
    format!("What is {formula}?")
}

/// A problem whose numbers may change places.
fn commutative(mut numbers: Vec<i128>, operator: &str, answer: i128) -> Draft {
    let join =
        |numbers: &[i128]| numbers.iter().map(i128::to_string).collect::<Vec<_>>().join(operator);
    let question = question(&join(&numbers));
    numbers.sort_unstable();
    Draft { question, answer: answer.to_string(), key: join(&numbers) }
}
