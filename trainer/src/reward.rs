//! Samples become rewards.

use crate::{advantage::has_spread, rollout::Rollout};
use onpolicy_plugin_api::{Attempt, Score, Verifier};

/// A rollout with a reward for every sample.
#[derive(Debug, Clone)]
pub struct Scored {
    /// The samples.
    pub rollout: Rollout,
    /// One reward per sample.
    pub rewards: Vec<f32>,
}

impl Scored {
    /// True if the rewards differ, so that the group teaches something.
    pub fn is_mixed(&self) -> bool {
        has_spread(&self.rewards)
    }
}

/// Scores all rollouts with one call of the verifier. A group with a sample that could not be
/// judged is left out; the second number counts those groups.
pub fn score(verifier: &dyn Verifier, rollouts: Vec<Rollout>) -> (Vec<Scored>, usize) {
    let attempts: Vec<Attempt<'_>> = rollouts.iter().flat_map(attempts_of).collect();
    let mut scores = verifier.verify(&attempts).into_iter();
    let (mut scored, mut failed) = (Vec::new(), 0);
    for rollout in rollouts {
        // A verifier that answers too little has judged none of the rest.
        let of_group: Vec<Option<Score>> = rollout.texts.iter().map(|_| scores.next()).collect();
        match rewards(of_group) {
            Ok(rewards) => scored.push(Scored { rollout, rewards }),
            Err(reason) => {
                tracing::warn!(%reason, "a group could not be judged and is left out");
                failed += 1;
            }
        }
    }
    (scored, failed)
}

fn attempts_of(rollout: &Rollout) -> impl Iterator<Item = Attempt<'_>> {
    rollout.texts.iter().enumerate().map(|(index, completion)| Attempt {
        problem: &rollout.problem,
        completion,
        truncated: rollout.truncated(index),
    })
}

fn rewards(scores: Vec<Option<Score>>) -> Result<Vec<f32>, String> {
    let reward = |score| match score {
        Some(Score::Reward(reward)) if reward.is_finite() => Ok(reward),
        Some(Score::Reward(reward)) => Err(format!("the verifier gave a reward of {reward}")),
        Some(Score::Failed(error)) => Err(error.to_string()),
        None => Err("the verifier gave fewer scores than there are samples".to_string()),
    };
    scores.into_iter().map(reward).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use onpolicy_engine::collect::Sample;
    use onpolicy_plugin_api::{FinishReason, Message, Problem, VerifyError};

    /// Rewards the length of the text; fails on "fail"; says nothing on or after "quit".
    struct Length;

    impl Verifier for Length {
        fn verify(&self, attempts: &[Attempt<'_>]) -> Vec<Score> {
            let judged = attempts.iter().take_while(|attempt| attempt.completion != "quit");
            let score = |attempt: &Attempt<'_>| match attempt.completion {
                "fail" => Score::Failed(VerifyError("no".into())),
                "nan" => Score::Reward(f32::NAN),
                text => Score::Reward(text.len() as f32),
            };
            judged.map(score).collect()
        }
    }

    fn rollout(texts: &[&str]) -> Rollout {
        let sample = Sample { tokens: Vec::new(), finish: FinishReason::Stop };
        Rollout {
            problem: Problem { messages: vec![Message::user("?")], answer: String::new() },
            prompt: vec![1],
            samples: vec![sample; texts.len()],
            texts: texts.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn groups_that_cannot_be_judged_are_left_out_and_counted() {
        let groups = [
            rollout(&["a", "bb"]),
            rollout(&["a", "fail"]),
            rollout(&["nan", "c"]),
            rollout(&["ccc", "ccc"]),
            rollout(&["a", "quit"]),
            rollout(&["a", "b"]),
        ];
        let (scored, failed) = score(&Length, groups.into());
        assert_eq!(failed, 4);
        assert_eq!(scored[0].rewards, [1.0, 2.0]);
        assert_eq!(scored[1].rewards, [3.0, 3.0]);
        assert!(scored[0].is_mixed() && !scored[1].is_mixed());
    }
}
