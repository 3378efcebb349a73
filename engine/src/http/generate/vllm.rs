//! `POST /inference/v1/generate`: vLLM's route for token ids in, token ids out. verifiers and
//! prime-rl draw their rollouts through it.

use super::spans::Spans;
use super::told::{self, Teller, event};
use super::vllm_fields::Body;
use super::{Asked, ids_of};
use crate::http::answer::{Usage, unix_time};
use crate::http::body::{Fields, JsonBytes};
use crate::http::error::ApiError;
use crate::http::generation::{Finish, Job, Sample, StopReason, Update};
use crate::http::logprobs::{ChatLogprobs, PolicyStats, TokenNames, shown};
use crate::http::metrics::RequestClock;
use crate::http::openapi::{StreamEvent, errors};
use crate::http::prompt_logprobs::PromptLogprobs;
use crate::http::text::{Piece, PlacedToken};
use crate::http::{Admission, AppState, Shared};
use axum::Json;
use axum::extract::State;
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use onpolicy_plugin_api::{FinishReason, PromptToken, Token};
use serde::Serialize;
use utoipa::ToSchema;

/// The route's path.
pub const PATH: &str = "/inference/v1/generate";

/// Answers the route.
///
/// # Errors
/// Any [`ApiError`].
#[utoipa::path(
    post, path = "/inference/v1/generate", operation_id = "generate_tokens", tag = "generation",
    request_body = ref("#/components/schemas/TokensRequest"),
    responses(
        (status = 200, description = "All samples; or, with `stream`, events of more of them",
            content((Answer = "application/json"), (StreamEvent = "text/event-stream"))),
        errors::Generating,
    ),
)]
pub async fn create(
    State(state): Shared,
    admission: Admission,
    body: JsonBytes,
) -> Result<Response, ApiError> {
    let clock = RequestClock::start(PATH);
    let plan = state.off_thread(move |state| plan(body.fields()?, state)).await?;
    let Plan { job, wording, asked } = plan;
    let generation = asked.start(job, &state, admission, clock)?.named(&wording.request_id);
    if asked.common.stream {
        let spans = vec![Spans::default(); generation.samples()];
        let include_usage = asked.common.include_usage;
        let teller = Telling { wording, spans, include_usage, completion_tokens: 0 };
        return Ok(told::stream_of(generation, teller));
    }
    let mut answers = generation.collect().await?;
    let completion_tokens = answers.samples.iter().map(|sample| sample.finish.tokens).sum();
    let samples = answers.samples.into_iter().enumerate();
    let choices = samples.map(|(index, sample)| wording.whole(index, sample)).collect();
    let prompt_logprobs = answers.prompt_logprobs.pop().flatten();
    let prompt_logprobs = prompt_logprobs.map(|tokens| wording.prompt_logprobs(&tokens));
    let usage = Some(Usage::new(wording.prompt.len(), completion_tokens));
    let prompt_token_ids = wording.return_prompt.then_some(&wording.prompt[..]);
    let answer = Answer { choices, usage, prompt_logprobs, prompt_token_ids, ..wording.answer() };
    Ok(Json(answer).into_response())
}

struct Plan {
    job: Job,
    wording: Wording,
    asked: Asked,
}

/// Parses a body and forgets what it asks for.
#[cfg(test)]
pub(in crate::http) fn parse(fields: Fields, state: &AppState) -> Result<(), ApiError> {
    plan(fields, state).map(|_| ())
}

fn plan(fields: Fields, state: &AppState) -> Result<Plan, ApiError> {
    let Body { asked, prompt, prompt_top, logprobs, text, return_prompt } =
        Body::take(fields, state)?;
    let request = asked.request(prompt.clone(), state)?;
    let job = asked.job(vec![request], text, state);
    let wording = Wording {
        request_id: asked.common.answer_id("generate-tokens"),
        model: state.info.name.clone(),
        created: unix_time(),
        weight_version: state.engine.weight_version(),
        prompt,
        prompt_top,
        logprobs,
        text,
        return_prompt,
        names: TokenNames { tokenizer: state.tokenizer.clone(), as_ids: !text },
    };
    Ok(Plan { job, wording, asked })
}

/// An answer, or a chunk of one.
#[derive(Serialize, ToSchema)]
#[schema(as = TokensAnswer)]
struct Answer<'a> {
    request_id: &'a str,
    model: &'a str,
    created: u64,
    weight_version: u64,
    output_mode: &'static str,
    choices: Vec<Choice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
    prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
}

/// A sample, or what a chunk adds to it.
#[derive(Default, Serialize, ToSchema)]
#[schema(as = TokensChoice)]
struct Choice {
    index: usize,
    token_ids: Vec<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    logprobs: Option<Logprobs>,
    #[schema(value_type = Option<String>)]
    finish_reason: Option<FinishReason>,
    stop_reason: Option<StopReason>,
    weight_versions: Option<Spans>,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<PolicyStats>,
}

/// With text they are those of a chat message.
#[derive(Serialize, ToSchema)]
#[schema(as = TokensLogprobs)]
#[serde(untagged)]
enum Logprobs {
    Tokens { content: Vec<TokenLogprob> },
    Text(ChatLogprobs),
}

/// `token` is the name that vLLM gave a token before it had `token_id`; clients read either.
#[derive(Serialize, ToSchema)]
struct TokenLogprob {
    token: String,
    token_id: u32,
    logprob: f32,
    rank: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(no_recursion)]
    top_logprobs: Option<Vec<TokenLogprob>>,
}

/// How this request is answered.
struct Wording {
    request_id: String,
    model: String,
    created: u64,
    weight_version: u64,
    prompt: Vec<u32>,
    /// How many of the likeliest tokens are listed with each prompt token.
    prompt_top: usize,
    logprobs: Option<usize>,
    text: bool,
    return_prompt: bool,
    names: TokenNames,
}

impl Wording {
    fn answer(&self) -> Answer<'_> {
        Answer {
            request_id: &self.request_id,
            model: &self.model,
            created: self.created,
            weight_version: self.weight_version,
            output_mode: if self.text { "text" } else { "tokens" },
            choices: Vec::new(),
            usage: None,
            prompt_logprobs: None,
            prompt_token_ids: None,
        }
    }

    fn whole(&self, index: usize, sample: Sample) -> Choice {
        let spans = Spans::of(&sample.piece.tokens);
        self.piece(index, sample.piece).finished(sample.finish, spans)
    }

    fn piece(&self, index: usize, piece: Piece) -> Choice {
        let Piece { text, tokens } = piece;
        Choice {
            index,
            token_ids: ids_of(&tokens),
            text: self.text.then_some(text),
            policy: self.logprobs.map(|_| PolicyStats::new(0, &tokens)),
            logprobs: self.logprobs.map(|named| self.token_logprobs(&tokens, named)),
            ..Choice::default()
        }
    }

    fn token_logprobs(&self, tokens: &[PlacedToken], named: usize) -> Logprobs {
        if self.text {
            return Logprobs::Text(ChatLogprobs::new(tokens, &self.names));
        }
        let content = tokens.iter().map(|placed| self.token_logprob(&placed.token, named));
        Logprobs::Tokens { content: content.collect() }
    }

    /// The drawn token first, then the likeliest others: `named` in all, and at least it.
    fn token_logprob(&self, token: &Token, named: usize) -> TokenLogprob {
        let candidates = ranked(token);
        let top = candidates.take(named.max(1)).map(|(id, logprob, rank)| {
            let (token, logprob) = (self.names.name(id), shown(logprob));
            TokenLogprob { token, token_id: id, logprob, rank, top_logprobs: None }
        });
        let top: Vec<_> = top.collect();
        TokenLogprob {
            token: self.names.name(token.id),
            token_id: token.id,
            logprob: shown(token.stats.logprob),
            rank: top[0].rank,
            top_logprobs: Some(top),
        }
    }

    fn prompt_logprobs(&self, tokens: &[PromptToken]) -> PromptLogprobs {
        PromptLogprobs::new(&self.prompt, tokens, self.prompt_top, &self.names)
    }
}

/// The drawn token and its log-prob and rank, then the other likeliest with theirs.
fn ranked(token: &Token) -> impl Iterator<Item = (u32, f32, Option<usize>)> {
    let ranks = token.top.iter().zip(1..);
    let rank = ranks.clone().find(|((id, _), _)| *id == token.id).map(|(_, rank)| rank);
    let others = ranks.filter(|((id, _), _)| *id != token.id);
    let others = others.map(|((id, logprob), rank)| (*id, *logprob, Some(rank)));
    std::iter::once((token.id, token.stats.logprob, rank)).chain(others)
}

impl Choice {
    fn finished(mut self, finish: Finish, spans: Spans) -> Self {
        self.finish_reason = Some(finish.reason);
        self.stop_reason = finish.stop_reason;
        self.weight_versions = Some(spans);
        self
    }
}

/// The same as a stream.
struct Telling {
    wording: Wording,
    spans: Vec<Spans>,
    include_usage: bool,
    completion_tokens: usize,
}

impl Telling {
    fn chunk(&mut self, choices: Vec<Choice>) -> Event {
        let return_prompt = std::mem::take(&mut self.wording.return_prompt);
        let prompt_token_ids = return_prompt.then_some(&self.wording.prompt[..]);
        event(&Answer { choices, prompt_token_ids, ..self.wording.answer() })
    }
}

impl Teller for Telling {
    fn tell(&mut self, update: Update) -> Option<Event> {
        let choice = match update {
            Update::Prompt { tokens, .. } => {
                let prompt_logprobs = Some(self.wording.prompt_logprobs(&tokens));
                return Some(event(&Answer { prompt_logprobs, ..self.wording.answer() }));
            }
            Update::Piece { index, piece } => {
                self.spans[index].extend(&piece.tokens);
                self.wording.piece(index, piece)
            }
            Update::Finished { index, finish } => {
                self.completion_tokens += finish.tokens;
                let spans = std::mem::take(&mut self.spans[index]);
                self.wording.piece(index, Piece::default()).finished(finish, spans)
            }
        };
        Some(self.chunk(vec![choice]))
    }

    fn close(&mut self) -> Option<Event> {
        let usage = Some(Usage::new(self.wording.prompt.len(), self.completion_tokens));
        self.include_usage.then(|| event(&Answer { usage, ..self.wording.answer() }))
    }
}
