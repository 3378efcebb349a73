//! Updates in place: a closure that writes the served weights, and gives something back.

use onpolicy_plugin_api::{Engine, EngineError, WeightUpdate};
use std::sync::{Arc, Mutex};

/// Runs `write` between two steps of an engine that shares the trainer's weights, with nothing else
/// reading them there. Blocks until done. Returns what `write` returned, and the version now in
/// force.
///
/// # Errors
/// As [`Engine::update_weights`] has, or [`EngineError::Internal`] if `write` failed or panicked.
pub fn update_in_place<T: Send + 'static>(
    engine: &dyn Engine,
    write: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<(T, u64), EngineError> {
    let value = Arc::new(Mutex::new(None));
    let slot = value.clone();
    let write = WeightUpdate::InPlace(Box::new(move || {
        *slot.lock().unwrap_or_else(|poison| poison.into_inner()) = Some(write()?);
        Ok(())
    }));
    let version = engine.update_weights(write, None)?;
    let value = value.lock().unwrap_or_else(|poison| poison.into_inner()).take();
    let value = value.ok_or_else(|| EngineError::Internal("the update left nothing".into()))?;
    Ok((value, version))
}
