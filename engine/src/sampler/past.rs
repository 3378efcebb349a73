//! What a draw knows of the tokens before it.

use std::sync::Arc;

/// The tokens before a draw, as far as its parameters ask for them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Past<'a> {
    /// The tokens of the sample so far.
    pub tokens: &'a [u32],
    /// The same and the prompt's, counted. Penalties need them.
    pub counts: Option<&'a Counts>,
}

/// How often the tokens of a prompt and of a sample of it occur, kept token by token.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Counts {
    /// The prompt's tokens, ascending, each once. All samples of the prompt share them.
    prompt: Arc<[u32]>,
    /// The sample's tokens, ascending, and how often it has them.
    sample: Vec<(u32, u32)>,
}

impl Counts {
    /// Those of a sample without tokens.
    pub fn new(prompt: &[u32]) -> Self {
        let mut distinct = prompt.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        Self { prompt: distinct.into(), sample: Vec::new() }
    }

    /// Counts the sample's next token.
    pub fn push(&mut self, token: u32) {
        match self.sample.binary_search_by_key(&token, |&(id, _)| id) {
            Ok(at) => self.sample[at].1 += 1,
            Err(at) => self.sample.insert(at, (token, 1)),
        }
    }

    /// The sample's tokens and how often it has them.
    pub fn sample(&self) -> &[(u32, u32)] {
        &self.sample
    }

    /// Every token of prompt or sample, once.
    pub fn distinct(&self) -> impl Iterator<Item = u32> {
        let only_sampled = self
            .sample
            .iter()
            .map(|&(id, _)| id)
            .filter(|id| self.prompt.binary_search(id).is_err());
        self.prompt.iter().copied().chain(only_sampled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_counted_one_by_one() {
        let mut counts = Counts::new(&[9, 4, 9, 2]);
        let shared = counts.clone();
        for token in [7, 4, 7, 1, 7] {
            counts.push(token);
        }
        assert_eq!(counts.sample(), [(1, 1), (4, 1), (7, 3)]);
        assert_eq!(counts.distinct().collect::<Vec<_>>(), [2, 4, 9, 1, 7]);
        assert_eq!(shared.sample(), []);
        assert_eq!(shared.distinct().collect::<Vec<_>>(), [2, 4, 9]);
        assert!(Arc::ptr_eq(&counts.prompt, &shared.prompt), "a prompt is kept once");
    }
}
