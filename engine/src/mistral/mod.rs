//! An engine over mistral.rs: any text model that it loads, behind the [`Engine`] trait.
//!
//! mistral.rs computes logits, one row for each sample and step. The rows come here (it calls this
//! a logits processor), and this crate's own sampler draws from them; mistral.rs is told the token.
//! So ids, log-probs, entropies and seeds mean what they mean in the native engine, and text is
//! made by [`ChatTokenizer`] alone.
//!
//! # Layout
//! - [`options`]: how to load and serve.
//! - `instance`: one version of the weights, in memory.
//! - [`engine`]: the handle; requests in, weights in. `shared`: what it shares with the samples.
//! - `params`: what a request may ask for.
//! - `queue`: requests that wait and run. No tensors.
//! - `live`: a request that has not ended; `sample`: one of its samples, drawn row by row.
//! - `line`: what mistral.rs answers about a sample, and how to hang up on it.
//!
//! [`Engine`]: onpolicy_plugin_api::Engine

pub mod engine;
mod instance;
mod line;
mod live;
pub mod options;
mod params;
mod queue;
mod sample;
mod shared;

pub use engine::MistralEngine;
pub use options::{Dtype, Options};

use crate::chat::ChatTokenizer;
use instance::Weights;
use onpolicy_plugin_api::EngineError;
use std::sync::{Mutex, MutexGuard};

/// A model that is served: what the HTTP routes and the trainer need.
pub struct Served {
    /// The engine.
    pub engine: MistralEngine,
    /// The model's tokenizer and chat template.
    pub tokenizer: ChatTokenizer,
}

/// Loads a model and serves it. `spec` is a directory with `config.json`, `tokenizer.json` and
/// safetensors, a GGUF file, a UQFF file with the files of its directory beside it, or a hub id.
/// Blocks until the model is in memory.
///
/// # Errors
/// [`EngineError::Invalid`]: an option makes no sense, or the model cannot be read, or mistral.rs
/// cannot load it.
pub fn start(spec: &str, options: Options) -> Result<Served, EngineError> {
    options.validate()?;
    let found = Weights::find(spec);
    let found = found.map_err(|error| EngineError::invalid("model", error.to_string()));
    let (model, weights) = found?;
    let engine = MistralEngine::start(&model, &weights, options)?;
    Ok(Served { engine, tokenizer: model.tokenizer })
}

/// Locks; a thread that panicked while it held the lock does not take the others down.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poison| poison.into_inner())
}
