//! Why a model could not be loaded.

use std::path::{Path, PathBuf};

/// Why a model could not be loaded. Nothing is served from a model that fails to load.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The name is neither a path that exists nor a hub id.
    #[error("no model at '{spec}': {hint}")]
    NotFound { spec: String, hint: String },
    /// The operating system refused to read a file.
    #[error("cannot read {}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    /// A file is not what its format says.
    #[error("{}: {reason}", path.display())]
    Corrupt { path: PathBuf, reason: String },
    /// The model needs something that this engine does not do.
    #[error("{what} '{found}' is not supported; supported: {supported}")]
    Unsupported { what: String, found: String, supported: String },
    /// A configuration key is missing, or its value makes no sense.
    #[error("model configuration: {key}: {reason}")]
    Config { key: String, reason: String },
    /// A tensor is missing, superfluous, or has the wrong shape or type.
    #[error("tensor {name}: {reason}")]
    Tensor { name: String, reason: String },
    /// The tokenizer cannot be built.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The hub did not give the model.
    #[error("'{id}' is not a path here, and as a hub id it failed: {reason}")]
    Hub { id: String, reason: String },
}

impl LoadError {
    /// A [`LoadError::Unsupported`].
    pub fn unsupported(
        what: impl Into<String>,
        found: impl Into<String>,
        supported: impl Into<String>,
    ) -> Self {
        Self::Unsupported { what: what.into(), found: found.into(), supported: supported.into() }
    }

    /// A [`LoadError::Config`].
    pub fn config(key: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Config { key: key.into(), reason: reason.into() }
    }

    /// A [`LoadError::Tensor`].
    pub fn tensor(name: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Tensor { name: name.into(), reason: reason.into() }
    }

    /// A [`LoadError::Io`] about `path`, for `map_err`.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { path, source }
    }

    /// A [`LoadError::Corrupt`].
    pub fn corrupt(path: &Path, reason: impl Into<String>) -> Self {
        Self::Corrupt { path: path.to_path_buf(), reason: reason.into() }
    }
}
