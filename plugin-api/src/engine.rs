//! The engine: groups of samples in; tokens, their statistics and weight versions out.

use serde::{Deserialize, Serialize};

/// What a caller may need to know about the model behind an engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// The name that clients use for the model.
    pub name: String,
    /// Longest sequence (prompt and completion together), in tokens.
    pub max_model_len: usize,
    /// Number of token ids; every id is below it.
    pub vocab_size: usize,
    /// Tokens that end a sample unless `ignore_eos` is set.
    pub eos_token_ids: Vec<u32>,
    /// Most samples one request may ask for.
    pub max_samples: usize,
}

/// How the samples of a request are drawn.
///
/// The logits are divided by `temperature`, then `min_p`, `top_k` and `top_p` leave out tokens, in
/// this order; the sample and its statistics come from what is left.
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
    /// Report the log-prob of each prompt token after the first.
    pub prompt_logprobs: bool,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            n: 1,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: None,
            max_tokens: 16,
            min_tokens: 0,
            ignore_eos: false,
            stop_token_ids: Vec::new(),
            top_logprobs: 0,
            prompt_logprobs: false,
        }
    }
}

/// Most entries of [`SamplingParams::top_logprobs`].
pub const MAX_TOP_LOGPROBS: usize = 20;

impl SamplingParams {
    /// Checks ranges.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] naming the first field that is out of range.
    pub fn validate(&self) -> Result<(), EngineError> {
        let check = |ok: bool, field: &str, rule: &str| {
            if ok { Ok(()) } else { Err(EngineError::invalid(field, rule)) }
        };
        check(self.n >= 1, "n", "must be at least 1")?;
        check(
            self.temperature.is_finite() && (0.0..=100.0).contains(&self.temperature),
            "temperature",
            "must be between 0 and 100",
        )?;
        check(self.top_p > 0.0 && self.top_p <= 1.0, "top_p", "must be above 0 and at most 1")?;
        check((0.0..=1.0).contains(&self.min_p), "min_p", "must be between 0 and 1")?;
        check(self.max_tokens >= 1, "max_tokens", "must be at least 1")?;
        check(
            self.min_tokens <= self.max_tokens,
            "min_tokens",
            "must not be more than max_tokens",
        )?;
        check(self.top_logprobs <= MAX_TOP_LOGPROBS, "top_logprobs", "must be at most 20")
    }
}

/// One prompt and the group of samples wanted from it.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Token ids of the prompt; at least one.
    pub prompt: Vec<u32>,
    /// How to draw the samples.
    pub params: SamplingParams,
}

/// Names a submitted request, for [`Engine::abort`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// Numbers of one position's distribution `p`, the one that the token `k` was drawn from.
/// Source of the discriminator: arXiv 2602.03392.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct TokenStats {
    /// `ln p_k`, in nats.
    pub logprob: f32,
    /// Entropy `H = -sum_i p_i ln p_i`, in nats.
    pub entropy: f32,
    /// Baseline `E_p[S] = sum_i p_i S_i` of the scores `S_i = p_i (H + ln p_i)`.
    pub baseline: f32,
}

impl TokenStats {
    /// The discriminator `S* = p_k (H + ln p_k)`.
    pub fn discriminator(&self) -> f32 {
        self.logprob.exp() * (self.entropy + self.logprob)
    }
}

/// One generated token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Token {
    /// The token drawn.
    pub id: u32,
    /// Statistics of the distribution it was drawn from.
    pub stats: TokenStats,
    /// Version of the weights that produced the distribution.
    pub weight_version: u64,
    /// The likeliest tokens and their log-probs, likeliest first; as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// Why a sample ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-sequence or stop token; it is the last token of the sample.
    Stop,
    /// `max_tokens` or the model's length was reached.
    Length,
    /// Aborted by the caller.
    Abort,
}

/// What a request's sink receives. Every sample ends in exactly one `Finished`, or the whole
/// request in exactly one `Failed`.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Log-prob of each prompt token after the first; once, before any token, if asked for.
    Prompt { logprobs: Vec<f32> },
    /// A new token of sample `index`.
    Token { index: usize, token: Token },
    /// Sample `index` has ended.
    Finished { index: usize, reason: FinishReason },
    /// The request has ended without its samples.
    Failed { error: EngineError },
}

/// Where a request's events go. Called on the engine's thread, so it must not block.
pub trait Sink: Send {
    /// Takes one event; `false` says that nobody listens any more, which aborts the request.
    fn send(&mut self, event: Event) -> bool;
    /// True once nobody listens any more. Asked at every step, also while the request waits.
    fn is_closed(&self) -> bool;
}

/// Why an engine did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The request breaks a rule; nothing was started.
    #[error("{field}: {reason}")]
    Invalid { field: String, reason: String },
    /// Too many requests wait; try again later.
    #[error("the engine's queue is full ({waiting} requests wait); try again later")]
    Overloaded { waiting: usize },
    /// The engine is shutting down or has stopped.
    #[error("the engine is shutting down")]
    Stopped,
    /// The engine failed; the reason says how.
    #[error("engine failure: {0}")]
    Internal(String),
    /// This engine cannot do what was asked.
    #[error("not supported by this engine: {0}")]
    Unsupported(String),
}

impl EngineError {
    /// An [`EngineError::Invalid`] about one field.
    pub fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), reason: reason.into() }
    }
}

/// Serves groups of samples. The native engine is one; so is anything that can answer like it.
pub trait Engine: Send + Sync {
    /// The model behind the engine.
    fn info(&self) -> ModelInfo;

    /// Takes a request; its events go to `sink`, from another thread.
    ///
    /// # Errors
    /// The request is refused at once where it can be seen that it can never be served.
    fn submit(&self, request: Request, sink: Box<dyn Sink>) -> Result<RequestId, EngineError>;

    /// Takes several requests. An engine that can starts them in the same step, so that what is
    /// batched with what does not depend on timing.
    ///
    /// # Errors
    /// If one is refused, none of them is served.
    fn submit_all(
        &self,
        requests: Vec<(Request, Box<dyn Sink>)>,
    ) -> Result<Vec<RequestId>, EngineError> {
        let mut ids = Vec::with_capacity(requests.len());
        for (request, sink) in requests {
            match self.submit(request, sink) {
                Ok(id) => ids.push(id),
                Err(error) => {
                    ids.into_iter().for_each(|id| self.abort(id, None));
                    return Err(error);
                }
            }
        }
        Ok(ids)
    }

    /// Ends a request (`index` none) or one of its samples early, with [`FinishReason::Abort`].
    /// A request that has ended already is left alone.
    fn abort(&self, id: RequestId, index: Option<usize>);

    /// Version of the weights that the next step will use.
    fn weight_version(&self) -> u64;
}
