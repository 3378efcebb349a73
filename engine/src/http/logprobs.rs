//! Log-probs as OpenAI shows them, and the policy's statistics beside them.

use super::text::PlacedToken;
use crate::chat::ChatTokenizer;
use onpolicy_plugin_api::Token;
use serde::{Serialize, Serializer};
use utoipa::ToSchema;

/// Stands for minus infinity, which JSON does not have.
const LOWEST: f32 = -9999.0;

/// Names tokens in log-probs.
#[derive(Clone)]
pub struct TokenNames {
    /// Knows the text of each token.
    pub tokenizer: ChatTokenizer,
    /// Write `token_id:7` in place of the text.
    pub as_ids: bool,
}

impl TokenNames {
    fn name(&self, id: u32) -> String {
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
    /// Log-probs of the likeliest tokens and of the token itself, by name; null within a prompt.
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
            self.top_logprobs.push(Some(top_map(token, &name, names)));
            self.tokens.push(name);
            self.token_logprobs.push(Some(token.stats.logprob.max(LOWEST)));
            self.text_offset.push(shift + offset);
        }
    }

    /// Appends a prompt token.
    pub fn push_prompt(
        &mut self,
        id: u32,
        logprob: Option<f32>,
        offset: usize,
        names: &TokenNames,
    ) {
        self.tokens.push(names.name(id));
        self.token_logprobs.push(logprob.map(|l| l.max(LOWEST)));
        self.top_logprobs.push(None);
        self.text_offset.push(offset);
    }
}

/// If two tokens have the same name, the likelier one stands, or the token itself.
fn top_map(token: &Token, name: &str, names: &TokenNames) -> NamedLogprobs {
    let mut map: Vec<(String, f32)> = Vec::with_capacity(token.top.len() + 1);
    let own = (token.id, token.stats.logprob);
    for (id, logprob) in token.top.iter().copied().chain([own]) {
        let other = names.name(id);
        let logprob = if other == name { token.stats.logprob } else { logprob };
        if map.iter().all(|(known, _)| *known != other) {
            map.push((other, logprob.max(LOWEST)));
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
        Self { token: names.name(id), logprob: logprob.max(LOWEST), bytes, top_logprobs: None }
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
/// null for prompt tokens. See `onpolicy_plugin_api::TokenStats`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub struct PolicyStats {
    /// Entropy, in nats.
    pub entropy: Vec<Option<f32>>,
    /// Discriminator `S*`.
    pub discriminator: Vec<Option<f32>>,
    /// Baseline `E_p[S]`.
    pub baseline: Vec<Option<f32>>,
    /// Version of the weights.
    pub weight_version: Vec<Option<u64>>,
}

impl PolicyStats {
    /// Those of generated tokens, after those of `prompt` prompt tokens.
    pub fn new(prompt: usize, tokens: &[PlacedToken]) -> Self {
        fn column<T: Clone>(
            prompt: usize,
            tokens: &[PlacedToken],
            of: impl Fn(&Token) -> T,
        ) -> Vec<Option<T>> {
            let values = tokens.iter().map(|placed| Some(of(&placed.token)));
            std::iter::repeat_n(None, prompt).chain(values).collect()
        }
        Self {
            entropy: column(prompt, tokens, |t| t.stats.entropy),
            discriminator: column(prompt, tokens, |t| t.stats.discriminator()),
            baseline: column(prompt, tokens, |t| t.stats.baseline),
            weight_version: column(prompt, tokens, |t| t.weight_version),
        }
    }
}
