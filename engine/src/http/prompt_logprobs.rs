//! Log-probs of a prompt as vLLM shows them.

use super::logprobs::{TokenNames, shown};
use onpolicy_plugin_api::PromptToken;
use serde::{Serialize, Serializer};
use utoipa::ToSchema;

/// One entry per prompt token: null for the first, which nothing predicts; then an object by token
/// id, of the token itself and the likeliest ones at its position.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[schema(value_type = Vec<Option<HashMap<String, Entry>>>)]
#[serde(transparent)]
pub struct PromptLogprobs(Vec<Option<Entries>>);

/// Entries by token id, in this order.
#[derive(Debug, Clone, PartialEq)]
struct Entries(Vec<(u32, Entry)>);

/// A token at a prompt's position.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[schema(as = PromptLogprob)]
struct Entry {
    /// In nats, at temperature 1.
    logprob: f32,
    /// The token's place among all, the likeliest being 1.
    rank: Option<usize>,
    decoded_token: String,
}

impl Serialize for Entries {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(id, entry)| (id, entry)))
    }
}

impl PromptLogprobs {
    /// Those of the prompt `ids`, whose tokens after the first are `tokens`, with `top` of the
    /// likeliest each.
    pub fn new(ids: &[u32], tokens: &[PromptToken], top: usize, names: &TokenNames) -> Self {
        let entries = ids.iter().skip(1).zip(tokens).map(|(id, token)| {
            let entry = |id: u32, logprob: f32, rank: Option<usize>| {
                let decoded_token = names.tokenizer.token_text(id);
                (id, Entry { logprob: shown(logprob), rank, decoded_token })
            };
            let own = entry(*id, token.logprob, token.rank);
            let likeliest = token.top.iter().take(top).zip(1..);
            let others = likeliest.filter(|((other, _), _)| other != id);
            let others = others.map(|(&(id, logprob), rank)| entry(id, logprob, Some(rank)));
            Some(Entries(std::iter::once(own).chain(others).collect()))
        });
        Self(ids.first().map(|_| None).into_iter().chain(entries).collect())
    }
}
