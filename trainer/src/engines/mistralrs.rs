//! mistral.rs over the configured model.

use crate::{config::Config, error::TrainError};
use onpolicy_engine::mistral::{self, Dtype};
use onpolicy_plugin_api::{Engine, EngineError, Options};
use serde::Deserialize;
use std::sync::Arc;

/// `engine.options` of mistral.rs.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Keys {
    /// In-situ quantisation, as mistral.rs names it.
    isq: Option<String>,
    /// The type that weights of a directory are served in.
    dtype: Dtype,
    /// Most samples that run at a time, others wait; on a CPU it can only be one.
    max_running: Option<usize>,
}

/// Loads the model and serves it.
///
/// # Errors
/// An option is wrong, or mistral.rs cannot load the model.
pub fn start(config: &Config) -> Result<Arc<dyn Engine>, TrainError> {
    let engine = &config.engine;
    let keys: Keys = Options(engine.options.clone())
        .parse()
        .map_err(|reason| EngineError::invalid("engine.options", reason))?;
    let default = mistral::Options::default();
    let options = mistral::Options {
        name: config.model.name.clone(),
        isq: keys.isq,
        dtype: keys.dtype,
        max_num_seqs: keys.max_running.unwrap_or(default.max_num_seqs),
        max_waiting: engine.max_waiting,
        max_samples: engine.max_num_seqs,
        max_model_len: engine.max_model_len,
    };
    Ok(Arc::new(mistral::start(&config.model.path, options)?.engine))
}
