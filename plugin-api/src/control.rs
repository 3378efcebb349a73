//! What the owner of an engine does to it: hold it, change its weights, take back its memory.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What happens to running and waiting samples when an engine is paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PauseMode {
    /// They end at once, with [`FinishReason::Abort`](crate::FinishReason::Abort).
    Abort,
    /// Those that run are finished first; those that wait go on waiting.
    Wait,
    /// They stop where they are, and go on at the same token when the engine is resumed.
    Keep,
}

/// New weights for an engine.
pub enum WeightUpdate {
    /// Writes the served tensors where they lie, on the engine's thread between two steps; for
    /// engines that share the trainer's storage (see
    /// [`Engine::shares_weights`](crate::Engine::shares_weights)). An error says that nothing has
    /// changed.
    InPlace(Box<dyn FnOnce() -> Result<(), String> + Send>),
    /// A Hugging Face directory on a disk that the engine can read. All names and shapes are
    /// checked before anything is written.
    Directory(PathBuf),
}

/// Memory that a sleeping engine gives back, and takes again when it wakes up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Memory {
    /// The weights.
    Weights,
    /// The pages of K and V.
    KvCache,
}

/// How deep an engine sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sleep {
    /// It takes no steps; all memory stays.
    Paused,
    /// The pages of K and V are given back; the weights stay.
    KvCache,
    /// The weights too are given back; they must be loaded again before it generates.
    Weights,
}
