//! What a request may ask for.

use crate::engine::check::check_fields;
use onpolicy_plugin_api::{EngineError, ModelInfo, Request};

/// Checks a request; how many tokens may follow its prompt.
pub(super) fn room(request: &Request, model: &ModelInfo) -> Result<usize, EngineError> {
    let params = &request.params;
    if params.prompt_logprobs.is_some() {
        let reason = "is not supported by the engine mistralrs";
        return Err(EngineError::invalid("prompt_logprobs", reason));
    }
    check_fields(request, model)?;
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
