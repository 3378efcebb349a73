//! The fields of `/generate`, as SGLang has them.

use super::Asked;
use crate::http::AppState;
use crate::http::body::Fields;
use crate::http::error::ApiError;
use crate::http::fields::check_top;
use crate::http::neutral::{self, Only, Rule};
use crate::http::prompt::Prompt;
use serde_json::{Value, json};
use std::collections::HashSet;

/// SGLang's `max_new_tokens` where it is not given.
const DEFAULT_MAX_NEW_TOKENS: usize = 128;

/// Fields of `sampling_params` and their names on the other routes.
pub const SAMPLING: [(&str, &str); 20] = [
    ("n", "n"),
    ("temperature", "temperature"),
    ("top_p", "top_p"),
    ("top_k", "top_k"),
    ("min_p", "min_p"),
    ("sampling_seed", "seed"),
    ("max_new_tokens", "max_tokens"),
    ("min_new_tokens", "min_tokens"),
    ("stop", "stop"),
    ("stop_token_ids", "stop_token_ids"),
    ("no_stop_trim", "include_stop_str_in_output"),
    ("ignore_eos", "ignore_eos"),
    ("skip_special_tokens", "skip_special_tokens"),
    ("spaces_between_special_tokens", "spaces_between_special_tokens"),
    ("presence_penalty", "presence_penalty"),
    ("frequency_penalty", "frequency_penalty"),
    ("repetition_penalty", "repetition_penalty"),
    ("logit_bias", "logit_bias"),
    ("json_schema", "guided_json"),
    ("regex", "guided_regex"),
];

pub const SAMPLING_NEUTRAL: [Rule; 6] = [
    ("ebnf", Only::Nothing),
    ("structural_tag", Only::Nothing),
    ("stop_regex", Only::Empty),
    ("custom_params", Only::Empty),
    ("stream_interval", Only::One),
    ("beam_width", Only::One),
];

/// Images, adapters, sessions, expert choices and transfers between servers: there are none here.
pub const BODY_NEUTRAL: [Rule; 37] = [
    ("input_embeds", Only::Nothing),
    ("image_data", Only::Empty),
    ("video_data", Only::Empty),
    ("audio_data", Only::Empty),
    ("mm_hashes", Only::Empty),
    ("mm_content_hashes", Only::Empty),
    ("modalities", Only::Empty),
    ("use_audio_in_video", Only::False),
    ("video_config", Only::Empty),
    ("token_ids_logprob", Only::Empty),
    ("return_sampling_mask", Only::False),
    ("return_flat_raw_top_logprobs", Only::False),
    ("return_flat_raw_top_logprobs_b64", Only::False),
    ("return_hidden_states", Only::False),
    ("return_routed_experts", Only::False),
    ("routed_experts_start_len", Only::Zero),
    ("return_indexer_topk", Only::False),
    ("return_entropy", Only::False),
    ("return_bytes", Only::False),
    ("session_params", Only::Empty),
    ("lora_path", Only::Nothing),
    ("lora_id", Only::Nothing),
    ("custom_logit_processor", Only::Nothing),
    ("positional_embed_overrides", Only::Nothing),
    ("bootstrap_host", Only::Nothing),
    ("bootstrap_port", Only::Nothing),
    ("bootstrap_room", Only::Nothing),
    ("bootstrap_pair_key", Only::Nothing),
    ("routed_dp_rank", Only::Zero),
    ("data_parallel_rank", Only::Zero),
    ("routing_key", Only::Nothing),
    ("background", Only::False),
    ("require_reasoning", Only::False),
    ("max_thinking_tokens", Only::Nothing),
    ("log_metrics", Only::True),
    ("no_logs", Only::Bool),
    ("custom_labels", Only::Empty),
];

/// What is asked for.
pub struct Body {
    pub asked: Asked,
    pub prompts: Vec<Prompt>,
    /// The client sent a list of prompts.
    pub batch: bool,
    /// The client's name of each prompt.
    pub rids: Option<Vec<String>>,
    pub logprobs: Option<Logprobs>,
    /// Repeat the prompts' tokens.
    pub return_prompt: bool,
}

/// Which log-probs to show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Logprobs {
    /// The first token of the prompt to show; none of it if absent.
    pub start: Option<usize>,
    /// How many of the likeliest tokens to show at each position.
    pub top: usize,
    /// Show the tokens' text too.
    pub text: bool,
}

impl Body {
    /// Takes all fields.
    ///
    /// # Errors
    /// 400 naming the field that is wrong or not supported.
    pub fn take(mut body: Fields, state: &AppState) -> Result<Self, ApiError> {
        let sampling = body.take_value("sampling_params").unwrap_or_else(|| json!({}));
        if sampling.is_array() {
            let rule = "must be one object for all prompts; send a request for each otherwise";
            return Err(ApiError::invalid("sampling_params", rule));
        }
        let mut sampling = Fields::of(sampling, "sampling_params")?;
        let mut common = Fields::default();
        for (name, to) in SAMPLING {
            common.adopt(&mut sampling, name, to);
        }
        let rids = take_rids(&mut body, &mut common)?;
        adopt_shared(&mut body, &mut common)?;
        let (prompts, batch) = take_prompts(&mut body, &mut common, state)?;
        let mut asked = Asked::take(common, state)?;
        // SGLang begins with the highest number, the engine with the lowest.
        asked.common.priority = asked.common.priority.saturating_neg();
        asked.default_max_tokens = DEFAULT_MAX_NEW_TOKENS;
        let logprobs = take_logprobs(&mut body)?;
        if let Some(logprobs) = logprobs {
            asked.common.params.top_logprobs = logprobs.top;
            asked.common.params.prompt_logprobs = logprobs.start.map(|_| logprobs.top);
        }
        let return_prompt = body.take_or("return_prompt_token_ids", false)?;
        neutral::check(&mut body, &BODY_NEUTRAL)?;
        neutral::check(&mut sampling, &SAMPLING_NEUTRAL)?;
        body.finish()?;
        sampling.finish()?;
        if rids.as_ref().is_some_and(|rids| rids.len() != prompts.len()) {
            return Err(ApiError::invalid("rid", "must be one, or one for each prompt"));
        }
        Ok(Self { asked, prompts, batch, rids, logprobs, return_prompt })
    }
}

/// Brings the body's own fields to the names of the other routes. `session_id` names who asks, as
/// `user` does there, and `extra_key` keeps prefixes apart, as `cache_salt` does.
fn adopt_shared(body: &mut Fields, common: &mut Fields) -> Result<(), ApiError> {
    for name in ["model", "stream", "priority"] {
        common.adopt(body, name, name);
    }
    common.adopt(body, "session_id", "user");
    let extra_key = body.get("extra_key").is_some();
    if extra_key && body.get("cache_salt").is_some() {
        return Err(ApiError::invalid("extra_key", "cannot be combined with cache_salt"));
    }
    common.adopt(body, if extra_key { "extra_key" } else { "cache_salt" }, "cache_salt");
    Ok(())
}

/// Takes a list of names; a single one goes to `request_id`.
fn take_rids(body: &mut Fields, common: &mut Fields) -> Result<Option<Vec<String>>, ApiError> {
    if !body.get("rid").is_some_and(Value::is_array) {
        common.adopt(body, "rid", "request_id");
        return Ok(None);
    }
    let rids: Vec<String> = body.require("rid")?;
    let distinct: HashSet<&String> = rids.iter().collect();
    if distinct.len() < rids.len() {
        return Err(ApiError::invalid("rid", "must not hold the same name twice"));
    }
    Ok(Some(rids))
}

/// Takes `text` or `input_ids`, and whether it is a list of prompts.
fn take_prompts(
    body: &mut Fields,
    common: &mut Fields,
    state: &AppState,
) -> Result<(Vec<Prompt>, bool), ApiError> {
    let (name, batch) = match (body.get("text"), body.get("input_ids")) {
        (Some(text), None) => ("text", text.is_array()),
        (None, Some(ids)) => ("input_ids", ids[0].is_array()),
        (None, None) => return Err(ApiError::invalid("input_ids", "is required, or text")),
        _ => return Err(ApiError::invalid("input_ids", "cannot be combined with text")),
    };
    common.adopt(body, name, "prompt");
    let paths = common.paths();
    let prompts = Prompt::take_all(common, state).map_err(|error| paths.place(error))?;
    let is_text = |prompt: &Prompt| matches!(prompt, Prompt::Text(_));
    if prompts.iter().any(|prompt| is_text(prompt) != (name == "text")) {
        let rule = match name {
            "text" => "must be a string or a list of strings",
            _ => "must be a list of token ids or a list of such lists",
        };
        return Err(ApiError::invalid(name, rule));
    }
    Ok((prompts, batch))
}

fn take_logprobs(body: &mut Fields) -> Result<Option<Logprobs>, ApiError> {
    let wanted = body.take_or("return_logprob", false)?;
    let start = body.take_or("logprob_start_len", -1i64)?;
    let top = body.take_or("top_logprobs_num", 0)?;
    let text = body.take_or("return_text_in_logprobs", false)?;
    check_top("top_logprobs_num", top)?;
    if start < -1 {
        return Err(ApiError::invalid("logprob_start_len", "must be -1 or a place in the prompt"));
    }
    let without = [("logprob_start_len", start != -1), ("top_logprobs_num", top > 0)];
    match without.iter().find(|(_, set)| *set && !wanted) {
        Some((name, _)) => Err(ApiError::invalid(*name, "needs \"return_logprob\": true")),
        None => Ok(wanted.then_some(Logprobs { start: usize::try_from(start).ok(), top, text })),
    }
}
