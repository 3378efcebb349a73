//! Verifiers: problem and completion in, reward out.

use crate::task::Problem;

/// One completion to be judged.
#[derive(Debug, Clone, Copy)]
pub struct Attempt<'a> {
    /// The problem it answers.
    pub problem: &'a Problem,
    /// The text of the completion, special tokens left out.
    pub completion: &'a str,
    /// True if it was cut off by the token limit.
    pub truncated: bool,
}

/// The verdict on one completion.
#[derive(Debug, Clone, PartialEq)]
pub enum Score {
    /// Its reward; 1 is right and 0 is wrong unless the verifier says otherwise.
    Reward(f32),
    /// It could not be judged. Its whole group is left out of the step, and counted.
    Failed(VerifyError),
}

/// Why a completion could not be judged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct VerifyError(pub String);

/// Judges completions. May block (it is called off the engine's thread) but must return: a
/// verifier that calls out has a time limit of its own.
pub trait Verifier: Send + Sync {
    /// One score per attempt, in order.
    fn verify(&self, attempts: &[Attempt<'_>]) -> Vec<Score>;
}
