//! Log-probs as OpenAI shows them, and the policy's statistics beside them.

use super::text::PlacedToken;
use crate::chat::ChatTokenizer;
use onpolicy_plugin_api::{PromptToken, Token};
use serde::{Serialize, Serializer};
use utoipa::ToSchema;

/// Stands for minus infinity, which JSON does not have.
const LOWEST: f32 = -9999.0;

/// A log-prob as JSON can have it.
pub(super) fn shown(logprob: f32) -> f32 {
    logprob.max(LOWEST)
}

/// Names tokens in log-probs.
#[derive(Clone)]
pub struct TokenNames {
    /// Knows the text of each token.
    pub tokenizer: ChatTokenizer,
    /// Write `token_id:7` in place of the text.
    pub as_ids: bool,
}

impl TokenNames {
    /// The name of a token.
    pub(super) fn name(&self, id: u32) -> String {
        if self.as_ids { format!("token_id:{id}") } else { self.tokenizer.token_text(id) }
    }
}

/// Log-probs of a text completion. The lists are aligned.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub struct TextLogprobs {
    /// The tokens' names.
    pub tokens: Vec<String>,
    /// Their log-probs, in nats; null for a prompt's first token.
    pub token_logprobs: Vec<Option<f32>>,
    /// Log-probs of the likeliest tokens and of the token itself, by name; null for a prompt's first
    /// token.
    #[schema(value_type = Vec<Option<HashMap<String, f32>>>)]
    pub top_logprobs: Vec<Option<NamedLogprobs>>,
    /// Where the token's text begins, in characters of the choice's text.
    pub text_offset: Vec<usize>,
}

impl TextLogprobs {
    /// Appends generated tokens, whose text begins `shift` characters into the choice's text.
    pub fn extend(&mut self, tokens: &[PlacedToken], names: &TokenNames, shift: usize) {
        for PlacedToken { token, offset } in tokens {
            let name = names.name(token.id);
            let own = (token.id, token.stats.logprob);
            self.top_logprobs.push(Some(top_map(own, &token.top, names)));
            self.tokens.push(name);
            self.token_logprobs.push(Some(shown(token.stats.logprob)));
            self.text_offset.push(shift + offset);
        }
    }

    /// Appends a prompt token and what is known of it.
    pub fn push_prompt(
        &mut self,
        id: u32,
        known: Option<&PromptToken>,
        offset: usize,
        names: &TokenNames,
    ) {
        let top = |token: &PromptToken| top_map((id, token.logprob), &token.top, names);
        self.tokens.push(names.name(id));
        self.token_logprobs.push(known.map(|token| shown(token.logprob)));
        self.top_logprobs.push(known.map(top));
        self.text_offset.push(offset);
    }
}

/// If two tokens have the same name, the likelier one stands, or the token itself.
fn top_map(own: (u32, f32), top: &[(u32, f32)], names: &TokenNames) -> NamedLogprobs {
    let name = names.name(own.0);
    let mut map: Vec<(String, f32)> = Vec::with_capacity(top.len() + 1);
    for (id, logprob) in top.iter().copied().chain([own]) {
        let other = names.name(id);
        let logprob = if other == name { own.1 } else { logprob };
        if map.iter().all(|(known, _)| *known != other) {
            map.push((other, shown(logprob)));
        }
    }
    NamedLogprobs(map)
}

/// Log-probs by token name, in this order. Not a `serde_json::Map`, whose numbers are `f64`: they
/// would differ in their last digits from the same log-prob elsewhere in the answer.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedLogprobs(Vec<(String, f32)>);

impl Serialize for NamedLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, logprob)| (name, logprob)))
    }
}

/// Log-probs of a chat message.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ChatLogprobs {
    /// One entry per token.
    pub content: Vec<ChatToken>,
}

/// A token of a chat message.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ChatToken {
    token: String,
    /// In nats.
    logprob: f32,
    /// The token's share of the text in UTF-8; perhaps not whole characters.
    bytes: Vec<u8>,
    /// The likeliest tokens at this position, likeliest first. Absent within this list.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(no_recursion)]
    top_logprobs: Option<Vec<ChatToken>>,
}

impl ChatToken {
    fn alone(id: u32, logprob: f32, names: &TokenNames) -> Self {
        let bytes = names.tokenizer.token_bytes(id);
        Self { token: names.name(id), logprob: shown(logprob), bytes, top_logprobs: None }
    }

    fn new(token: &Token, names: &TokenNames) -> Self {
        let top = token.top.iter().map(|(id, logprob)| Self::alone(*id, *logprob, names));
        let top_logprobs = Some(top.collect());
        Self { top_logprobs, ..Self::alone(token.id, token.stats.logprob, names) }
    }
}

impl ChatLogprobs {
    /// Those of generated tokens.
    pub fn new(tokens: &[PlacedToken], names: &TokenNames) -> Self {
        Self { content: tokens.iter().map(|p| ChatToken::new(&p.token, names)).collect() }
    }
}

/// Statistics of the distributions that the tokens were drawn from, aligned with the log-probs;
/// null for prompt tokens. See `onpolicy_plugin_api::TokenStats`. Without log-probs it is the weight
/// versions alone, aligned with the token ids.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub struct PolicyStats {
    /// Entropy, in nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entropy: Option<Vec<Option<f32>>>,
    /// Discriminator `S*`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discriminator: Option<Vec<Option<f32>>>,
    /// Baseline `E_p[S]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline: Option<Vec<Option<f32>>>,
    /// Version of the weights.
    pub weight_version: Vec<Option<u64>>,
}

impl PolicyStats {
    /// Those of generated tokens, after those of `prompt` prompt tokens.
    pub fn new(prompt: usize, tokens: &[PlacedToken]) -> Self {
        Self {
            entropy: Some(column(prompt, tokens, |t| t.stats.entropy)),
            discriminator: Some(column(prompt, tokens, |t| t.stats.discriminator())),
            baseline: Some(column(prompt, tokens, |t| t.stats.baseline)),
            ..Self::versions(prompt, tokens)
        }
    }

    /// The versions alone.
    pub fn versions(prompt: usize, tokens: &[PlacedToken]) -> Self {
        let weight_version = column(prompt, tokens, |t| t.weight_version);
        Self { weight_version, ..Self::default() }
    }
}

fn column<T: Clone>(
    prompt: usize,
    tokens: &[PlacedToken],
    of: impl Fn(&Token) -> T,
) -> Vec<Option<T>> {
    let values = tokens.iter().map(|placed| Some(of(&placed.token)));
    std::iter::repeat_n(None, prompt).chain(values).collect()
}
