//! A verifier: the answer has to be there, and in few words.

use onpolicy_plugin_api::{Attempt, Score, Verifier};
use serde::Deserialize;

/// Rewards an attempt that names the answer: 1 within `words` words, less the longer it is.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Brief {
    /// Words that cost nothing.
    words: usize,
}

impl Verifier for Brief {
    fn verify(&self, attempts: &[Attempt<'_>]) -> Vec<Score> {
        attempts.iter().map(|attempt| Score::Reward(self.reward(attempt))).collect()
    }
}

impl Brief {
    fn reward(&self, attempt: &Attempt<'_>) -> f32 {
        let words: Vec<&str> = attempt.completion.split_whitespace().collect();
        let named = words.iter().any(|word| word.trim_matches('.') == attempt.problem.answer);
        if named { self.words as f32 / words.len().max(self.words) as f32 } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use onpolicy_plugin_api::{Message, Problem};

    #[test]
    fn long_answers_are_worth_less() {
        let messages = vec![Message::user("What is 2+3?")];
        let problem = Problem { messages, answer: "5".into() };
        let reward = |completion| {
            let attempt = Attempt { problem: &problem, completion, truncated: false };
            Brief { words: 3 }.reward(&attempt)
        };
        assert_eq!(reward("It is 5."), 1.0);
        assert_eq!(reward("I think that it is 5"), 0.5);
        assert_eq!(reward("It is 6."), 0.0);
    }
}
