//! The fields of `/inference/v1/generate`, as vLLM has them.

use super::Asked;
use crate::http::AppState;
use crate::http::body::Fields;
use crate::http::error::ApiError;
use crate::http::fields::check_top;
use crate::http::neutral::{self, Only, Rule};
use crate::http::sampling::engine_prompt_logprobs;

/// Fields of the body that have the same meaning on all generating routes.
pub const BODY: [&str; 6] =
    ["model", "request_id", "stream", "stream_options", "cache_salt", "priority"];

/// The same in vLLM's `SamplingParams`.
pub const SAMPLING: [&str; 22] = [
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "max_tokens",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "logprobs_mode",
    "structured_outputs",
];

/// Images, transfers between servers and reasoning parsers: there are none here.
pub const BODY_NEUTRAL: [Rule; 7] = [
    ("features", Only::Empty),
    ("content_parts", Only::Empty),
    ("token_offsets", Only::Nothing),
    ("kv_transfer_params", Only::Empty),
    ("ec_transfer_params", Only::Empty),
    ("reasoning_ended", Only::True),
    ("reasoning_parser_kwargs", Only::Empty),
];

/// `flat_logprobs` says how vLLM holds log-probs in its memory; an answer shows nothing of it.
pub const SAMPLING_NEUTRAL: [Rule; 10] = [
    ("flat_logprobs", Only::Bool),
    ("logprob_token_ids", Only::Empty),
    ("prompt_logprob_token_ids", Only::Empty),
    ("prompt_logprob_start", Only::Zero),
    ("trace_decode_token_ids", Only::Empty),
    ("extra_args", Only::Empty),
    ("skip_reading_prefix_cache", Only::False),
    ("stream_interval", Only::One),
    ("thinking_token_budget", Only::Nothing),
    ("repetition_detection", Only::Nothing),
];

/// What is asked for.
pub struct Body {
    pub asked: Asked,
    pub prompt: Vec<u32>,
    /// How many of the likeliest tokens to list with each prompt token.
    pub prompt_top: usize,
    /// Log-probs of the tokens, and how many tokens to name at each position.
    pub logprobs: Option<usize>,
    /// Show the text beside the tokens.
    pub text: bool,
    /// Repeat the prompt's tokens.
    pub return_prompt: bool,
}

impl Body {
    /// Takes all fields.
    ///
    /// # Errors
    /// 400 naming the field that is wrong or not supported; 404 for another model.
    pub fn take(mut body: Fields, state: &AppState) -> Result<Self, ApiError> {
        let mut sampling = Fields::of(body.require("sampling_params")?, "sampling_params")?;
        let mut common = Fields::default();
        common.adopt(&mut body, "token_ids", "prompt");
        let prompt = common.require("prompt")?;
        for name in BODY {
            common.adopt(&mut body, name, name);
        }
        for name in SAMPLING {
            common.adopt(&mut sampling, name, name);
        }
        let mut asked = Asked::take(common, state)?;
        let text = output_mode(&mut body)?;
        let logprobs = top(&mut sampling, "logprobs")?;
        // The drawn token is one of those named, unless they are those of a chat message.
        let others = logprobs.filter(|named| text || *named > 1);
        asked.common.params.top_logprobs = others.unwrap_or(0);
        let prompt_top = top(&mut sampling, "prompt_logprobs")?;
        asked.common.params.prompt_logprobs = engine_prompt_logprobs(prompt_top);
        check_output(&mut sampling, &asked, text)?;
        neutral::check(&mut body, &BODY_NEUTRAL)?;
        neutral::check(&mut sampling, &SAMPLING_NEUTRAL)?;
        let return_prompt = body.take_or("return_token_ids", false)?;
        body.finish()?;
        sampling.finish()?;
        let prompt_top = prompt_top.unwrap_or(0);
        Ok(Self { asked, prompt, prompt_top, logprobs, text, return_prompt })
    }
}

/// Takes a number of tokens to name at each position.
///
/// # Errors
/// 400 if it is not a number, or too large.
pub fn top(fields: &mut Fields, name: &str) -> Result<Option<usize>, ApiError> {
    let count = fields.take(name)?;
    check_top(&fields.path(name), count.unwrap_or(0))?;
    Ok(count)
}

/// True for "text".
fn output_mode(body: &mut Fields) -> Result<bool, ApiError> {
    match body.take::<String>("output_mode")?.as_deref() {
        None | Some("tokens") => Ok(false),
        Some("text") => Ok(true),
        Some(_) => Err(ApiError::invalid("output_mode", "must be \"tokens\" or \"text\"")),
    }
}

/// Takes the fields about how the answer comes, which `stream` and `output_mode` decide here.
fn check_output(sampling: &mut Fields, asked: &Asked, text: bool) -> Result<(), ApiError> {
    let needs_text = text || !asked.common.stop.is_empty();
    if !sampling.take_or("detokenize", true)? && needs_text {
        let rule = "must be true for stop strings and for \"output_mode\": \"text\"";
        return Err(ApiError::invalid(sampling.path("detokenize"), rule));
    }
    // vLLM numbers its kinds: everything so far, what is new, everything at the end.
    let kinds = if asked.common.stream { [0, 1] } else { [0, 2] };
    if sampling.take::<u8>("output_kind")?.is_some_and(|kind| !kinds.contains(&kind)) {
        let rule = "must be 1 for a stream and 2 for a whole answer; leave it out";
        return Err(ApiError::invalid(sampling.path("output_kind"), rule));
    }
    // Which layers' expert choices to leave out of an answer that has none of them.
    sampling.take::<usize>("routed_experts_prompt_start")?;
    Ok(())
}
