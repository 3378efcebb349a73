//! The two APIs: what differs between a server of vLLM's kind and one of SGLang's.

use super::{sglang, vllm};
use crate::collect::Sample;
use onpolicy_plugin_api::{EngineError, LogprobsMode, PauseMode, PromptToken, Request};
use serde_json::Value;
use std::{fmt, path::Path};

/// Which API a server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    Vllm,
    Sglang,
}

/// A POST to a control route.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Call {
    pub path: String,
    pub body: Option<Value>,
}

impl Call {
    /// A POST without a body.
    pub fn bare(path: impl Into<String>) -> Self {
        Self { path: path.into(), body: None }
    }

    /// A POST of JSON.
    pub fn json(path: impl Into<String>, body: Value) -> Self {
        Self { path: path.into(), body: Some(body) }
    }
}

/// What a server generated.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Answer {
    /// Each prompt token after the first, if they were asked for.
    pub prompt: Option<Vec<PromptToken>>,
    /// One for each sample asked for, in order.
    pub samples: Vec<Sample>,
    /// The version of the weights, as the server tells it.
    pub told: Option<String>,
}

impl Dialect {
    /// Whether what a request asks for can be asked of a server.
    ///
    /// # Errors
    /// Names what cannot.
    pub fn check(self, request: &Request) -> Result<(), EngineError> {
        let params = &request.params;
        if params.logprobs_mode == LogprobsMode::Raw {
            return Err(unsupported("logprobs_mode = raw (it is the server's own setting)"));
        }
        if !params.bad_words.is_empty() {
            return Err(unsupported("bad_words as tokens"));
        }
        match self {
            Self::Vllm => vllm::check(params),
            Self::Sglang => sglang::check(params),
        }
    }

    /// Path and body of a request for samples.
    pub fn generate(self, request: &Request, model: &str) -> (&'static str, Value) {
        match self {
            Self::Vllm => (vllm::GENERATE, vllm::body(request, model)),
            Self::Sglang => (sglang::GENERATE, sglang::body(request)),
        }
    }

    /// Reads an answer. Tokens of which the server does not tell the version get `version`.
    ///
    /// # Errors
    /// Says what is missing or does not fit the request.
    pub fn parse(self, text: &[u8], request: &Request, version: u64) -> Result<Answer, String> {
        let answer = match self {
            Self::Vllm => vllm::parse(text, request, version)?,
            Self::Sglang => sglang::parse(text, request, version)?,
        };
        let (given, wanted) = (answer.samples.len(), request.params.n);
        if given != wanted {
            return Err(format!("{given} samples where {wanted} were asked for"));
        }
        Ok(answer)
    }

    /// Stops the server's samples.
    pub fn pause(self, mode: PauseMode, clear_cache: bool) -> Call {
        match self {
            Self::Vllm => vllm::pause(mode, clear_cache),
            Self::Sglang => sglang::pause(mode),
        }
    }

    /// Lets them go on.
    pub fn resume(self) -> Call {
        match self {
            Self::Vllm => Call::bare("/resume"),
            Self::Sglang => Call::json("/continue_generation", serde_json::json!({})),
        }
    }

    /// Forgets the KV of earlier requests; the routes are tried in this order. A vLLM that is not
    /// told to take running requests' KV away does nothing while there are any.
    pub fn reset_cache(self) -> Vec<Call> {
        let path = "/reset_prefix_cache";
        match self {
            Self::Vllm => {
                let all = format!("{path}?reset_running_requests=true");
                vec![Call::bare(all), Call::bare(path)]
            }
            Self::Sglang => vec![Call::bare("/flush_cache")],
        }
    }

    /// Loads weights from a directory; the routes are tried in this order.
    pub fn load(self, dir: &Path, version: u64) -> Vec<Call> {
        match self {
            Self::Vllm => vllm::load(dir),
            Self::Sglang => sglang::load(dir, version),
        }
    }

    /// Names the weights; the routes are tried in this order.
    pub fn name_weights(self, version: u64) -> Vec<Call> {
        match self {
            Self::Vllm => vllm::name_weights(version),
            Self::Sglang => sglang::name_weights(version),
        }
    }

    /// Routes that tell the version; the first that there is counts.
    pub fn version_paths(self) -> &'static [&'static str] {
        match self {
            Self::Vllm => &["/weight_info"],
            Self::Sglang => &["/weight_version", "/get_weight_version"],
        }
    }

    /// Whether the server itself can wait for its samples before it pauses.
    pub fn drains(self) -> bool {
        self == Self::Vllm
    }
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vllm => "vLLM",
            Self::Sglang => "SGLang",
        })
    }
}

pub(super) fn unsupported(what: &str) -> EngineError {
    EngineError::unsupported(format!("{what}, over a remote server"))
}

/// Likeliest first, at most `count`.
pub(super) fn likeliest(mut top: Vec<(u32, f32)>, count: usize) -> Vec<(u32, f32)> {
    top.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    top.truncate(count);
    top
}

/// A version as text, however the server writes it.
pub(super) fn told(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}
