//! The built-in verifiers: reward 1 for a right answer, 0 for a wrong one.
//!
//! - [`numeric`]: the last integer; GSM8K's answer.
//! - [`exact`]: the whole text.
//! - [`boxed`]: what stands in `\boxed{...}`.
//! - [`countdown`]: an expression that reaches a target.
//! - [`http`]: an external verifier.
//! - [`judge`]: a second model, frozen, that grades.
//! - [`number`], [`rational`]: how numbers are found in text and compared.

pub mod boxed;
pub mod countdown;
pub mod exact;
pub mod http;
pub mod judge;
pub mod number;
pub mod numeric;
pub mod rational;

use onpolicy_plugin_api::{Score, VerifyError};

/// 1 for a right answer, 0 for a wrong one.
fn right_or_wrong(right: bool) -> Score {
    Score::Reward(if right { 1.0 } else { 0.0 })
}

fn failed(reason: impl Into<String>) -> Score {
    Score::Failed(VerifyError(reason.into()))
}
