//! What a request may ask for.

use onpolicy_plugin_api::{EngineError, LogprobsMode, ModelInfo, Request, SamplingParams};

/// Checks a request; how many tokens may follow its prompt.
pub(super) fn room(request: &Request, model: &ModelInfo) -> Result<usize, EngineError> {
    let params = &request.params;
    params.validate()?;
    refuse_unsupported(params)?;
    check_ids("prompt", &request.prompt, model)?;
    check_ids("stop_token_ids", &params.stop_token_ids, model)?;
    if params.n > model.max_samples {
        let reason = format!("is {}; must be at most {}", params.n, model.max_samples);
        return Err(EngineError::invalid("n", reason));
    }
    let (prompt, longest) = (request.prompt.len(), model.max_model_len);
    if prompt == 0 {
        return Err(EngineError::invalid("prompt", "is empty; give at least one token"));
    }
    if prompt >= longest {
        let reason = format!(
            "has {prompt} tokens; the longest sequence has {longest}, of which at least one is \
             generated: shorten the prompt to {}",
            longest - 1
        );
        return Err(EngineError::invalid("prompt", reason));
    }
    Ok(longest - prompt)
}

fn check_ids(field: &str, ids: &[u32], model: &ModelInfo) -> Result<(), EngineError> {
    let vocab = model.vocab_size;
    let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) else { return Ok(()) };
    let reason = format!("token id {id} is not below the vocabulary's {vocab}");
    Err(EngineError::invalid(field, reason))
}

/// Refuses what mistral.rs cannot give.
fn refuse_unsupported(params: &SamplingParams) -> Result<(), EngineError> {
    let asked = [
        ("prompt_logprobs", params.prompt_logprobs.is_some()),
        ("grammar", params.grammar.is_some()),
        ("repetition_penalty", params.repetition_penalty != 1.0),
        ("presence_penalty", params.presence_penalty != 0.0),
        ("frequency_penalty", params.frequency_penalty != 0.0),
        ("logit_bias", !params.logit_bias.is_empty()),
        ("allowed_token_ids", params.allowed_token_ids.is_some()),
        ("bad_words", !params.bad_words.is_empty()),
        ("logprobs_mode", params.logprobs_mode != LogprobsMode::Processed),
    ];
    match asked.iter().find(|(_, asked)| *asked) {
        Some((field, _)) => {
            Err(EngineError::invalid(*field, "is not supported by the engine mistralrs"))
        }
        None => Ok(()),
    }
}
