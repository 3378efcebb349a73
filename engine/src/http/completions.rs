//! `POST /v1/completions`: text or tokens in, text out.

use super::answer::{Envelope, Meta, Plan, Wording, answer, unix_time};
use super::body::{Fields, JsonBytes};
use super::error::ApiError;
use super::fields::{Common, check_top};
use super::generation::{Finish, Job, Sample, StopReason};
use super::logprobs::{PolicyStats, TextLogprobs, TokenNames};
use super::metrics::RequestClock;
use super::openapi::{StreamEvent, errors};
use super::prompt::Prompt;
use super::prompt_logprobs::PromptLogprobs;
use super::text::{Piece, PlacedToken};
use super::{Admission, AppState, Shared, neutral};
use axum::extract::State;
use axum::response::Response;
use onpolicy_plugin_api::{FinishReason, PromptToken, SamplingParams};
use serde::Serialize;
use utoipa::ToSchema;

/// The route's path.
pub const PATH: &str = "/v1/completions";
/// `max_tokens` where it is not given, as OpenAI has it.
const DEFAULT_MAX_TOKENS: usize = 16;

/// Answers the route.
///
/// # Errors
/// Any [`ApiError`].
#[utoipa::path(
    post, path = "/v1/completions", operation_id = "completions", tag = "generation",
    request_body = ref("#/components/schemas/CompletionRequest"),
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

/// One choice, of a whole answer or of a chunk.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = CompletionChoice)]
struct Choice {
    index: usize,
    text: String,
    logprobs: Option<TextLogprobs>,
    #[schema(value_type = Option<String>)]
    finish_reason: Option<FinishReason>,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<PolicyStats>,
    #[serde(skip_serializing_if = "Option::is_none")]
    weight_versions: Option<[u64; 2]>,
}

/// A prompt as the answer shows it.
struct ShownPrompt {
    ids: Vec<u32>,
    /// Empty unless the prompt is echoed.
    text: String,
    /// Length of `text` in characters.
    chars: usize,
    /// Where each token's text begins in `text`; empty unless echoed with log-probs.
    offsets: Vec<usize>,
}

struct CompletionWording {
    prompts: Vec<ShownPrompt>,
    per_prompt: usize,
    echo: bool,
    /// How many of the likeliest tokens are listed with each token, if log-probs are shown.
    logprobs: Option<usize>,
    /// The same of the prompt's tokens by themselves.
    prompt_logprobs: Option<usize>,
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
    plan(fields, state).map(|plan| (plan.job, plan.meta, plan.wording.logprobs.is_some()))
}

fn plan(mut fields: Fields, state: &AppState) -> Result<Plan<CompletionWording>, ApiError> {
    let mut common = Common::take(&mut fields, state)?;
    let prompts = Prompt::take_all(&mut fields, state)?;
    let echo = fields.take_or("echo", false)?;
    let logprobs: Option<usize> = fields.take("logprobs")?;
    let special = fields.take_or("add_special_tokens", true)?;
    neutral::check_completions(&mut fields, common.params.n)?;
    fields.finish()?;

    check_top("logprobs", logprobs.unwrap_or(0))?;
    common.params.top_logprobs = logprobs.unwrap_or(0);
    let echoed = logprobs.filter(|_| echo);
    common.params.prompt_logprobs = common.params.prompt_logprobs.max(echoed);
    let mut wording = CompletionWording {
        prompts: Vec::with_capacity(prompts.len()),
        per_prompt: common.params.n,
        echo,
        logprobs,
        prompt_logprobs: common.prompt_logprobs,
        token_ids: common.return_token_ids,
        names: TokenNames { tokenizer: state.tokenizer.clone(), as_ids: common.tokens_as_ids },
    };
    let mut requests = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        let whole = prompt.encode(special, state)?;
        let len = whole.len();
        let ids = common.truncate(whole, &state.info);
        let prompt = if ids.len() < len { Prompt::Tokens(ids.clone()) } else { prompt };
        let params = params_for(&common, ids.len(), state)?;
        requests.push(common.request(ids.clone(), params));
        let shown = wording.show(prompt, ids, common.skip_special)?;
        wording.prompts.push(shown);
    }
    let meta = Meta {
        id: common.answer_id("cmpl"),
        created: unix_time(),
        model: state.info.name.clone(),
        weight_version: state.engine.weight_version(),
        prompt_tokens: requests.iter().map(|request| request.prompt.len()).sum(),
        prompt_token_ids: None,
        stream: common.stream,
        include_usage: common.include_usage,
    };
    let rules = common.text_rules(&state.info);
    let structured = common.structured_field();
    let job = Job { requests, rules, stream: common.stream, structured };
    Ok(Plan { job, wording, meta })
}

fn params_for(
    common: &Common,
    prompt_len: usize,
    state: &AppState,
) -> Result<SamplingParams, ApiError> {
    if prompt_len == 0 {
        return Err(ApiError::invalid("prompt", "must hold at least one token"));
    }
    common.params_for(prompt_len, DEFAULT_MAX_TOKENS, &state.info)
}

impl CompletionWording {
    fn show(&self, prompt: Prompt, ids: Vec<u32>, skip: bool) -> Result<ShownPrompt, ApiError> {
        let text = match prompt {
            _ if !self.echo => String::new(),
            Prompt::Text(text) => text,
            Prompt::Tokens(ids) => self.names.tokenizer.decode(&ids, skip)?,
        };
        let offsets = if self.opens_with_logprobs() { self.offsets(&ids, &text)? } else { vec![] };
        Ok(ShownPrompt { chars: text.chars().count(), ids, text, offsets })
    }

    /// Where each prompt token begins in `text`. A token that the tokenizer put in front of the
    /// text begins at 0.
    fn offsets(&self, ids: &[u32], text: &str) -> Result<Vec<usize>, ApiError> {
        let mut detokenizer = self.names.tokenizer.detokenizer(false);
        let mut starts = Vec::with_capacity(ids.len());
        let mut chars = 0;
        for id in ids {
            starts.push(chars);
            chars += detokenizer.push(*id)?.chars().count();
        }
        chars += detokenizer.finish()?.chars().count();
        let in_front = chars.saturating_sub(text.chars().count());
        Ok(starts.into_iter().map(|start| start.saturating_sub(in_front)).collect())
    }

    fn prompt(&self, index: usize) -> &ShownPrompt {
        &self.prompts[index / self.per_prompt]
    }

    fn choice(&self, index: usize, text: String) -> Choice {
        Choice {
            index,
            text,
            logprobs: None,
            finish_reason: None,
            stop_reason: None,
            token_ids: None,
            prompt_token_ids: None,
            prompt_logprobs: None,
            policy: None,
            weight_versions: None,
        }
    }

    /// Log-probs of the echoed prompt; none if it is not echoed.
    fn echoed_logprobs(&self, index: usize, tokens: Option<&[PromptToken]>) -> TextLogprobs {
        let prompt = self.prompt(index);
        let most = self.logprobs.unwrap_or(0);
        let known = tokens.unwrap_or(&[]).iter().map(|token| {
            let top = token.top.iter().take(most).copied().collect();
            Some(PromptToken { top, ..token.clone() })
        });
        let all = std::iter::once(None).chain(known);
        let mut shown = TextLogprobs::default();
        for ((id, offset), known) in prompt.ids.iter().zip(&prompt.offsets).zip(all) {
            shown.push_prompt(*id, known.as_ref(), *offset, &self.names);
        }
        shown
    }

    /// Writes what was asked for about the tokens, after `before`, the log-probs of the prompt.
    fn add_tokens(&self, choice: &mut Choice, tokens: &[PlacedToken], mut before: TextLogprobs) {
        if self.token_ids {
            choice.token_ids = Some(tokens.iter().map(|placed| placed.token.id).collect());
            choice.policy = Some(PolicyStats::versions(0, tokens));
        }
        if self.logprobs.is_some() {
            choice.policy = Some(PolicyStats::new(before.tokens.len(), tokens));
            before.extend(tokens, &self.names, self.prompt(choice.index).chars);
            choice.logprobs = Some(before);
        }
    }
}

impl Wording for CompletionWording {
    const OBJECT: &'static str = "text_completion";
    const CHUNK: &'static str = "text_completion";
    type Choice = Choice;
    type Delta = Choice;

    fn opens_with_logprobs(&self) -> bool {
        self.echo && self.logprobs.is_some()
    }

    fn opening(&self, index: usize, prompt_logprobs: Option<&[PromptToken]>) -> Option<Choice> {
        if !self.echo && !self.token_ids {
            return None;
        }
        let prompt = self.prompt(index);
        let mut choice = self.choice(index, prompt.text.clone());
        choice.prompt_token_ids = self.token_ids.then(|| prompt.ids.clone());
        self.add_tokens(&mut choice, &[], self.echoed_logprobs(index, prompt_logprobs));
        Some(choice)
    }

    fn piece(&self, index: usize, piece: Piece) -> Option<Choice> {
        if piece.text.is_empty() && self.logprobs.is_none() && !self.token_ids {
            return None;
        }
        let mut choice = self.choice(index, piece.text);
        self.add_tokens(&mut choice, &piece.tokens, TextLogprobs::default());
        Some(choice)
    }

    fn finish(&self, index: usize, finish: Finish) -> Choice {
        let mut choice = self.choice(index, String::new());
        choice.finish_reason = Some(finish.reason);
        choice.stop_reason = finish.stop_reason;
        choice.weight_versions = finish.weight_versions;
        choice
    }

    fn whole(
        &self,
        index: usize,
        sample: Sample,
        prompt_logprobs: Option<&[PromptToken]>,
    ) -> Choice {
        let prompt = self.prompt(index);
        let mut choice = self.finish(index, sample.finish);
        choice.text = format!("{}{}", prompt.text, sample.piece.text);
        choice.prompt_token_ids = self.token_ids.then(|| prompt.ids.clone());
        let list = |top| {
            PromptLogprobs::new(&prompt.ids, prompt_logprobs.unwrap_or(&[]), top, &self.names)
        };
        choice.prompt_logprobs = self.prompt_logprobs.map(list);
        let before = self.echoed_logprobs(index, prompt_logprobs);
        self.add_tokens(&mut choice, &sample.piece.tokens, before);
        choice
    }
}
