//! `POST /generate`: SGLang's route. Text or token ids in; text, token ids and `meta_info` out.

use super::sglang_fields::{Body, Logprobs};
use super::spans::Spans;
use super::told::{self, Teller, event};
use super::{Asked, ids_of};
use crate::http::body::{Fields, JsonBytes};
use crate::http::error::ApiError;
use crate::http::generation::{Finish, Job, StopReason, Update};
use crate::http::logprobs::{PolicyStats, TokenNames, shown};
use crate::http::metrics::RequestClock;
use crate::http::openapi::{StreamEvent, errors};
use crate::http::text::{Piece, PlacedToken};
use crate::http::{Admission, AppState, Shared};
use axum::Json;
use axum::extract::State;
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use onpolicy_plugin_api::{FinishReason, PromptToken};
use serde::Serialize;
use serde_json::{Value, json};
use std::time::Instant;
use utoipa::ToSchema;

/// The route's path.
pub const PATH: &str = "/generate";

/// Answers the route.
///
/// # Errors
/// Any [`ApiError`].
#[utoipa::path(
    post, path = "/generate", operation_id = "generate", tag = "generation",
    request_body = ref("#/components/schemas/SglangRequest"),
    responses(
        (status = 200, description = "All samples; or, with `stream`, events of more of them",
            content((Outputs = "application/json"), (StreamEvent = "text/event-stream"))),
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
    let Plan { job, mut wording, asked } = plan;
    let generation = asked.start(job, &state, admission, clock)?.named(&wording.rid);
    let generation = generation.named_each(wording.rids.as_deref().unwrap_or_default());
    if asked.common.stream {
        let pieces = vec![Piece::default(); generation.samples()];
        return Ok(told::stream_of(generation, Telling { wording, pieces }));
    }
    let answers = generation.collect().await?;
    wording.prompt_logprobs = answers.prompt_logprobs;
    let samples = answers.samples.iter().enumerate();
    let outputs = samples.map(|(i, sample)| wording.output(i, &sample.piece, Some(&sample.finish)));
    let mut outputs: Vec<Output> = outputs.collect();
    match outputs.pop() {
        Some(only) if !wording.list => Ok(Json(Outputs::One(Box::new(only))).into_response()),
        last => {
            outputs.extend(last);
            Ok(Json(Outputs::Several(outputs)).into_response())
        }
    }
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
    let begun = Instant::now();
    let Body { asked, prompts, batch, rids, logprobs, return_prompt } = Body::take(fields, state)?;
    let mut requests = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        let ids = prompt.encode(true, state).map_err(|error| asked.paths.place(error))?;
        check_start(logprobs, ids.len())?;
        requests.push(asked.request(ids, state)?);
    }
    let per_prompt = asked.common.params.n;
    let wording = Wording {
        rid: asked
            .common
            .request_id
            .clone()
            .unwrap_or_else(|| uuid::Uuid::new_v4().simple().to_string()),
        rids,
        list: batch || per_prompt > 1,
        per_prompt,
        prompts: requests.iter().map(|request| request.prompt.clone()).collect(),
        prompt_logprobs: vec![None; requests.len()],
        logprobs,
        return_prompt,
        weight_version: state.engine.weight_version(),
        names: TokenNames { tokenizer: state.tokenizer.clone(), as_ids: false },
        begun,
    };
    Ok(Plan { job: asked.job(requests, true, state), wording, asked })
}

fn check_start(logprobs: Option<Logprobs>, prompt: usize) -> Result<(), ApiError> {
    match logprobs.and_then(|logprobs| logprobs.start) {
        Some(start) if start >= prompt => {
            let rule = format!("must be below the prompt's length of {prompt} tokens");
            Err(ApiError::invalid("logprob_start_len", rule))
        }
        _ => Ok(()),
    }
}

/// A list where several samples were asked for.
#[derive(Serialize, ToSchema)]
#[schema(as = SglangOutputs)]
#[serde(untagged)]
enum Outputs<'a> {
    One(Box<Output<'a>>),
    Several(Vec<Output<'a>>),
}

/// A sample, so far or as a whole.
#[derive(Serialize, ToSchema)]
#[schema(as = SglangOutput)]
struct Output<'a> {
    text: &'a str,
    output_ids: Vec<u32>,
    meta_info: MetaInfo,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
    /// Which of several samples a chunk is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
}

#[derive(Serialize, ToSchema)]
struct MetaInfo {
    id: String,
    #[schema(value_type = Option<Object>)]
    finish_reason: Option<Value>,
    prompt_tokens: usize,
    completion_tokens: usize,
    /// That of the last token, as text.
    weight_version: String,
    weight_versions: Spans,
    /// Seconds since the request came.
    e2e_latency: f64,
    #[serde(flatten)]
    logprobs: Option<ShownLogprobs>,
}

/// A token: its log-prob, its id, and its text if it was asked for.
type Shown = (Option<f32>, u32, Option<String>);

/// All of it is absent if no log-probs were asked for. A token is `[log-prob, id, text]`.
#[derive(Serialize, ToSchema)]
struct ShownLogprobs {
    #[schema(value_type = Vec<Vec<Value>>, required = false)]
    input_token_logprobs: Vec<Shown>,
    #[schema(value_type = Vec<Vec<Value>>, required = false)]
    output_token_logprobs: Vec<Shown>,
    #[schema(required = false)]
    output_token_logprobs_length: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Option<Vec<Vec<Value>>>>>)]
    input_top_logprobs: Option<Vec<Option<Vec<Shown>>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Option<Vec<Vec<Value>>>>>)]
    output_top_logprobs: Option<Vec<Option<Vec<Shown>>>>,
    #[schema(required = false)]
    policy: PolicyStats,
}

/// How this request is answered.
struct Wording {
    rid: String,
    rids: Option<Vec<String>>,
    list: bool,
    per_prompt: usize,
    prompts: Vec<Vec<u32>>,
    prompt_logprobs: Vec<Option<Vec<PromptToken>>>,
    logprobs: Option<Logprobs>,
    return_prompt: bool,
    weight_version: u64,
    names: TokenNames,
    begun: Instant,
}

impl Wording {
    /// The name of a sample: the client's where there is one for it, and a number where there are
    /// several.
    fn id(&self, index: usize) -> String {
        let (prompt, sample) = (index / self.per_prompt, index % self.per_prompt);
        match &self.rids {
            Some(rids) if self.per_prompt == 1 => rids[prompt].clone(),
            Some(rids) => format!("{}_{sample}", rids[prompt]),
            None if self.list => format!("{}_{index}", self.rid),
            None => self.rid.clone(),
        }
    }

    fn output<'a>(&'a self, index: usize, piece: &'a Piece, finish: Option<&Finish>) -> Output<'a> {
        let prompt = &self.prompts[index / self.per_prompt];
        let weight_versions = Spans::of(&piece.tokens);
        let weight_version = weight_versions.last_version().unwrap_or(self.weight_version);
        let meta_info = MetaInfo {
            id: self.id(index),
            finish_reason: finish.map(|finish| finish_reason(finish, &piece.tokens)),
            prompt_tokens: prompt.len(),
            completion_tokens: piece.tokens.len(),
            weight_version: weight_version.to_string(),
            weight_versions,
            e2e_latency: self.begun.elapsed().as_secs_f64(),
            logprobs: self.logprobs.map(|asked| self.shown(index, &piece.tokens, asked)),
        };
        Output {
            text: &piece.text,
            output_ids: ids_of(&piece.tokens),
            meta_info,
            prompt_token_ids: self.return_prompt.then_some(prompt),
            index: None,
        }
    }

    fn shown(&self, index: usize, tokens: &[PlacedToken], asked: Logprobs) -> ShownLogprobs {
        let (input, input_top) = self.input(index / self.per_prompt, asked);
        let tokens_with = tokens.iter().map(|placed| &placed.token);
        let output: Vec<_> = tokens_with
            .clone()
            .map(|token| self.show(token.id, Some(token.stats.logprob), asked))
            .collect();
        let output_top = tokens_with.map(|token| Some(self.show_top(&token.top, asked)));
        let with_top = asked.top > 0;
        ShownLogprobs {
            output_token_logprobs_length: output.len(),
            output_top_logprobs: with_top.then(|| output_top.collect()),
            output_token_logprobs: output,
            input_top_logprobs: with_top.then_some(input_top),
            input_token_logprobs: input,
            policy: PolicyStats::new(0, tokens),
        }
    }

    /// The prompt's tokens from `start` on. Nothing is said of the first of them, as SGLang has it.
    fn input(&self, prompt: usize, asked: Logprobs) -> (Vec<Shown>, Vec<Option<Vec<Shown>>>) {
        let Some(start) = asked.start else { return (Vec::new(), Vec::new()) };
        let ids = &self.prompts[prompt];
        let known = self.prompt_logprobs[prompt].as_deref().unwrap_or(&[]);
        let later = ids.iter().skip(1).zip(known).skip(start);
        let tokens = later.clone().map(|(id, token)| self.show(*id, Some(token.logprob), asked));
        let tops = later.map(|(_, token)| Some(self.show_top(&token.top, asked)));
        let first = self.show(ids[start], None, asked);
        (
            std::iter::once(first).chain(tokens).collect(),
            std::iter::once(None).chain(tops).collect(),
        )
    }

    fn show(&self, id: u32, logprob: Option<f32>, asked: Logprobs) -> Shown {
        (logprob.map(shown), id, asked.text.then(|| self.names.name(id)))
    }

    fn show_top(&self, top: &[(u32, f32)], asked: Logprobs) -> Vec<Shown> {
        top.iter().map(|(id, logprob)| self.show(*id, Some(*logprob), asked)).collect()
    }
}

fn finish_reason(finish: &Finish, tokens: &[PlacedToken]) -> Value {
    match (finish.reason, &finish.stop_reason) {
        (FinishReason::Stop, Some(StopReason::Text(text))) => {
            json!({"type": "stop", "matched": text})
        }
        (FinishReason::Stop, _) => {
            json!({"type": "stop", "matched": tokens.last().map(|placed| placed.token.id)})
        }
        (FinishReason::Length, _) => json!({"type": "length", "length": tokens.len()}),
        (FinishReason::Abort, _) => {
            json!({"type": "abort", "message": "Aborted", "status_code": null, "err_type": null})
        }
    }
}

/// The same as a stream: every event holds all of a sample so far.
struct Telling {
    wording: Wording,
    pieces: Vec<Piece>,
}

impl Telling {
    fn event(&self, index: usize, finish: Option<&Finish>) -> Event {
        let mut output = self.wording.output(index, &self.pieces[index], finish);
        output.index = self.wording.list.then_some(index);
        event(&output)
    }
}

impl Teller for Telling {
    fn tell(&mut self, update: Update) -> Option<Event> {
        match update {
            Update::Prompt { prompt, tokens } => {
                self.wording.prompt_logprobs[prompt] = Some(tokens);
                None
            }
            Update::Piece { index, piece } => {
                self.pieces[index].extend(piece);
                Some(self.event(index, None))
            }
            Update::Finished { index, finish } => Some(self.event(index, Some(&finish))),
        }
    }

    fn close(&mut self) -> Option<Event> {
        None
    }
}
