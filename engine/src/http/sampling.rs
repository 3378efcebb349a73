//! The request fields that say how to sample, at the top of a body or in an object of their own.

use super::{AppState, body::Fields, error::ApiError, fields::check_ids};
use onpolicy_plugin_api::sampling::MAX_TOP_LOGPROBS;
use onpolicy_plugin_api::{LogprobsMode, SamplingParams};
use serde_json::{Map, Number, Value};

/// Largest bias of a token, in either direction.
const MAX_BIAS: f64 = 100.0;
/// Bad words in one request.
const MAX_BAD_WORDS: usize = 1024;

/// Takes them, but for `max_tokens` and those that each route names in its own way: `logprobs` and
/// `prompt_logprobs` (see [`take_prompt_logprobs`]). Ranges are checked by
/// [`SamplingParams::validate`], once all are known.
///
/// # Errors
/// 400 naming the field that is wrong.
pub fn take(fields: &mut Fields, state: &AppState) -> Result<SamplingParams, ApiError> {
    let default = SamplingParams::default();
    let params = SamplingParams {
        n: fields.take_or("n", default.n)?,
        temperature: fields.take_or("temperature", default.temperature)?,
        top_k: top_k(fields)?,
        top_p: fields.take_or("top_p", default.top_p)?,
        min_p: fields.take_or("min_p", default.min_p)?,
        repetition_penalty: fields.take_or("repetition_penalty", default.repetition_penalty)?,
        presence_penalty: fields.take_or("presence_penalty", default.presence_penalty)?,
        frequency_penalty: fields.take_or("frequency_penalty", default.frequency_penalty)?,
        logit_bias: logit_bias(fields)?,
        allowed_token_ids: allowed_token_ids(fields)?,
        bad_words: bad_words(fields, state)?,
        seed: seed(fields)?,
        min_tokens: fields.take_or("min_tokens", 0)?,
        ignore_eos: fields.take_or("ignore_eos", false)?,
        stop_token_ids: fields.take_or("stop_token_ids", Vec::new())?,
        logprobs_mode: logprobs_mode(fields)?,
        ..default
    };
    if params.n > state.info.max_samples {
        let rule = format!("must be at most {}", state.info.max_samples);
        return Err(ApiError::invalid(fields.path("n"), rule));
    }
    let biased: Vec<u32> = params.logit_bias.iter().map(|(id, _)| *id).collect();
    let allowed = params.allowed_token_ids.as_deref().unwrap_or(&[]);
    check_ids(&fields.path("stop_token_ids"), &params.stop_token_ids, &state.info)?;
    check_ids(&fields.path("allowed_token_ids"), allowed, &state.info)?;
    check_ids(&fields.path("logit_bias"), &biased, &state.info)?;
    Ok(params)
}

/// Takes `prompt_logprobs`: how many of the likeliest tokens are shown beside each prompt token.
///
/// # Errors
/// 400 if it is out of range.
pub fn take_prompt_logprobs(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let Some(top) = fields.take::<i64>("prompt_logprobs")? else { return Ok(None) };
    let refuse = |rule: String| ApiError::invalid(fields.path("prompt_logprobs"), rule);
    if top == -1 {
        let rule = format!("the whole vocabulary is not returned; ask for 0 to {MAX_TOP_LOGPROBS}");
        return Err(refuse(rule));
    }
    let top = usize::try_from(top).ok().filter(|top| *top <= MAX_TOP_LOGPROBS);
    top.map(Some).ok_or_else(|| refuse(format!("must be between 0 and {MAX_TOP_LOGPROBS}")))
}

/// What the engine is asked for when `top` of the likeliest tokens are shown: one at least, since
/// the prompt token's rank is shown too.
pub fn engine_prompt_logprobs(top: Option<usize>) -> Option<usize> {
    top.map(|top| top.max(1))
}

/// -1 and 0 keep all tokens.
fn top_k(fields: &mut Fields) -> Result<usize, ApiError> {
    let top_k = fields.take_or("top_k", 0i64)?;
    if top_k == -1 {
        return Ok(0);
    }
    let error = |_| ApiError::invalid(fields.path("top_k"), "must be -1, 0 or positive");
    usize::try_from(top_k).map_err(error)
}

/// A whole number in floating point, 7.0, as an integer of 64 bits.
fn whole(number: f64) -> Option<u64> {
    if number.fract() != 0.0 || !(i64::MIN as f64..u64::MAX as f64).contains(&number) {
        return None;
    }
    Some(if number < 0.0 { (number as i64).cast_unsigned() } else { number as u64 })
}

/// Any integer of 64 bits, with or without a sign.
fn seed(fields: &mut Fields) -> Result<Option<u64>, ApiError> {
    let Some(number) = fields.take::<Number>("seed")? else { return Ok(None) };
    let signed = || number.as_i64().map(i64::cast_unsigned);
    let seed = number.as_u64().or_else(signed).or_else(|| whole(number.as_f64()?));
    let error = || ApiError::invalid(fields.path("seed"), "must be an integer of at most 64 bits");
    seed.map(Some).ok_or_else(error)
}

/// An object from token ids, written as strings, to numbers.
fn logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>, ApiError> {
    let map = fields.take_or("logit_bias", Map::new())?;
    let path = fields.path("logit_bias");
    let biases = map.into_iter().map(|(id, bias)| {
        let id = id.parse::<u32>().map_err(|_| {
            ApiError::invalid(&path, format!("'{id}' is no token id; send {{\"7\": -100}}"))
        })?;
        let bias = bias.as_f64().filter(|bias| (-MAX_BIAS..=MAX_BIAS).contains(bias));
        let rule = format!("must hold numbers between -{MAX_BIAS} and {MAX_BIAS}");
        Ok((id, bias.ok_or_else(|| ApiError::invalid(&path, rule))? as f32))
    });
    biases.collect()
}

fn allowed_token_ids(fields: &mut Fields) -> Result<Option<Vec<u32>>, ApiError> {
    let allowed = fields.take::<Vec<u32>>("allowed_token_ids")?;
    Ok(allowed.map(|mut ids| {
        ids.sort_unstable();
        ids.dedup();
        ids
    }))
}

/// Each word is forbidden as it is and after a space, where that makes other tokens.
fn bad_words(fields: &mut Fields, state: &AppState) -> Result<Vec<Vec<u32>>, ApiError> {
    let words: Vec<String> = fields.take_or("bad_words", Vec::new())?;
    let path = fields.path("bad_words");
    if words.len() > MAX_BAD_WORDS {
        return Err(ApiError::invalid(path, format!("must be at most {MAX_BAD_WORDS} strings")));
    }
    let mut sequences: Vec<Vec<u32>> = Vec::with_capacity(2 * words.len());
    for word in &words {
        let word = word.trim_start();
        if word.is_empty() {
            return Err(ApiError::invalid(path, "must not hold an empty word"));
        }
        for text in [word.to_string(), format!(" {word}")] {
            let ids = state.tokenizer.encode(&text);
            let ids = ids.map_err(|e| ApiError::invalid(&path, e.to_string()))?;
            // A sequence that ends like another one is never completed anyway.
            if !ids.is_empty() && !sequences.iter().any(|known| ids.ends_with(known)) {
                sequences.push(ids);
            }
        }
    }
    Ok(sequences)
}

fn logprobs_mode(fields: &mut Fields) -> Result<LogprobsMode, ApiError> {
    let Some(mode) = fields.take_value("logprobs_mode") else { return Ok(LogprobsMode::default()) };
    match mode {
        Value::String(mode) if ["processed", "processed_logprobs"].contains(&mode.as_str()) => {
            Ok(LogprobsMode::Processed)
        }
        Value::String(mode) if ["raw", "raw_logprobs"].contains(&mode.as_str()) => {
            Ok(LogprobsMode::Raw)
        }
        _ => {
            let rule = "must be \"processed\" or \"raw\"";
            Err(ApiError::invalid(fields.path("logprobs_mode"), rule))
        }
    }
}
