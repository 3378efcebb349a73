//! The routes by which another program controls the engine, with the names and shapes of vLLM,
//! SGLang, prime-rl and TRL.
//!
//! # Layout
//! - [`arguments`]: what is asked for, from the query and the body; [`answers`].
//! - `pausing`, `weights`, `memory`: vLLM's and prime-rl's routes; `sglang`: SGLang's.
//! - `transfer`: routes that need what is not built in, and say so.
//! - [`roots`]: directories that weights may be loaded from.
//! - `version`: what the weights are called.

pub mod answers;
pub mod arguments;
pub mod memory;
pub mod pausing;
pub mod roots;
pub mod sglang;
pub mod transfer;
mod version;
pub mod weights;

use super::{AppState, access, error::ApiError};
use axum::Router;
use axum::http::StatusCode;
use axum::middleware::from_fn_with_state;
use onpolicy_plugin_api::{Engine, EngineError};
use roots::Roots;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use version::Name;
pub use weights::liveness;

/// How the engine may be controlled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Directories whose subdirectories weights may be loaded from.
    pub weight_roots: Roots,
    /// How long a client waits for a command before it is told that it goes on without it.
    pub timeout: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { weight_roots: Roots::default(), timeout: Duration::from_secs(300) }
    }
}

/// What the control routes share.
pub(super) struct Control {
    settings: Settings,
    /// One update is read at a time: each takes the memory of the weights once more.
    updates: Arc<Semaphore>,
    name: Name,
}

impl Control {
    pub(super) fn new(settings: Settings) -> Self {
        Self { settings, updates: Arc::new(Semaphore::new(1)), name: Name::default() }
    }
}

/// The routes, behind the control key.
pub(super) fn router(state: &Arc<AppState>) -> Router<Arc<AppState>> {
    Router::new()
        .merge(pausing::router())
        .merge(weights::router())
        .merge(memory::router())
        .merge(sglang::router())
        .merge(transfer::router())
        .route_layer(from_fn_with_state(state.clone(), access::control))
}

/// Runs a command that blocks until the engine has done it.
///
/// # Errors
/// The engine's; 504 if it takes too long. It is done later then, all of it.
async fn command<T: Send + 'static>(
    state: &Arc<AppState>,
    run: impl FnOnce(&dyn Engine) -> Result<T, EngineError> + Send + 'static,
) -> Result<T, ApiError> {
    let engine = state.engine.clone();
    let done = tokio::task::spawn_blocking(move || run(engine.as_ref()));
    match timeout(state.control.settings.timeout, done).await {
        Ok(Ok(result)) => result.map_err(refusal),
        Ok(Err(failed)) => match failed.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(EngineError::Stopped.into()),
        },
        Err(_) => Err(too_late(state)),
    }
}

fn too_late(state: &AppState) -> ApiError {
    let message = format!(
        "the engine has not done this in {:?}; it goes on with it (server.control_timeout_seconds)",
        state.control.settings.timeout
    );
    ApiError::new(StatusCode::GATEWAY_TIMEOUT, message).with_code("timeout")
}

/// What the engine refuses because of its state is a conflict: trying again does not help.
fn refusal(error: EngineError) -> ApiError {
    match error {
        EngineError::Unavailable(why) => {
            ApiError::new(StatusCode::CONFLICT, why).with_code("conflict")
        }
        error => error.into(),
    }
}

/// 501: what to do in place of something that is not built in.
fn not_built_in(message: impl Into<String>) -> ApiError {
    ApiError::new(StatusCode::NOT_IMPLEMENTED, message).with_code("not_built_in")
}
