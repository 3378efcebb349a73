//! Judges by the whole text.

use super::right_or_wrong;
use onpolicy_plugin_api::{Attempt, Options, Score, Verifier};
use serde::Deserialize;

/// The verifier `exact`: right if the completion equals the answer, white space around either
/// aside.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Exact {
    /// Upper and lower case count as the same.
    pub ignore_case: bool,
}

impl Exact {
    /// Reads `ignore_case`.
    ///
    /// # Errors
    /// An unknown key or a wrong type.
    pub fn from_options(options: &Options) -> Result<Self, String> {
        options.parse()
    }
}

impl Verifier for Exact {
    fn verify(&self, attempts: &[Attempt<'_>]) -> Vec<Score> {
        let judge = |attempt: &Attempt<'_>| {
            let (given, wanted) = (attempt.completion.trim(), attempt.problem.answer.trim());
            let folded = || given.to_lowercase() == wanted.to_lowercase();
            right_or_wrong(given == wanted || (self.ignore_case && folded()))
        };
        attempts.iter().map(judge).collect()
    }
}
