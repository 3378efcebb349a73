//! What is refused before it is sent to the engine's thread.

use crate::scheduler::SchedulerConfig;
use onpolicy_plugin_api::{EngineError, ModelInfo, Request, SamplingParams};
use std::collections::HashSet;

/// Checks that a request can be served at all.
///
/// # Errors
/// [`EngineError::Invalid`] naming the field, and what would do.
pub fn check(
    request: &Request,
    info: &ModelInfo,
    limits: &SchedulerConfig,
) -> Result<(), EngineError> {
    check_fields(request, info)?;
    let params = &request.params;
    limits.admissible_len(request.prompt.len(), params.n, params.max_tokens).map(|_| ())
}

/// Checks what does not depend on the engine's size.
///
/// # Errors
/// [`EngineError::Invalid`] naming the field, and what would do.
pub(crate) fn check_fields(request: &Request, info: &ModelInfo) -> Result<(), EngineError> {
    let params = &request.params;
    params.validate()?;
    let vocab = info.vocab_size;
    check_ids("prompt", &request.prompt, vocab)?;
    check_ids("stop_token_ids", &params.stop_token_ids, vocab)?;
    check_ids("allowed_token_ids", params.allowed_token_ids.iter().flatten(), vocab)?;
    check_ids("bad_words", params.bad_words.iter().flatten(), vocab)?;
    check_ids("logit_bias", params.logit_bias.iter().map(|(id, _)| id), vocab)?;
    check_biases(params)?;
    check_choice(params, &info.eos_token_ids)?;
    if params.grammar.is_some() && params.ignore_eos {
        let rule = "cannot be combined with a grammar, whose end is the end of the text";
        return Err(EngineError::invalid("ignore_eos", rule));
    }
    if request.cache_salt.as_ref().is_some_and(String::is_empty) {
        return Err(EngineError::invalid("cache_salt", "must not be empty"));
    }
    Ok(())
}

fn check_ids<'a>(
    field: &str,
    ids: impl IntoIterator<Item = &'a u32>,
    vocab: usize,
) -> Result<(), EngineError> {
    match ids.into_iter().find(|&&id| id as usize >= vocab) {
        Some(id) => {
            let reason = format!("token id {id} is not below the vocabulary's {vocab}");
            Err(EngineError::invalid(field, reason))
        }
        None => Ok(()),
    }
}

fn check_biases(params: &SamplingParams) -> Result<(), EngineError> {
    let mut seen = HashSet::new();
    match params.logit_bias.iter().find(|(id, _)| !seen.insert(id)) {
        Some((id, _)) => Err(EngineError::invalid("logit_bias", format!("names token {id} twice"))),
        None => Ok(()),
    }
}

/// Of the allowed tokens, one at least may be drawn at the beginning.
fn check_choice(params: &SamplingParams, eos_token_ids: &[u32]) -> Result<(), EngineError> {
    let Some(allowed) = &params.allowed_token_ids else { return Ok(()) };
    let eos = if params.ignore_eos { &[] } else { eos_token_ids };
    let ends = |id: &u32| params.stop_token_ids.contains(id) || eos.contains(id);
    let bad = |id: &u32| params.bad_words.iter().any(|word| word[..] == [*id]);
    let drawn = |id: &u32| !bad(id) && (params.min_tokens == 0 || !ends(id));
    if allowed.iter().any(drawn) {
        return Ok(());
    }
    let reason = "bad_words and min_tokens forbid all of them: no token is left to draw";
    Err(EngineError::invalid("allowed_token_ids", reason))
}
