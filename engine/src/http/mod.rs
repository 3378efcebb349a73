//! The OpenAI-compatible routes, over any [`Engine`].
//!
//! # Layout
//! In the order that a request's data flows:
//! - [`connections`], [`lifetime`]: from a socket to a request, and how both end.
//! - [`body`]: a JSON body, taken field by field; [`error`]: the one error type.
//! - [`fields`], [`sampling`], [`structured`], [`tools`], [`neutral`], [`prompt`]: what is asked for,
//!   checked.
//! - [`feed`], [`generation`], [`text`]: the request at the engine; tokens become text.
//! - [`completions`], [`chat_completions`], [`logprobs`], [`prompt_logprobs`], [`answer`],
//!   `stream`: the answer.
//! - [`generate`]: the same in the shapes of other servers, for clients that keep token ids.
//! - [`tokens`], [`render`], [`models`], [`health`], [`metrics`]: the other routes; [`openapi`]
//!   describes them.
//! - [`access`]: keys; [`control`]: routes that control the engine; [`registry`]: what runs.

pub mod access;
pub mod answer;
pub mod body;
pub mod chat_completions;
pub mod completions;
pub mod connections;
pub mod control;
pub mod error;
pub mod feed;
pub mod fields;
pub mod generate;
pub mod generation;
pub mod health;
pub mod lifetime;
pub mod logprobs;
pub mod metrics;
pub mod models;
pub mod neutral;
pub mod openapi;
pub mod prompt;
pub mod prompt_logprobs;
pub mod registry;
pub mod render;
pub mod sampling;
mod stream;
pub mod structured;
pub mod text;
pub mod tokens;
pub mod tools;

use crate::chat::{ChatTokenizer, ToolFormat};
use axum::Router;
use axum::extract::{DefaultBodyLimit, FromRequestParts, State};
use axum::http::{StatusCode, request::Parts};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use connections::ConnectionLimits;
use error::ApiError;
use lifetime::Lifetime;
use metrics_exporter_prometheus::PrometheusHandle;
use onpolicy_plugin_api::{Engine, ModelInfo};
use std::any::Any;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower_http::catch_panic::CatchPanicLayer;

/// What one client may ask for, and how much may go on at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Generating requests at once; more are answered with 429.
    pub concurrent_requests: usize,
    /// Prompts in one request.
    pub prompts: usize,
    /// Samples in one request: prompts times `n`.
    pub samples: usize,
    /// Tokens of all prompts of one request.
    pub prompt_tokens: usize,
    /// Stop strings in one request.
    pub stop_strings: usize,
    /// Longest body, in bytes; a longer one is answered with 413.
    pub body_bytes: usize,
    /// How long a body may take to arrive; a slower one is answered with 408.
    pub body_time: Duration,
    /// How long `/health_generate` waits for a token; then it answers 503.
    pub health_time: Duration,
    /// How long the samples of a request may take; what takes longer is answered with 504. No limit
    /// if none.
    pub request_time: Option<Duration>,
    /// Tokens of a stream that may wait for its reader; a slower reader is cut off.
    pub undelivered_tokens: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            concurrent_requests: 1024,
            prompts: 1024,
            samples: 16_384,
            prompt_tokens: 1 << 20,
            stop_strings: 16,
            body_bytes: 8 << 20,
            body_time: Duration::from_secs(60),
            health_time: Duration::from_secs(20),
            request_time: Some(Duration::from_secs(3600)),
            undelivered_tokens: 16_384,
        }
    }
}

/// What all routes share.
pub struct AppState {
    engine: Arc<dyn Engine>,
    tokenizer: ChatTokenizer,
    tool_format: Option<ToolFormat>,
    limits: Limits,
    info: ModelInfo,
    recorder: metrics::Recorder,
    access: access::Access,
    control: control::Control,
    registry: Arc<registry::Registry>,
    /// When the server started, in seconds since 1970.
    created: u64,
    /// Places for generating requests.
    places: Arc<Semaphore>,
    /// Turns at parsing and tokenizing, as many as there are cores.
    turns: Arc<Semaphore>,
}

/// The state as handlers receive it.
pub type Shared = State<Arc<AppState>>;

impl AppState {
    /// Serves `engine`, whose model reads and writes with `tokenizer`. `/metrics` shows what
    /// `metrics` has; see [`metrics::install`].
    pub fn new(
        engine: Arc<dyn Engine>,
        tokenizer: ChatTokenizer,
        limits: Limits,
        metrics: PrometheusHandle,
    ) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            info: engine.info(),
            engine,
            tool_format: tokenizer.tool_format(),
            tokenizer,
            recorder: metrics::Recorder::new(metrics),
            access: access::Access::default(),
            control: control::Control::new(control::Settings::default()),
            registry: Arc::default(),
            created: answer::unix_time(),
            places: Arc::new(Semaphore::new(limits.concurrent_requests)),
            turns: Arc::new(Semaphore::new(cores)),
            limits,
        }
    }

    /// Asks for keys, and lets `control` be done; without this everybody may use the model, and
    /// nobody may control it.
    #[must_use]
    pub fn with_access(self, access: access::Access, control: control::Settings) -> Self {
        Self { access, control: control::Control::new(control), ..self }
    }

    /// Looks for calls of tools in this form; without it, in the one that the chat template speaks
    /// of.
    #[must_use]
    pub fn with_tool_format(mut self, format: ToolFormat) -> Self {
        self.tool_format = Some(format);
        self
    }

    /// How the model writes calls of tools; none if that is not known.
    fn tool_format(&self) -> Option<ToolFormat> {
        self.tool_format
    }

    /// Runs work that takes long (a large body) where it does not hold up other requests.
    async fn off_thread<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&AppState) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let turn = self.turns.clone().acquire_owned().await;
        let state = self.clone();
        let done = tokio::task::spawn_blocking(move || {
            let result = work(&state);
            drop(turn);
            result
        });
        match done.await.map_err(tokio::task::JoinError::try_into_panic) {
            Ok(result) => result,
            Err(Ok(panic)) => std::panic::resume_unwind(panic),
            Err(Err(_)) => Err(onpolicy_plugin_api::EngineError::Stopped.into()),
        }
    }
}

/// A place among the generating requests, given back when dropped. Taken before the body is read,
/// so that the bodies held in memory are bounded too.
pub struct Admission {
    _permit: OwnedSemaphorePermit,
    /// Whether the server goes on; none without a server.
    lifetime: Option<Lifetime>,
}

impl FromRequestParts<Arc<AppState>> for Admission {
    type Rejection = ApiError;

    async fn from_request_parts(
        parts: &mut Parts,
        state: &Arc<AppState>,
    ) -> Result<Self, ApiError> {
        let lifetime = parts.extensions.get::<Lifetime>().cloned();
        if lifetime.as_ref().is_some_and(Lifetime::is_ending) {
            return Err(ApiError::shutting_down());
        }
        let permit = state.places.clone().try_acquire_owned().map_err(|_| {
            let limit = state.limits.concurrent_requests;
            let message = format!("{limit} requests are running already; try again later");
            ApiError::new(StatusCode::TOO_MANY_REQUESTS, message).with_code("overloaded")
        })?;
        Ok(Self { _permit: permit, lifetime })
    }
}

/// All routes.
pub fn app(state: AppState) -> Router {
    let state = Arc::new(state);
    Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::get))
        .route(completions::PATH, post(completions::create))
        .route(chat_completions::PATH, post(chat_completions::create))
        .route("/v1/completions/render", post(render::completions))
        .route("/v1/chat/completions/render", post(render::chat))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route(generate::vllm::PATH, post(generate::vllm::create))
        .route(generate::sglang::PATH, post(generate::sglang::create))
        .route(generate::trl::GENERATE, post(generate::trl::generate))
        .route(generate::trl::CHAT, post(generate::trl::chat))
        .route("/health", get(health::health))
        .route("/health/", get(health::health))
        .route("/liveness", get(control::liveness))
        .route("/ping", get(health::ping).post(health::ping))
        .route("/health_generate", get(health::generate))
        .route("/load", get(health::load))
        .route("/version", get(models::version))
        .route("/metrics", get(metrics::show))
        .route("/openapi.json", get(openapi::show))
        // Routes above need the key of those who use the model.
        .layer(from_fn_with_state(state.clone(), access::data))
        .merge(control::router(&state))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(DefaultBodyLimit::max(state.limits.body_bytes))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn_with_state(state.clone(), metrics::track))
        .with_state(state)
}

async fn no_route() -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "there is no such route; see /v1/models for a start")
        .with_code("unknown_url")
}

async fn no_method() -> ApiError {
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "this route does not take this method")
        .with_code("method_not_allowed")
}

fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let text = crate::panic::message(&*panic).unwrap_or("no message");
    tracing::error!("a handler panicked: {text}");
    ApiError::internal("the server failed on this request; see its log").into_response()
}

/// Serves until `shutdown`; requests that run then have ten seconds to finish.
///
/// # Errors
/// The listener fails.
pub async fn run(
    listener: TcpListener,
    app: Router,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    connections::serve(listener, app, ConnectionLimits::default(), shutdown).await
}

/// As [`run`], with another time for running requests to finish.
///
/// # Errors
/// The listener fails.
pub async fn run_with_grace(
    listener: TcpListener,
    app: Router,
    shutdown: impl Future<Output = ()> + Send + 'static,
    grace: Duration,
) -> io::Result<()> {
    let limits = ConnectionLimits { grace, ..ConnectionLimits::default() };
    connections::serve(listener, app, limits, shutdown).await
}
