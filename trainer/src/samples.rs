//! Completions of a few fixed problems, written down before and after training.

use crate::{
    error::TrainError,
    rollout::{Rollout, RolloutSettings, generate},
    served::Served,
};
use onpolicy_plugin_api::Problem;
use std::{fmt::Write, fs, path::Path};

/// Samples an answer or two to each problem and writes them to `path`, for a person to read.
///
/// # Errors
/// As rollouts do, or what the file system refuses.
pub fn write(
    path: &Path,
    served: &Served,
    problems: &[Problem],
    settings: &RolloutSettings,
) -> Result<(), TrainError> {
    let version = served.engine.weight_version();
    let rollouts =
        generate(&*served.engine, &served.tokenizer, problems.to_vec(), settings, &mut || {})?;
    let mut text = format!(
        "# Completions at weight version {version}\n\nTemperature {}.\n",
        settings.temperature
    );
    rollouts.iter().for_each(|rollout| describe(rollout, &mut text));
    fs::write(path, text).map_err(|e| TrainError::file(path, e))
}

fn describe(rollout: &Rollout, text: &mut String) {
    let question = rollout.problem.messages.last().map_or("", |message| &message.content);
    let answer = &rollout.problem.answer;
    // Writing to a String cannot fail.
    let _ = write!(text, "\n## {question}\n\nReference answer: {answer}\n");
    for (index, completion) in rollout.texts.iter().enumerate() {
        let cut = if rollout.truncated(index) { " (cut off)" } else { "" };
        let quoted = completion.trim().replace('\n', "\n> ");
        let _ = write!(text, "\n{}.{cut}\n\n> {quoted}\n", index + 1);
    }
}
