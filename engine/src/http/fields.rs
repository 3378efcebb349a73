//! The request fields that both generating routes have.

use super::text::TextRules;
use super::{
    AppState, Limits, body::Fields, error::ApiError, neutral, sampling, structured,
    structured::Structured,
};
use axum::http::StatusCode;
use onpolicy_plugin_api::sampling::MAX_TOP_LOGPROBS;
use onpolicy_plugin_api::{ModelInfo, Request, SamplingParams};
use serde_json::Value;
use std::sync::Arc;

/// Longest stop string, in bytes.
const MAX_STOP_BYTES: usize = 1024;
/// Longest `cache_salt`, in bytes.
const MAX_SALT_BYTES: usize = 1024;
/// Longest `request_id`, in bytes.
const MAX_ID_BYTES: usize = 128;

/// How many of a prompt's last tokens are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Truncation {
    /// This many.
    Tokens(usize),
    /// As many as leave room for `max_tokens` (for one, if that is not given).
    ToFit,
}

/// What is asked for, apart from the prompt, on both generating routes.
#[derive(Debug, Clone, PartialEq)]
pub struct Common {
    /// How to sample. `max_tokens` is a placeholder until the prompt's length is known.
    pub params: SamplingParams,
    /// How many of the likeliest tokens are shown beside each prompt token, if these are wanted.
    pub prompt_logprobs: Option<usize>,
    /// Keep the last tokens of the prompt.
    pub truncate: Option<Truncation>,
    /// See [`Request::priority`].
    pub priority: i32,
    /// See [`Request::cache_salt`].
    pub cache_salt: Option<String>,
    /// What the text must be; `params` does not have it yet.
    pub structured: Option<Structured>,
    /// The field's value, if it was given.
    pub max_tokens: Option<usize>,
    /// Strings that end a sample.
    pub stop: Vec<String>,
    /// Leave the stop string, or the text of a stop token, in the text.
    pub include_stop: bool,
    /// Leave special tokens out of the text.
    pub skip_special: bool,
    /// Report token ids beside the text.
    pub return_token_ids: bool,
    /// In log-probs, write `token_id:7` in place of a token's text.
    pub tokens_as_ids: bool,
    /// Answer with server-sent events.
    pub stream: bool,
    /// End a stream with a chunk about token counts.
    pub include_usage: bool,
    /// The client's name for the request.
    pub request_id: Option<String>,
}

impl Common {
    /// Takes the shared fields, `model` among them.
    ///
    /// # Errors
    /// 404 for another model; 400 naming the field that is wrong or not supported.
    pub fn take(fields: &mut Fields, state: &AppState) -> Result<Self, ApiError> {
        check_model(fields, &state.info)?;
        check_metadata(fields)?;
        neutral::check_shared(fields)?;
        let stream = fields.take_or("stream", false)?;
        let prompt_logprobs = sampling::take_prompt_logprobs(fields)?;
        if stream && prompt_logprobs.is_some() {
            return Err(ApiError::invalid("prompt_logprobs", "are not streamed; leave out stream"));
        }
        let prompt_wanted = sampling::engine_prompt_logprobs(prompt_logprobs);
        Ok(Self {
            params: SamplingParams {
                prompt_logprobs: prompt_wanted,
                ..sampling::take(fields, state)?
            },
            prompt_logprobs,
            truncate: truncation(fields, &state.info)?,
            priority: fields.take_or("priority", 0)?,
            cache_salt: cache_salt(fields)?,
            structured: structured::take(fields)?,
            max_tokens: fields.take("max_tokens")?,
            stop: stop_strings(fields, &state.limits)?,
            include_stop: fields.take_or("include_stop_str_in_output", false)?,
            skip_special: fields.take_or("skip_special_tokens", true)?,
            return_token_ids: fields.take_or("return_token_ids", false)?,
            tokens_as_ids: fields.take_or("return_tokens_as_token_ids", false)?,
            stream,
            include_usage: include_usage(fields, stream)?,
            request_id: request_id(fields)?,
        })
    }

    /// The sampling parameters for a prompt of `prompt_len` tokens. Without `max_tokens`, `default`
    /// of them are generated, or as many as there is room for.
    ///
    /// # Errors
    /// 400 if prompt and completion do not fit the model, or a value is out of range.
    pub fn params_for(
        &self,
        prompt_len: usize,
        default: usize,
        info: &ModelInfo,
    ) -> Result<SamplingParams, ApiError> {
        let room = info.max_model_len.saturating_sub(prompt_len);
        let max_tokens = self.max_tokens.unwrap_or(default.min(room).max(1));
        let grammar = self.structured.as_ref().map(|structured| structured.grammar.clone());
        let params = SamplingParams { max_tokens, grammar, ..self.params.clone() };
        params.validate()?;
        if max_tokens > room {
            return Err(too_long(prompt_len, max_tokens, info.max_model_len));
        }
        Ok(params)
    }

    /// The request to the engine.
    pub fn request(&self, prompt: Vec<u32>, params: SamplingParams) -> Request {
        let (priority, cache_salt) = (self.priority, self.cache_salt.clone());
        Request { prompt, params, priority, cache_salt }
    }

    /// Drops what is to be cut off a prompt.
    pub fn truncate(&self, mut prompt: Vec<u32>, info: &ModelInfo) -> Vec<u32> {
        let most = match self.truncate {
            None => return prompt,
            Some(Truncation::Tokens(tokens)) => tokens,
            Some(Truncation::ToFit) => {
                info.max_model_len.saturating_sub(self.max_tokens.unwrap_or(1)).max(1)
            }
        };
        prompt.drain(..prompt.len().saturating_sub(most));
        prompt
    }
}

impl Common {
    /// How tokens become text.
    pub fn text_rules(&self, info: &ModelInfo) -> Arc<TextRules> {
        let eos: &[u32] = if self.params.ignore_eos { &[] } else { &info.eos_token_ids };
        Arc::new(TextRules {
            stop: self.stop.clone(),
            include_stop: self.include_stop,
            skip_special: self.skip_special,
            min_tokens: self.params.min_tokens,
            stop_tokens: [eos, &self.params.stop_token_ids].concat(),
            tokens_only: false,
        })
    }

    /// The field that says what the text must be.
    pub fn structured_field(&self) -> Option<String> {
        self.structured.as_ref().map(|structured| structured.field.clone())
    }

    /// The answer's id: the client's name for it, or a new one.
    pub fn answer_id(&self, prefix: &str) -> String {
        match &self.request_id {
            Some(id) => format!("{prefix}-{id}"),
            None => format!("{prefix}-{}", uuid::Uuid::new_v4().simple()),
        }
    }
}

fn too_long(prompt: usize, max_tokens: usize, limit: usize) -> ApiError {
    let message = format!(
        "the model's context is {limit} tokens, but the prompt has {prompt} and {max_tokens} more \
         were asked for; shorten the prompt or lower max_tokens"
    );
    let param = (prompt < limit).then(|| "max_tokens".to_string());
    let error = ApiError::new(StatusCode::BAD_REQUEST, message);
    ApiError { param, ..error.with_code("context_length_exceeded") }
}

/// Takes `model`, which must be the served one.
///
/// # Errors
/// 404 for another.
pub fn check_model(fields: &mut Fields, info: &ModelInfo) -> Result<(), ApiError> {
    match fields.take::<String>("model")? {
        Some(name) if name != info.name => Err(unknown_model(&name, info)),
        _ => Ok(()),
    }
}

/// 404 for a model that is not served here.
pub fn unknown_model(name: &str, info: &ModelInfo) -> ApiError {
    let message = format!("model '{name}' is not served here; the model is '{}'", info.name);
    let error = ApiError::new(StatusCode::NOT_FOUND, message).with_code("model_not_found");
    ApiError { param: Some("model".into()), ..error }
}

/// Takes the fields that name the end user. By OpenAI's definition they do not change the answer.
fn check_metadata(fields: &mut Fields) -> Result<(), ApiError> {
    for name in ["user", "safety_identifier"] {
        if let Some(user) = fields.take::<String>(name)? {
            tracing::debug!(user, "request of a named user");
        }
    }
    Ok(())
}

/// Checks that token ids are in the vocabulary.
///
/// # Errors
/// 400 naming `field` and the first id that is not.
pub fn check_ids(field: &str, ids: &[u32], info: &ModelInfo) -> Result<(), ApiError> {
    match ids.iter().find(|id| **id as usize >= info.vocab_size) {
        None => Ok(()),
        Some(id) => {
            let rule = format!("there is no token {id}; ids are below {}", info.vocab_size);
            Err(ApiError::invalid(field, rule))
        }
    }
}

/// -1 stands for the model's length.
fn truncation(fields: &mut Fields, info: &ModelInfo) -> Result<Option<Truncation>, ApiError> {
    let Some(tokens) = fields.take::<i64>("truncate_prompt_tokens")? else { return Ok(None) };
    if tokens == -1 {
        return Ok(Some(Truncation::ToFit));
    }
    let most = info.max_model_len;
    let tokens = usize::try_from(tokens).ok().filter(|tokens| (1..=most).contains(tokens));
    let rule = format!("must be -1, or between 1 and the model's context of {most} tokens");
    let error = || ApiError::invalid(fields.path("truncate_prompt_tokens"), rule);
    tokens.map(|tokens| Some(Truncation::Tokens(tokens))).ok_or_else(error)
}

fn cache_salt(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let salt = fields.take::<String>("cache_salt")?;
    if salt.as_ref().is_some_and(|salt| salt.is_empty() || salt.len() > MAX_SALT_BYTES) {
        let rule = format!("must be 1 to {MAX_SALT_BYTES} bytes long");
        return Err(ApiError::invalid(fields.path("cache_salt"), rule));
    }
    Ok(salt)
}

fn stop_strings(fields: &mut Fields, limits: &Limits) -> Result<Vec<String>, ApiError> {
    let stop = match fields.take_value("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(one)) => vec![one],
        Some(value) => serde_json::from_value::<Vec<String>>(value)
            .map_err(|_| ApiError::invalid("stop", "must be a string or a list of strings"))?,
    };
    let check = |ok: bool, rule: String| if ok { Ok(()) } else { Err(rule) };
    check(
        stop.len() <= limits.stop_strings,
        format!("must be at most {} strings", limits.stop_strings),
    )
    .and_then(|()| check(stop.iter().all(|s| !s.is_empty()), "must not be empty".into()))
    .and_then(|()| {
        let fits = stop.iter().all(|s| s.len() <= MAX_STOP_BYTES);
        check(fits, format!("must be at most {MAX_STOP_BYTES} bytes long"))
    })
    .map_err(|rule| ApiError::invalid("stop", rule))?;
    Ok(stop)
}

fn include_usage(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let Some(options) = fields.take_value("stream_options") else { return Ok(false) };
    if !stream {
        return Err(ApiError::invalid("stream_options", "needs \"stream\": true"));
    }
    let mut options = Fields::of(options, "stream_options")?;
    let include = options.take_or("include_usage", false)?;
    neutral::check_stream_options(&mut options)?;
    options.finish()?;
    Ok(include)
}

fn request_id(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let Some(id) = fields.take::<String>("request_id")? else { return Ok(None) };
    if id.is_empty() || id.len() > MAX_ID_BYTES || !id.bytes().all(|b| b.is_ascii_graphic()) {
        let rule = format!("must be 1 to {MAX_ID_BYTES} visible ASCII characters");
        return Err(ApiError::invalid("request_id", rule));
    }
    Ok(Some(id))
}

/// Checks the number of alternatives wanted per token.
///
/// # Errors
/// 400 naming `field` if it is too large.
pub fn check_top(field: &str, top: usize) -> Result<(), ApiError> {
    if top <= MAX_TOP_LOGPROBS {
        return Ok(());
    }
    Err(ApiError::invalid(field, format!("must be at most {MAX_TOP_LOGPROBS}")))
}
