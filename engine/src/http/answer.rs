//! What both generating routes answer with: one JSON object, or a stream of them as server-sent
//! events. The routes differ in how they word a choice.

use super::body::{Fields, JsonBytes};
use super::error::ApiError;
use super::generation::{Finish, Generation, Job, Sample};
use super::metrics::RequestClock;
use super::prompt_logprobs::PromptLogprobs;
use super::stream::Chunks;
use super::text::Piece;
use super::{Admission, AppState};
use axum::Json;
use axum::response::{IntoResponse, Response};
use onpolicy_plugin_api::PromptToken;
use serde::Serialize;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use utoipa::ToSchema;

/// How a route words its choices.
pub trait Wording: Send + Sync + 'static {
    /// `object` of a whole answer.
    const OBJECT: &'static str;
    /// `object` of a streamed chunk.
    const CHUNK: &'static str;
    /// A choice of a whole answer.
    type Choice: Serialize;
    /// A choice of a streamed chunk.
    type Delta: Serialize;

    /// True if [`Wording::opening`] needs the prompt's log-probs.
    fn opens_with_logprobs(&self) -> bool;
    /// What a stream says of a sample before its first token.
    fn opening(&self, index: usize, prompt_logprobs: Option<&[PromptToken]>)
    -> Option<Self::Delta>;
    /// More of a sample; `None` if the client has asked for nothing that is in the piece.
    fn piece(&self, index: usize, piece: Piece) -> Option<Self::Delta>;
    /// The end of a sample.
    fn finish(&self, index: usize, finish: Finish) -> Self::Delta;
    /// A whole sample.
    fn whole(
        &self,
        index: usize,
        sample: Sample,
        prompt_logprobs: Option<&[PromptToken]>,
    ) -> Self::Choice;
    /// What a whole answer says of its first prompt beside the choices.
    fn about_prompt(&self, _prompt: Option<&[PromptToken]>) -> Option<PromptLogprobs> {
        None
    }
}

/// Token counts over all prompts and samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
}

impl Usage {
    pub(super) fn new(prompt_tokens: usize, completion_tokens: usize) -> Self {
        let total_tokens = prompt_tokens + completion_tokens;
        Self { prompt_tokens, completion_tokens, total_tokens }
    }
}

/// What every answer says of its request.
#[derive(Debug, Clone)]
pub struct Meta {
    /// Name of the answer.
    pub id: String,
    /// When the request was accepted, in seconds since 1970.
    pub created: u64,
    /// The served model.
    pub model: String,
    /// Weight version when the request was accepted.
    pub weight_version: u64,
    /// Tokens of all prompts.
    pub prompt_tokens: usize,
    /// The prompt's ids, if they were asked for and belong at the top of the answer.
    pub prompt_token_ids: Option<Vec<u32>>,
    /// Answer with a stream.
    pub stream: bool,
    /// End the stream with a chunk about token counts.
    pub include_usage: bool,
}

/// Seconds since 1970.
pub fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// An answer or a chunk of one. A `usage` of `Some(None)` is written as null.
#[derive(Serialize, ToSchema)]
pub(super) struct Envelope<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    weight_version: u64,
    choices: Vec<C>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub(super) usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) prompt_token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
}

impl<'a, C> Envelope<'a, C> {
    pub(super) fn new(meta: &'a Meta, object: &'static str, choices: Vec<C>) -> Self {
        Self {
            id: &meta.id,
            object,
            created: meta.created,
            model: &meta.model,
            weight_version: meta.weight_version,
            choices,
            usage: None,
            prompt_token_ids: None,
            prompt_logprobs: None,
        }
    }
}

/// A request, ready to be started.
pub struct Plan<W> {
    /// What to generate.
    pub job: Job,
    /// How to word it.
    pub wording: W,
    /// What the answer says of itself.
    pub meta: Meta,
}

/// Answers a body with what is generated as `plan` makes of it.
///
/// # Errors
/// A body that makes no sense, or the engine's failure; once a stream has begun, failures are events
/// of it.
pub async fn answer<W: Wording>(
    state: Arc<AppState>,
    clock: RequestClock,
    admission: Admission,
    body: JsonBytes,
    plan: fn(Fields, &AppState) -> Result<Plan<W>, ApiError>,
) -> Result<Response, ApiError> {
    let start = move |state: &AppState| {
        let Plan { job, wording, meta } = plan(body.fields()?, state)?;
        let generation = Generation::start(state, job, admission, clock)?.named(&meta.id);
        Ok((wording, meta, generation))
    };
    let (wording, meta, generation) = state.off_thread(start).await?;
    if meta.stream {
        return Ok(Chunks::new(wording, meta, generation).into_response());
    }
    let per_prompt = generation.samples_per_prompt();
    let answers = generation.collect().await?;
    let completion_tokens = answers.samples.iter().map(|sample| sample.finish.tokens).sum();
    let first = answers.prompt_logprobs.first().and_then(Option::as_deref);
    let about_prompt = wording.about_prompt(first);
    let choices = answers.samples.into_iter().enumerate().map(|(index, sample)| {
        let prompt_logprobs = answers.prompt_logprobs[index / per_prompt].as_deref();
        wording.whole(index, sample, prompt_logprobs)
    });
    let mut answer = Envelope::new(&meta, W::OBJECT, choices.collect());
    answer.usage = Some(Some(Usage::new(meta.prompt_tokens, completion_tokens)));
    answer.prompt_token_ids = meta.prompt_token_ids.as_deref();
    answer.prompt_logprobs = about_prompt;
    Ok(Json(answer).into_response())
}
