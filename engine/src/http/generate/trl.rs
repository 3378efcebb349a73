//! `POST /generate/` and `POST /chat/`: the routes of TRL's own server, which its trainers up to
//! 1.10 call. The slash at the end tells the former from SGLang's. Later versions of TRL call
//! `/v1/completions` and `/v1/chat/completions`.

use super::vllm_fields::{SAMPLING, SAMPLING_NEUTRAL, top};
use super::{Asked, ids_of};
use crate::http::body::{Fields, JsonBytes};
use crate::http::error::ApiError;
use crate::http::generation::{Job, Sample};
use crate::http::logprobs::shown;
use crate::http::metrics::RequestClock;
use crate::http::neutral::{self, Only};
use crate::http::openapi::errors;
use crate::http::prompt::{Prompt, encode_chat, take_chat};
use crate::http::{Admission, AppState, Shared};
use axum::Json;
use axum::extract::State;
use onpolicy_plugin_api::{Request, Token};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

/// Path of the route that takes prompts.
pub const GENERATE: &str = "/generate/";
/// Path of the route that takes conversations.
pub const CHAT: &str = "/chat/";
/// `max_tokens` where it is not given.
const DEFAULT_MAX_TOKENS: usize = 16;
/// Fields beside `generation_kwargs` that are called as on the other routes.
pub(in crate::http) const BESIDE: [&str; 7] =
    ["n", "repetition_penalty", "temperature", "top_p", "top_k", "min_p", "max_tokens"];

/// Answers the route that takes prompts.
///
/// # Errors
/// Any [`ApiError`].
#[utoipa::path(
    post, path = "/generate/", operation_id = "trl_generate", tag = "generation",
    request_body = ref("#/components/schemas/TrlPromptsRequest"),
    responses(
        (status = 200, description = "All samples",
            body = Answer),
        errors::Generating,
    ),
)]
pub async fn generate(
    State(state): Shared,
    admission: Admission,
    body: JsonBytes,
) -> Result<Json<Answer>, ApiError> {
    let clock = RequestClock::start(GENERATE);
    let plan = state.off_thread(move |state| plan_prompts(body.fields()?, state)).await?;
    plan.answer(&state, admission, clock).await
}

/// Answers the route that takes conversations.
///
/// # Errors
/// Any [`ApiError`].
#[utoipa::path(
    post, path = "/chat/", operation_id = "trl_chat", tag = "generation",
    request_body = ref("#/components/schemas/TrlChatsRequest"),
    responses(
        (status = 200, description = "All samples",
            body = Answer),
        errors::Generating,
    ),
)]
pub async fn chat(
    State(state): Shared,
    admission: Admission,
    body: JsonBytes,
) -> Result<Json<Answer>, ApiError> {
    let clock = RequestClock::start(CHAT);
    let plan = state.off_thread(move |state| plan_chats(body.fields()?, state)).await?;
    plan.answer(&state, admission, clock).await
}

/// Tokens of all prompts, and of all samples, those of one prompt side by side. The log-probs at
/// a position are those of the likeliest tokens and of the drawn one, likeliest first.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = TrlAnswer)]
pub struct Answer {
    prompt_ids: Vec<Vec<u32>>,
    completion_ids: Vec<Vec<u32>>,
    logprobs: Option<Vec<Vec<Vec<f32>>>>,
    logprob_token_ids: Option<Vec<Vec<Vec<u32>>>>,
}

struct Plan {
    asked: Asked,
    requests: Vec<Request>,
    logprobs: bool,
    job: Job,
}

impl Plan {
    fn new(
        asked: Asked,
        logprobs: bool,
        prompts: Vec<Vec<u32>>,
        state: &AppState,
    ) -> Result<Self, ApiError> {
        let requests = prompts.into_iter().map(|ids| asked.request(ids, state));
        let requests: Vec<Request> = requests.collect::<Result<_, _>>()?;
        let job = asked.job(requests.clone(), false, state);
        Ok(Self { asked, requests, logprobs, job })
    }

    async fn answer(
        self,
        state: &AppState,
        admission: Admission,
        clock: RequestClock,
    ) -> Result<Json<Answer>, ApiError> {
        let generation = self.asked.start(self.job, state, admission, clock)?;
        let samples = generation.collect().await?.samples;
        let (logprobs, logprob_token_ids) = samples.iter().map(ranked).unzip();
        Ok(Json(Answer {
            prompt_ids: self.requests.into_iter().map(|request| request.prompt).collect(),
            completion_ids: samples.iter().map(|sample| ids_of(&sample.piece.tokens)).collect(),
            logprobs: self.logprobs.then_some(logprobs),
            logprob_token_ids: self.logprobs.then_some(logprob_token_ids),
        }))
    }
}

/// Log-probs and ids at each position of a sample.
fn ranked(sample: &Sample) -> (Vec<Vec<f32>>, Vec<Vec<u32>>) {
    let at = |token: &Token| {
        let mut both = token.top.clone();
        if both.iter().all(|(id, _)| *id != token.id) {
            both.push((token.id, token.stats.logprob));
        }
        both.into_iter().map(|(id, logprob)| (shown(logprob), id)).unzip()
    };
    sample.piece.tokens.iter().map(|placed| at(&placed.token)).unzip()
}

/// Parses a body with prompts and forgets what it asks for.
#[cfg(test)]
pub(in crate::http) fn parse_prompts(fields: Fields, state: &AppState) -> Result<(), ApiError> {
    plan_prompts(fields, state).map(|_| ())
}

/// Parses a body with conversations and forgets what it asks for.
#[cfg(test)]
pub(in crate::http) fn parse_chats(fields: Fields, state: &AppState) -> Result<(), ApiError> {
    plan_chats(fields, state).map(|_| ())
}

fn plan_prompts(mut body: Fields, state: &AppState) -> Result<Plan, ApiError> {
    let mut common = Fields::default();
    common.adopt(&mut body, "prompts", "prompt");
    let paths = common.paths();
    let prompts = Prompt::take_all(&mut common, state).map_err(|error| paths.place(error))?;
    let (asked, logprobs) = take_asked(&mut body, common, state)?;
    neutral::check(&mut body, &[("images", Only::Nothing)])?;
    body.finish()?;
    let prompts = prompts.iter().map(|prompt| prompt.encode(true, state));
    let prompts = prompts.collect::<Result<_, _>>().map_err(|error| paths.place(error))?;
    Plan::new(asked, logprobs, prompts, state)
}

fn plan_chats(mut body: Fields, state: &AppState) -> Result<Plan, ApiError> {
    let conversations: Vec<Value> = body.require("messages")?;
    if conversations.is_empty() || conversations.len() > state.limits.prompts {
        let rule = format!("must hold 1 to {} conversations", state.limits.prompts);
        return Err(ApiError::invalid("messages", rule));
    }
    let kwargs = body.take_value("chat_template_kwargs").unwrap_or(Value::Null);
    let tools = body.take_value("tools").filter(|tools| *tools != json!([]));
    let (asked, logprobs) = take_asked(&mut body, Fields::default(), state)?;
    body.finish()?;
    let prompts = conversations.into_iter().map(|messages| {
        let mut fields = Fields::default();
        fields.put("messages", messages);
        fields.put("chat_template_kwargs", kwargs.clone());
        let mut chat = take_chat(&mut fields)?;
        chat.tools = tools.clone();
        encode_chat(&chat, state)
    });
    let prompts = prompts.collect::<Result<_, _>>()?;
    Plan::new(asked, logprobs, prompts, state)
}

/// Takes what both routes have, and whether log-probs are wanted: they are, unless `logprobs` is
/// null. What is in `generation_kwargs` goes before what is beside it.
fn take_asked(
    body: &mut Fields,
    mut common: Fields,
    state: &AppState,
) -> Result<(Asked, bool), ApiError> {
    let kwargs = body.take_value("generation_kwargs").unwrap_or_else(|| json!({}));
    let mut kwargs = Fields::of(kwargs, "generation_kwargs")?;
    for name in BESIDE {
        common.adopt(body, name, name);
    }
    for name in SAMPLING {
        common.adopt(&mut kwargs, name, name);
    }
    common.adopt(body, "structured_outputs_regex", "guided_regex");
    let mut asked = Asked::take(common, state)?;
    asked.default_max_tokens = DEFAULT_MAX_TOKENS;
    let none = body.is_null("logprobs") || kwargs.is_null("logprobs");
    let beside = top(body, "logprobs")?;
    let named = top(&mut kwargs, "logprobs")?.or(beside).unwrap_or(0);
    asked.common.params.top_logprobs = if none { 0 } else { named };
    neutral::check(&mut kwargs, &SAMPLING_NEUTRAL)?;
    kwargs.finish()?;
    Ok((asked, !none))
}
