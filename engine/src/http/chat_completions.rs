//! `POST /v1/chat/completions`: a conversation in, the assistant's next message out.

use super::answer::{Envelope, Meta, Plan, Wording, answer, unix_time};
use super::body::{Fields, JsonBytes};
use super::error::ApiError;
use super::fields::{Common, check_top};
use super::generation::{Finish, Job, Sample, StopReason};
use super::logprobs::{ChatLogprobs, PolicyStats, TokenNames};
use super::metrics::RequestClock;
use super::openapi::{StreamEvent, errors};
use super::prompt::{encode_chat, take_chat};
use super::prompt_logprobs::PromptLogprobs;
use super::text::{Piece, PlacedToken};
use super::tools::{Answer, Parsed, ToolCall, Tools};
use super::{Admission, AppState, Shared, neutral};
use axum::extract::State;
use axum::response::Response;
use onpolicy_plugin_api::{FinishReason, PromptToken};
use serde::Serialize;
use std::sync::Mutex;
use utoipa::ToSchema;

/// The route's path.
pub const PATH: &str = "/v1/chat/completions";

/// Answers the route.
///
/// # Errors
/// Any [`ApiError`].
#[utoipa::path(
    post, path = "/v1/chat/completions", operation_id = "chat_completions", tag = "generation",
    request_body = ref("#/components/schemas/ChatCompletionRequest"),
    responses(
        (status = 200, description = "All samples; or, with `stream`, events of more of them",
            content((Envelope<Choice> = "application/json"), (StreamEvent = "text/event-stream"))),
        errors::Generating,
    ),
)]
pub async fn create(
    State(state): Shared,
    admission: Admission,
    body: JsonBytes,
) -> Result<Response, ApiError> {
    answer(state, RequestClock::start(PATH), admission, body, plan).await
}

/// The message of a choice, or what a chunk adds to it.
#[derive(Debug, Default, Serialize, ToSchema)]
#[schema(as = ChatAnswer)]
struct Message {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<Option<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<Vec<ToolCall>>,
}

/// Why a sample ended.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(untagged)]
enum Reason {
    /// As the engine has it.
    Engine(FinishReason),
    /// It would be `stop`, and calls were made.
    Calls(&'static str),
}

/// What whole choices and streamed ones have in common.
#[derive(Debug, Default, Serialize, ToSchema)]
#[schema(as = ChatDetails)]
struct Details {
    logprobs: Option<ChatLogprobs>,
    #[schema(value_type = Option<String>)]
    finish_reason: Option<Reason>,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<PolicyStats>,
    #[serde(skip_serializing_if = "Option::is_none")]
    weight_versions: Option<[u64; 2]>,
}

/// A choice of a whole answer.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ChatChoice)]
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
    prompt: Vec<u32>,
    /// How many of the likeliest tokens are listed with each prompt token, if these are shown.
    prompt_logprobs: Option<usize>,
    /// Where calls of tools are looked for: what has been found in each sample.
    answers: Option<Mutex<Vec<Answer>>>,
    logprobs: bool,
    token_ids: bool,
    names: TokenNames,
}

/// Parses a body and forgets what it asks for.
#[cfg(test)]
pub(super) fn parse(fields: Fields, state: &AppState) -> Result<(), ApiError> {
    plan(fields, state).map(|_| ())
}

/// What would be generated from, and whether with log-probs, without generating it.
///
/// # Errors
/// As the route itself.
pub(super) fn preview(fields: Fields, state: &AppState) -> Result<(Job, Meta, bool), ApiError> {
    plan(fields, state).map(|plan| (plan.job, plan.meta, plan.wording.logprobs))
}

fn plan(mut fields: Fields, state: &AppState) -> Result<Plan<ChatWording>, ApiError> {
    let mut common = Common::take(&mut fields, state)?;
    common.max_tokens = max_tokens(&mut fields, common.max_tokens)?;
    let mut chat = take_chat(&mut fields)?;
    let tools = Tools::take(&mut fields)?;
    let logprobs = fields.take_or("logprobs", false)?;
    common.params.top_logprobs = top_logprobs(&mut fields, logprobs)?;
    neutral::check_chat(&mut fields)?;
    fields.finish()?;

    chat.tools = tools.shown.clone();
    let calls = tools.calls(state, common.structured.as_ref())?;
    if let Some(calls) = &calls {
        common.structured = calls.structured.clone();
        // In some models the markers of calls are special tokens.
        common.skip_special = false;
    }
    let prompt = common.truncate(encode_chat(&chat, state)?, &state.info);
    let params = common.params_for(prompt.len(), usize::MAX, &state.info)?;
    let answers = calls.map(|calls| (0..params.n).map(|_| Answer::new(&calls)).collect());
    let wording = ChatWording {
        prompt: prompt.clone(),
        prompt_logprobs: common.prompt_logprobs,
        answers: answers.map(Mutex::new),
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
    let requests = vec![common.request(prompt, params)];
    let structured = common.structured_field();
    let job = Job { requests, rules, stream: common.stream, structured };
    Ok(Plan { job, wording, meta })
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
        let policy = match (self.logprobs, self.token_ids) {
            (true, _) => Some(PolicyStats::new(0, tokens)),
            (false, true) => Some(PolicyStats::versions(0, tokens)),
            (false, false) => None,
        };
        Details {
            logprobs: self.logprobs.then(|| ChatLogprobs::new(tokens, &self.names)),
            token_ids: self.token_ids.then(ids),
            policy,
            ..Details::default()
        }
    }

    /// Something of what has been found in a sample; none where no calls are looked for.
    fn answer<T>(&self, index: usize, of: impl FnOnce(&mut Answer) -> T) -> Option<T> {
        let answers = self.answers.as_ref()?;
        let mut answers = answers.lock().unwrap_or_else(|poison| poison.into_inner());
        answers.get_mut(index).map(of)
    }

    /// The end of a sample that perhaps made calls.
    fn ended(&self, index: usize, mut details: Details) -> Details {
        let stopped = matches!(details.finish_reason, Some(Reason::Engine(FinishReason::Stop)));
        if stopped && self.answer(index, |answer| answer.ends_with_calls()) == Some(true) {
            details.finish_reason = Some(Reason::Calls("tool_calls"));
        }
        details
    }
}

impl Message {
    fn assistant() -> Self {
        Self { role: Some("assistant"), ..Self::default() }
    }

    fn adding((content, tool_calls): Parsed) -> Self {
        Self { role: None, content: content.map(Some), tool_calls }
    }

    fn is_empty(&self) -> bool {
        self.content.iter().flatten().all(String::is_empty) && self.tool_calls.is_none()
    }
}

impl Details {
    fn finished(mut self, finish: Finish) -> Self {
        self.finish_reason = Some(Reason::Engine(finish.reason));
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
        let delta = Message { content: Some(Some(String::new())), ..Message::assistant() };
        Some(Delta { index, delta, details: Details::default() })
    }

    fn piece(&self, index: usize, piece: Piece) -> Option<Delta> {
        let delta = match self.answer(index, |answer| answer.push(&piece.text)) {
            Some(parsed) => Message::adding(parsed),
            None => Message::adding((Some(piece.text), None)),
        };
        if delta.is_empty() && !self.logprobs && !self.token_ids {
            return None;
        }
        Some(Delta { index, delta, details: self.details(&piece.tokens) })
    }

    fn finish(&self, index: usize, finish: Finish) -> Delta {
        let rest = self.answer(index, Answer::finish);
        let details = self.ended(index, Details::default().finished(finish));
        Delta { index, delta: rest.map_or_else(Message::default, Message::adding), details }
    }

    fn whole(&self, index: usize, sample: Sample, _: Option<&[PromptToken]>) -> Choice {
        let text = sample.piece.text;
        let parsed = self.answer(index, |answer| answer.whole(&text));
        let (content, tool_calls) = parsed.unwrap_or((Some(text), None));
        let details = self.details(&sample.piece.tokens).finished(sample.finish);
        let details = self.ended(index, details);
        let message = Message { content: Some(content), tool_calls, ..Message::assistant() };
        Choice { index, message, details }
    }

    fn about_prompt(&self, prompt: Option<&[PromptToken]>) -> Option<PromptLogprobs> {
        let tokens = prompt.unwrap_or(&[]);
        self.prompt_logprobs.map(|top| PromptLogprobs::new(&self.prompt, tokens, top, &self.names))
    }
}
