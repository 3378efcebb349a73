//! Which engine draws the samples: the one place where a name in a configuration becomes an
//! engine.

#[cfg(feature = "mistralrs")]
mod mistralrs;
#[cfg(not(feature = "mistralrs"))]
#[path = "engines/no_mistralrs.rs"]
mod mistralrs;

use crate::{
    config::{Config, EngineKind},
    error::TrainError,
};
use onpolicy_engine::{
    model::{config::ModelConfig, loading::Description},
    remote::{RemoteEngine, RemoteModel},
};
use onpolicy_plugin_api::{Engine, Options, PluginError, Plugins};
use std::sync::Arc;

/// Engines that come with the crate.
const BUILT_IN: &str = "native, mistralrs, remote, http://host:port";

/// What an engine may need to know about the model before it is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vocabulary {
    /// Number of token ids.
    pub size: usize,
    /// Tokens that end a sample.
    pub eos_token_ids: Vec<u32>,
    /// Longest sequence.
    pub max_model_len: usize,
}

impl From<&ModelConfig> for Vocabulary {
    fn from(model: &ModelConfig) -> Self {
        Self {
            size: model.vocab_size,
            eos_token_ids: model.eos_token_ids.clone(),
            max_model_len: model.max_position_embeddings,
        }
    }
}

impl From<&Description> for Vocabulary {
    fn from(model: &Description) -> Self {
        Self {
            size: model.vocab_size,
            eos_token_ids: model.eos_token_ids.clone(),
            max_model_len: model.max_model_len,
        }
    }
}

/// The engine that `engine.kind` names, if that is a plug-in's.
///
/// # Errors
/// There is no plug-in of this name, or its options are wrong.
pub fn plugin(config: &Config, plugins: &Plugins) -> Result<Option<Arc<dyn Engine>>, TrainError> {
    let EngineKind::Plugin(name) = config.engine.kind() else { return Ok(None) };
    let made = plugins.make_engine(&name, &Options(config.engine.options.clone()));
    let made = made.map_err(|error| match error {
        PluginError::Unknown { kind, name, known } => {
            let comma = if known.is_empty() { "" } else { ", " };
            PluginError::Unknown { kind, name, known: format!("{BUILT_IN}{comma}{known}") }
        }
        error => error,
    })?;
    Ok(Some(Arc::from(made)))
}

/// Starts an engine that has weights of its own. `plugin` is what [`plugin`] made.
///
/// # Errors
/// An engine that cannot be started, or is not built in.
pub fn start(
    config: &Config,
    vocabulary: &Vocabulary,
    plugin: Option<Arc<dyn Engine>>,
) -> Result<Arc<dyn Engine>, TrainError> {
    match config.engine.kind() {
        EngineKind::Remote(urls) => {
            let engine = &config.engine;
            let model = RemoteModel {
                vocab_size: vocabulary.size,
                eos_token_ids: vocabulary.eos_token_ids.clone(),
                max_model_len: vocabulary.max_model_len,
                max_samples: engine.max_num_seqs,
                max_requests: engine.max_waiting,
            };
            Ok(Arc::new(RemoteEngine::start(&urls, model, engine.remote.clone())?))
        }
        EngineKind::Mistralrs => mistralrs::start(config),
        EngineKind::Native => {
            Err(TrainError::Refused("the native engine needs weights that are loaded here".into()))
        }
        EngineKind::Plugin(name) => plugin.ok_or_else(|| {
            TrainError::Refused(format!("engine.kind = \"{name}\": there is no such engine here"))
        }),
    }
}
