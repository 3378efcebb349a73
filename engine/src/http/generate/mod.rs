//! Routes that take tokens and give tokens back, in the shapes of other servers. Each moves the
//! fields of a body to the names that [`Common`] knows; errors go on to name them as the client did.
//! Nothing is tokenized again on the way: ids that a client sends are the ids that the model reads.
//!
//! # Layout
//! - [`vllm`]: `POST /inference/v1/generate`; [`sglang`]: `POST /generate`; [`trl`]: `POST /generate/`
//!   and `POST /chat/`.
//! - `spans`: which weights made which tokens; `told`: streams.

pub mod sglang;
pub(super) mod sglang_fields;
mod spans;
mod told;
pub mod trl;
pub mod vllm;
pub(super) mod vllm_fields;

use super::body::{Fields, Paths};
use super::error::ApiError;
use super::fields::{Common, check_ids};
use super::generation::{Generation, Job};
use super::metrics::RequestClock;
use super::text::{PlacedToken, TextRules};
use super::{Admission, AppState};
use onpolicy_plugin_api::Request;
use std::sync::Arc;

/// What is asked for, apart from the prompts, and where the client wrote it.
pub(super) struct Asked {
    common: Common,
    paths: Paths,
    /// Tokens to generate where the client does not say.
    default_max_tokens: usize,
}

impl Asked {
    /// Takes the fields that were brought to the names of [`Common`], and checks that none is left.
    ///
    /// # Errors
    /// Those of [`Common::take`], about the fields that the client wrote.
    fn take(mut fields: Fields, state: &AppState) -> Result<Self, ApiError> {
        let paths = fields.paths();
        let common = Common::take(&mut fields, state).map_err(|error| paths.place(error))?;
        fields.finish()?;
        Ok(Self { common, paths, default_max_tokens: usize::MAX })
    }

    /// The request for a prompt.
    ///
    /// # Errors
    /// 400 if the prompt is empty, or does not fit the model.
    fn request(&self, prompt: Vec<u32>, state: &AppState) -> Result<Request, ApiError> {
        if prompt.is_empty() {
            let error = ApiError::invalid("prompt", "must hold at least one token");
            return Err(self.paths.place(error));
        }
        let params = check_ids("prompt", &prompt, &state.info).and_then(|()| {
            self.common.params_for(prompt.len(), self.default_max_tokens, &state.info)
        });
        let params = params.map_err(|error| self.paths.place(error))?;
        Ok(self.common.request(prompt, params))
    }

    /// All requests, for the engine. No text is made where `text` is not asked for, unless a stop
    /// string has to be found in it.
    fn job(&self, requests: Vec<Request>, text: bool, state: &AppState) -> Job {
        let rules = self.common.text_rules(&state.info);
        let tokens_only = !text && rules.stop.is_empty();
        let rules = Arc::new(TextRules { tokens_only, ..(*rules).clone() });
        let structured = self.common.structured_field();
        Job { requests, rules, stream: self.common.stream, structured }
    }

    /// Starts the job.
    ///
    /// # Errors
    /// The engine's refusal, about the field that the client wrote.
    fn start(
        &self,
        job: Job,
        state: &AppState,
        admission: Admission,
        clock: RequestClock,
    ) -> Result<Generation, ApiError> {
        let generation = Generation::start(state, job, admission, clock);
        let generation = generation.map_err(|error| self.paths.place(error))?;
        Ok(match &self.common.request_id {
            Some(id) => generation.named(id),
            None => generation,
        })
    }
}

fn ids_of(tokens: &[PlacedToken]) -> Vec<u32> {
    tokens.iter().map(|placed| placed.token.id).collect()
}
