//! In the place of mistral.rs, where it is not compiled.

use crate::{config::Config, error::TrainError};
use onpolicy_plugin_api::{Engine, EngineError};
use std::sync::Arc;

/// Says how to get mistral.rs.
pub fn start(_config: &Config) -> Result<Arc<dyn Engine>, TrainError> {
    Err(TrainError::from(EngineError::unsupported(
        "engine.kind = \"mistralrs\" is not built into this command; build it with: \
         cargo build --release --features mistralrs",
    )))
}
