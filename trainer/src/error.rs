//! Why a run stopped.

use onpolicy_engine::{
    chat::ChatError, collect::CollectError, device::PlacementError, model::loading::LoadError,
    torch::TorchError,
};
use onpolicy_plugin_api::{EngineError, PluginError};
use std::path::{Path, PathBuf};

/// Why a run stopped.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    /// A plug-in's name or options.
    #[error(transparent)]
    Plugin(#[from] PluginError),
    /// The model could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The device that the configuration names is not here.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// A problem could not be turned into a prompt.
    #[error("a problem could not be turned into a prompt: {0}")]
    Chat(#[from] ChatError),
    /// The engine refused or failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The rollouts were not finished.
    #[error("rollouts: {0}")]
    Rollout(#[from] CollectError),
    /// Forward, backward or optimizer.
    #[error(transparent)]
    Torch(#[from] TorchError),
    /// The metrics file.
    #[error(transparent)]
    Metrics(#[from] crate::metrics::MetricsError),
    /// The pictures.
    #[error(transparent)]
    Plot(#[from] crate::plot::PlotError),
    /// A file of the run.
    #[error("{path}: {reason}")]
    File { path: PathBuf, reason: String },
    /// The run cannot go on; the text says why and what to do.
    #[error("{0}")]
    Refused(String),
}

impl TrainError {
    /// An error about a file of the run.
    pub fn file(path: &Path, reason: impl ToString) -> Self {
        Self::File { path: path.to_path_buf(), reason: reason.to_string() }
    }
}
