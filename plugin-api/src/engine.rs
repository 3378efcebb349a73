//! The engine: groups of samples in; tokens, their statistics and weight versions out.

use crate::{
    control::{Memory, PauseMode, Sleep, WeightUpdate},
    sampling::SamplingParams,
};
use serde::{Deserialize, Deserializer, Serialize};

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

/// One prompt and the group of samples wanted from it.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Token ids of the prompt; at least one.
    pub prompt: Vec<u32>,
    /// How to draw the samples.
    pub params: SamplingParams,
    /// Requests of lower numbers begin before waiting ones of higher numbers.
    pub priority: i32,
    /// KV is shared only with requests of the same salt.
    pub cache_salt: Option<String>,
}

impl Request {
    /// A request of priority 0 without a salt.
    pub fn new(prompt: Vec<u32>, params: SamplingParams) -> Self {
        Self { prompt, params, priority: 0, cache_salt: None }
    }
}

/// Names a submitted request, for [`Engine::abort`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// Numbers of one position's distribution `p`, the one that the token `k` was drawn from.
/// An engine that cannot tell entropy and baseline gives NaN, which JSON writes as null.
/// Source of the discriminator: arXiv 2602.03392.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct TokenStats {
    /// `ln p_k`, in nats.
    pub logprob: f32,
    /// Entropy `H = -sum_i p_i ln p_i`, in nats; NaN if the engine does not tell it.
    #[serde(deserialize_with = "number_or_nan")]
    pub entropy: f32,
    /// Baseline `E_p[S] = sum_i p_i S_i` of the scores `S_i = p_i (H + ln p_i)`; NaN if the engine
    /// does not tell it.
    #[serde(deserialize_with = "number_or_nan")]
    pub baseline: f32,
}

fn number_or_nan<'de, D: Deserializer<'de>>(from: D) -> Result<f32, D::Error> {
    Option::<f32>::deserialize(from).map(|number| number.unwrap_or(f32::NAN))
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

/// What the model thought of one prompt token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PromptToken {
    /// Its log-prob at temperature 1, in nats.
    pub logprob: f32,
    /// Its place among all tokens, the likeliest being 1; only where the likeliest tokens are asked
    /// for.
    pub rank: Option<usize>,
    /// The likeliest tokens at its position and their log-probs, likeliest first.
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
    /// Each prompt token after the first; once, before any token, if their log-probs are asked for.
    Prompt { tokens: Vec<PromptToken> },
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
    /// The engine is in a state in which it cannot do this; the reason says what to do first.
    #[error("not now: {0}")]
    Unavailable(String),
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

    /// An [`EngineError::Unavailable`]: `why` says what to do first.
    pub fn unavailable(why: impl Into<String>) -> Self {
        Self::Unavailable(why.into())
    }

    /// An [`EngineError::Unsupported`]: `what` is what the engine cannot do.
    pub fn unsupported(what: impl Into<String>) -> Self {
        Self::Unsupported(what.into())
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

    /// True if the engine serves the storage that the trainer writes, so that it takes
    /// [`WeightUpdate::InPlace`] and its log-probs are the trainer's.
    fn shares_weights(&self) -> bool {
        false
    }

    /// Changes the weights; blocks until they are in force. The version becomes `version`, or goes
    /// up by one, and KV of older weights is not used by new requests. Returns the version.
    ///
    /// # Errors
    /// The weights do not fit the model or cannot be read; nothing has changed then.
    fn update_weights(
        &self,
        _update: WeightUpdate,
        _version: Option<u64>,
    ) -> Result<u64, EngineError> {
        Err(EngineError::unsupported("changing its weights"))
    }

    /// Names the weights that it has; blocks until done.
    ///
    /// # Errors
    /// The engine has no versions, or has stopped.
    fn set_weight_version(&self, _version: u64) -> Result<(), EngineError> {
        Err(EngineError::unsupported("naming its weights"))
    }

    /// A checksum of each weight, by name.
    ///
    /// # Errors
    /// The engine cannot read its weights, or has stopped.
    fn checksums(&self) -> Result<Vec<(String, u64)>, EngineError> {
        Err(EngineError::unsupported("checksums of its weights"))
    }

    /// Overwrites all weights with random numbers, so that whatever an update leaves out shows; the
    /// engine does not generate until all of them are loaded.
    ///
    /// # Errors
    /// The engine cannot, or has stopped.
    fn reset_weights(&self) -> Result<(), EngineError> {
        Err(EngineError::unsupported("resetting its weights"))
    }

    /// Returns once the engine has answered between two steps.
    ///
    /// # Errors
    /// The engine has stopped.
    fn ping(&self) -> Result<(), EngineError> {
        Ok(())
    }

    /// Takes no more steps until [`Engine::resume`]; requests are taken and wait. Blocks until
    /// no step is under way. `clear_cache` forgets the KV of earlier requests.
    ///
    /// # Errors
    /// The engine cannot pause, or has stopped.
    fn pause(&self, _mode: PauseMode, _clear_cache: bool) -> Result<(), EngineError> {
        Err(EngineError::unsupported("pausing"))
    }

    /// Goes on after [`Engine::pause`].
    ///
    /// # Errors
    /// The engine cannot pause, or has stopped.
    fn resume(&self) -> Result<(), EngineError> {
        Err(EngineError::unsupported("pausing"))
    }

    /// Whether it is paused.
    fn is_paused(&self) -> bool {
        false
    }

    /// Ends all requests with [`FinishReason::Abort`]; blocks until done.
    ///
    /// # Errors
    /// The engine cannot, or has stopped.
    fn abort_all(&self) -> Result<(), EngineError> {
        Err(EngineError::unsupported("aborting all requests"))
    }

    /// Forgets the KV of earlier requests; running ones keep theirs.
    ///
    /// # Errors
    /// The engine cannot, or has stopped.
    fn reset_prefix_cache(&self) -> Result<(), EngineError> {
        Err(EngineError::unsupported("resetting the prefix cache"))
    }

    /// Gives memory back to the system until [`Engine::wake_up`]. What runs is aborted; requests
    /// are refused meanwhile.
    ///
    /// # Errors
    /// The engine cannot sleep so deep, or has stopped.
    fn sleep(&self, _depth: Sleep) -> Result<(), EngineError> {
        Err(EngineError::unsupported("sleeping"))
    }

    /// Takes memory again; once it has all of it, it serves.
    ///
    /// # Errors
    /// The engine cannot sleep, or has stopped.
    fn wake_up(&self, _memory: &[Memory]) -> Result<(), EngineError> {
        Err(EngineError::unsupported("sleeping"))
    }

    /// Whether it sleeps.
    fn is_sleeping(&self) -> bool {
        false
    }
}
