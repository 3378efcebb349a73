//! How the samples of a request are drawn.

use crate::engine::EngineError;
use serde::{Deserialize, Serialize};

/// Most entries of [`SamplingParams::top_logprobs`] and [`SamplingParams::prompt_logprobs`].
pub const MAX_TOP_LOGPROBS: usize = 20;

/// How the samples of a request are drawn.
///
/// The logits are changed in this order: penalties, `logit_bias`, what may not be drawn
/// (`allowed_token_ids`, `bad_words`, `grammar`, `min_tokens`), division by `temperature`, then
/// `min_p`, `top_k` and `top_p` leave out tokens. The sample comes from what is left.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingParams {
    /// Samples per prompt. They share the prompt's KV blocks.
    pub n: usize,
    /// 0 is greedy; the statistics of a greedy token are those at temperature 1.
    pub temperature: f32,
    /// Keep the likeliest `top_k` tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set of likeliest tokens whose probability reaches `top_p`; 1 keeps all.
    pub top_p: f32,
    /// Leave out tokens less likely than `min_p` times the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Logits of tokens of the prompt and of the sample so far are divided by this if positive,
    /// multiplied if negative; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Taken off the logits of tokens that the sample has so far.
    pub presence_penalty: f32,
    /// Taken off the logits of tokens as often as the sample has them so far.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens; ids are distinct.
    pub logit_bias: Vec<(u32, f32)>,
    /// Nothing but these tokens may be drawn.
    pub allowed_token_ids: Option<Vec<u32>>,
    /// Sequences of tokens that a sample never completes.
    pub bad_words: Vec<Vec<u32>>,
    /// What the sample's text must be.
    pub grammar: Option<Grammar>,
    /// Same seed, same weights, same tokens, whatever else is in the batch. Sample `i` of a
    /// request draws from its own stream of the seed.
    pub seed: Option<u64>,
    /// Most new tokens per sample.
    pub max_tokens: usize,
    /// No end-of-sequence or stop token is drawn before this many new tokens.
    pub min_tokens: usize,
    /// Go on past end-of-sequence tokens.
    pub ignore_eos: bool,
    /// More tokens that end a sample.
    pub stop_token_ids: Vec<u32>,
    /// Report this many of the likeliest tokens at each position.
    pub top_logprobs: usize,
    /// Report the log-prob of each prompt token after the first, and this many of the likeliest
    /// tokens there.
    pub prompt_logprobs: Option<usize>,
    /// Which distribution log-probs and statistics are those of.
    pub logprobs_mode: LogprobsMode,
}

/// The distribution that log-probs and statistics are those of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogprobsMode {
    /// The one that the token was drawn from.
    #[default]
    Processed,
    /// The model's own, before penalties, masks, temperature and truncation.
    Raw,
}

/// What the text of a sample must be. A sample ends once nothing may follow.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON that this JSON schema allows.
    JsonSchema(serde_json::Value),
    /// A text that this regular expression matches as a whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A context-free grammar in Lark's notation.
    Lark(String),
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            n: 1,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            allowed_token_ids: None,
            bad_words: Vec::new(),
            grammar: None,
            seed: None,
            max_tokens: 16,
            min_tokens: 0,
            ignore_eos: false,
            stop_token_ids: Vec::new(),
            top_logprobs: 0,
            prompt_logprobs: None,
            logprobs_mode: LogprobsMode::Processed,
        }
    }
}

impl SamplingParams {
    /// Checks ranges.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] naming the first field that is out of range.
    pub fn validate(&self) -> Result<(), EngineError> {
        let check = |ok: bool, field: &str, rule: &str| {
            if ok { Ok(()) } else { Err(EngineError::invalid(field, rule)) }
        };
        let penalty = |x: f32| (-2.0..=2.0).contains(&x);
        check(self.n >= 1, "n", "must be at least 1")?;
        check(
            self.temperature.is_finite() && (0.0..=100.0).contains(&self.temperature),
            "temperature",
            "must be between 0 and 100",
        )?;
        check(self.top_p > 0.0 && self.top_p <= 1.0, "top_p", "must be above 0 and at most 1")?;
        check((0.0..=1.0).contains(&self.min_p), "min_p", "must be between 0 and 1")?;
        check(
            self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0,
            "repetition_penalty",
            "must be above 0",
        )?;
        check(penalty(self.presence_penalty), "presence_penalty", "must be between -2 and 2")?;
        check(penalty(self.frequency_penalty), "frequency_penalty", "must be between -2 and 2")?;
        check(
            self.logit_bias.iter().all(|(_, bias)| bias.is_finite()),
            "logit_bias",
            "must be finite numbers",
        )?;
        check(
            self.allowed_token_ids.as_ref().is_none_or(|ids| !ids.is_empty()),
            "allowed_token_ids",
            "must hold at least one token",
        )?;
        check(
            self.bad_words.iter().all(|word| !word.is_empty()),
            "bad_words",
            "must not hold an empty word",
        )?;
        check(self.max_tokens >= 1, "max_tokens", "must be at least 1")?;
        check(
            self.min_tokens <= self.max_tokens,
            "min_tokens",
            "must not be more than max_tokens",
        )?;
        check(self.top_logprobs <= MAX_TOP_LOGPROBS, "top_logprobs", "must be at most 20")?;
        check(
            self.prompt_logprobs.unwrap_or(0) <= MAX_TOP_LOGPROBS,
            "prompt_logprobs",
            "must be at most 20",
        )
    }
}
