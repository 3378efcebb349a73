//! `POST /v1/chat/completions`: a conversation in, the assistant's next message out.

use super::answer::{Meta, Wording, respond, unix_time};
use super::body::{Fields, JsonBytes};
use super::error::ApiError;
use super::fields::{Common, check_top};
use super::generation::{Finish, Generation, Job, Sample, StopReason};
use super::logprobs::{ChatLogprobs, PolicyStats, TokenNames};
use super::metrics::RequestClock;
use super::prompt::{encode_chat, take_chat};
use super::text::{Piece, PlacedToken};
use super::{Admission, AppState, Shared, neutral};
use axum::extract::State;
use axum::response::Response;
use onpolicy_plugin_api::{FinishReason, PromptToken, Request};
use serde::Serialize;

/// The route's path.
pub const PATH: &str = "/v1/chat/completions";

/// Answers the route.
///
/// # Errors
/// Any [`ApiError`].
pub async fn create(
    State(state): Shared,
    admission: Admission,
    body: JsonBytes,
) -> Result<Response, ApiError> {
    let clock = RequestClock::start(PATH);
    let (job, wording, meta) = state.off_thread(move |state| plan(body.fields()?, state)).await?;
    let generation = Generation::start(&state, job, admission, clock)?.named(&meta.id);
    respond(wording, meta, generation).await
}

/// The message of a choice, or what a chunk adds to it.
#[derive(Debug, Default, Serialize)]
struct Message {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

/// What whole choices and streamed ones have in common.
#[derive(Debug, Default, Serialize)]
struct Details {
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<FinishReason>,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<PolicyStats>,
    #[serde(skip_serializing_if = "Option::is_none")]
    weight_versions: Option<[u64; 2]>,
}

/// A choice of a whole answer.
#[derive(Debug, Serialize)]
struct Choice {
    index: usize,
    message: Message,
    #[serde(flatten)]
    details: Details,
}

/// A choice of a chunk.
#[derive(Debug, Serialize)]
struct Delta {
    index: usize,
    delta: Message,
    #[serde(flatten)]
    details: Details,
}

struct ChatWording {
    logprobs: bool,
    token_ids: bool,
    names: TokenNames,
}

fn plan(mut fields: Fields, state: &AppState) -> Result<(Job, ChatWording, Meta), ApiError> {
    let mut common = Common::take(&mut fields, state)?;
    common.max_tokens = max_tokens(&mut fields, common.max_tokens)?;
    let chat = take_chat(&mut fields)?;
    let logprobs = fields.take_or("logprobs", false)?;
    common.params.top_logprobs = top_logprobs(&mut fields, logprobs)?;
    neutral::check_chat(&mut fields)?;
    fields.finish()?;

    let prompt = encode_chat(&chat, state)?;
    let params = common.params_for(prompt.len(), usize::MAX, &state.info)?;
    let wording = ChatWording {
        logprobs,
        token_ids: common.return_token_ids,
        names: TokenNames { tokenizer: state.tokenizer.clone(), as_ids: common.tokens_as_ids },
    };
    let meta = Meta {
        id: common.answer_id("chatcmpl"),
        created: unix_time(),
        model: state.info.name.clone(),
        weight_version: state.engine.weight_version(),
        prompt_tokens: prompt.len(),
        prompt_token_ids: common.return_token_ids.then(|| prompt.clone()),
        stream: common.stream,
        include_usage: common.include_usage,
    };
    let rules = common.text_rules(&state.info);
    Ok((Job { requests: vec![Request::new(prompt, params)], rules }, wording, meta))
}

/// `max_completion_tokens` is the newer name of `max_tokens`.
fn max_tokens(fields: &mut Fields, old: Option<usize>) -> Result<Option<usize>, ApiError> {
    let new = fields.take("max_completion_tokens")?;
    match (new, old) {
        (Some(new), Some(old)) if new != old => {
            let rule = "differs from max_tokens, its older name; send one of them";
            Err(ApiError::invalid("max_completion_tokens", rule))
        }
        _ => Ok(new.or(old)),
    }
}

fn top_logprobs(fields: &mut Fields, logprobs: bool) -> Result<usize, ApiError> {
    let top = fields.take("top_logprobs")?;
    if top.is_some() && !logprobs {
        return Err(ApiError::invalid("top_logprobs", "needs \"logprobs\": true"));
    }
    let top = top.unwrap_or(0);
    check_top("top_logprobs", top)?;
    Ok(top)
}

impl ChatWording {
    fn details(&self, tokens: &[PlacedToken]) -> Details {
        let ids = || tokens.iter().map(|placed| placed.token.id).collect();
        Details {
            logprobs: self.logprobs.then(|| ChatLogprobs::new(tokens, &self.names)),
            token_ids: self.token_ids.then(ids),
            policy: self.logprobs.then(|| PolicyStats::new(0, tokens)),
            ..Details::default()
        }
    }
}

impl Details {
    fn finished(mut self, finish: Finish) -> Self {
        self.finish_reason = Some(finish.reason);
        self.stop_reason = finish.stop_reason;
        self.weight_versions = finish.weight_versions;
        self
    }
}

impl Wording for ChatWording {
    const OBJECT: &'static str = "chat.completion";
    const CHUNK: &'static str = "chat.completion.chunk";
    type Choice = Choice;
    type Delta = Delta;

    fn opens_with_logprobs(&self) -> bool {
        false
    }

    fn opening(&self, index: usize, _: Option<&[PromptToken]>) -> Option<Delta> {
        let delta = Message { role: Some("assistant"), content: Some(String::new()) };
        Some(Delta { index, delta, details: Details::default() })
    }

    fn piece(&self, index: usize, piece: Piece) -> Option<Delta> {
        if piece.text.is_empty() && !self.logprobs && !self.token_ids {
            return None;
        }
        let delta = Message { role: None, content: Some(piece.text) };
        Some(Delta { index, delta, details: self.details(&piece.tokens) })
    }

    fn finish(&self, index: usize, finish: Finish) -> Delta {
        let details = Details::default().finished(finish);
        Delta { index, delta: Message::default(), details }
    }

    fn whole(&self, index: usize, sample: Sample, _: Option<&[PromptToken]>) -> Choice {
        let details = self.details(&sample.piece.tokens).finished(sample.finish);
        let message = Message { role: Some("assistant"), content: Some(sample.piece.text) };
        Choice { index, message, details }
    }
}
