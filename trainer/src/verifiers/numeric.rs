//! Judges by a number in the text. See [`super::number`] for what counts as one.

use super::{
    failed,
    number::{self, Decimal},
    right_or_wrong,
};
use onpolicy_plugin_api::{Attempt, Options, Score, Verifier};
use serde::Deserialize;

/// Before the final answer in GSM8K's format.
const MARK: &str = "####";

/// The verifier `last_integer`: right if the last number of the completion is the integer that
/// the answer names. A last number with a fraction (`8.5`) is wrong, also if it ends in the
/// answer's digits; `8.0` is 8.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LastInteger {}

/// The verifier `gsm8k`: compares the first number after the last `####`, or the last number of
/// the completion if none follows such a mark, with the answer.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Gsm8k {}

impl LastInteger {
    /// Reads the options of the verifier: it has none.
    ///
    /// # Errors
    /// Any key.
    pub fn from_options(options: &Options) -> Result<Self, String> {
        options.parse()
    }
}

impl Gsm8k {
    /// Reads the options of the verifier: it has none.
    ///
    /// # Errors
    /// Any key.
    pub fn from_options(options: &Options) -> Result<Self, String> {
        options.parse()
    }
}

impl Verifier for LastInteger {
    fn verify(&self, attempts: &[Attempt<'_>]) -> Vec<Score> {
        let judge = |attempt: &Attempt<'_>| {
            let answer = &attempt.problem.answer;
            match number::parse(answer) {
                Some(wanted) if wanted.is_integer() => {
                    right_or_wrong(number::numbers(attempt.completion).last() == Some(wanted))
                }
                _ => failed(format!("the reference answer '{answer}' is not an integer")),
            }
        };
        attempts.iter().map(judge).collect()
    }
}

impl Verifier for Gsm8k {
    fn verify(&self, attempts: &[Attempt<'_>]) -> Vec<Score> {
        let judge = |attempt: &Attempt<'_>| {
            let answer = &attempt.problem.answer;
            match number::parse(answer) {
                Some(wanted) => right_or_wrong(gsm8k_answer(attempt.completion) == Some(wanted)),
                None => failed(format!("the reference answer '{answer}' is not a number")),
            }
        };
        attempts.iter().map(judge).collect()
    }
}

fn gsm8k_answer(text: &str) -> Option<Decimal> {
    let marked = text.rsplit_once(MARK).and_then(|(_, after)| number::numbers(after).next());
    marked.or_else(|| number::numbers(text).last())
}
