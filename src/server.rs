//! The HTTP endpoint, on threads of its own.

use anyhow::Context;
use onpolicy_engine::{
    chat::ChatTokenizer,
    http::{
        self, AppState, Limits,
        access::{Access, Key},
        connections::{ConnectionLimits, serve},
        control::{Settings, roots::Roots},
        metrics::PrometheusHandle,
    },
};
use onpolicy_plugin_api::Engine;
use onpolicy_trainer::config::{Config, ControlPlane, Server as Section};
use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};
use tokio::{net::TcpListener, runtime::Runtime, sync::oneshot};

/// How often a waiting command looks whether it should stop.
const STOP_POLL: Duration = Duration::from_millis(100);

/// A running endpoint.
pub struct Server {
    address: SocketAddr,
    shutdown: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

/// Starts to record metrics; to be called before the engine starts.
pub fn record_metrics() -> Result<PrometheusHandle, anyhow::Error> {
    http::metrics::install().context("metrics cannot be recorded")
}

/// Starts the endpoint, unless the configuration says that there is none. Clients may load weights
/// from the configured directories, and from `run`.
pub fn start(
    config: &Config,
    (engine, tokenizer): (&Arc<dyn Engine>, &ChatTokenizer),
    metrics: PrometheusHandle,
    run: Option<PathBuf>,
) -> Result<Option<Server>, anyhow::Error> {
    if !config.server.enabled {
        return Ok(None);
    }
    let runtime = runtime()?;
    let wanted = (config.server.host.as_str(), config.server.port);
    let listener = runtime.block_on(TcpListener::bind(wanted)).with_context(|| {
        format!("cannot listen on {}:{}; choose another --port, or 0 for any", wanted.0, wanted.1)
    })?;
    let address = listener.local_addr()?;
    let access = access(&config.server, address)?;
    let control = settings(&config.server, run)?;
    let limits = limits(&config.server);
    let mut state = AppState::new(engine.clone(), tokenizer.clone(), limits, metrics)
        .with_access(access, control);
    if let Some(format) = config.server.tool_format {
        state = state.with_tool_format(format);
    }
    let connections = connections(&config.server);
    let (shutdown, signal) = oneshot::channel::<()>();
    let thread = std::thread::Builder::new().name("http".into()).spawn(move || {
        let stopped = async {
            // A dropped sender says the same.
            let _ = signal.await;
        };
        let served = serve(listener, http::app(state), connections, stopped);
        if let Err(error) = runtime.block_on(served) {
            tracing::error!(%error, "the HTTP endpoint failed");
        }
        runtime.shutdown_timeout(Duration::from_secs(1));
    })?;
    Ok(Some(Server { address, shutdown, thread }))
}

/// Who may do what at an endpoint that listens on `address`.
fn access(server: &Section, address: SocketAddr) -> Result<Access, anyhow::Error> {
    let api_key = key(server.api_key.as_ref(), "ONPOLICY_API_KEY")?;
    let control_key = key(server.control_key.as_ref(), "ONPOLICY_CONTROL_KEY")?;
    let local = address.ip().is_loopback();
    let control = match server.control {
        ControlPlane::Off => false,
        ControlPlane::On if local || control_key.is_some() => true,
        ControlPlane::On => anyhow::bail!(
            "server.control = \"on\" lets everybody who reaches {address} change the weights; set \
             server.control_key (or ONPOLICY_CONTROL_KEY), or listen on 127.0.0.1"
        ),
        // A key for the model alone says that not everybody here is trusted.
        ControlPlane::Auto => local && (control_key.is_some() || api_key.is_none()),
    };
    Ok(Access { api_key, control_key, control })
}

/// The configured key, or the one in the environment, so that it need not stand in a file.
fn key(configured: Option<&Key>, variable: &str) -> Result<Option<Key>, anyhow::Error> {
    if let Some(key) = configured {
        return Ok(Some(key.clone()));
    }
    let given = std::env::var(variable).ok().filter(|key| !key.is_empty());
    given.map(|key| Key::new(key).map_err(|rule| anyhow::anyhow!("{variable}: {rule}"))).transpose()
}

fn settings(server: &Section, run: Option<PathBuf>) -> Result<Settings, anyhow::Error> {
    let roots = server.weight_roots.iter().map(PathBuf::from).chain(run);
    let weight_roots = Roots::new(roots).context("server.weight_roots")?;
    Ok(Settings { weight_roots, timeout: Duration::from_secs(server.control_timeout_seconds) })
}

fn limits(server: &Section) -> Limits {
    let seconds = server.request_timeout_seconds;
    Limits {
        concurrent_requests: server.max_concurrent_requests,
        prompts: server.max_prompts,
        samples: server.max_samples,
        prompt_tokens: server.max_prompt_tokens,
        body_bytes: server.max_body_mb << 20,
        body_time: Duration::from_secs(server.body_timeout_seconds),
        request_time: (seconds > 0).then(|| Duration::from_secs(seconds)),
        undelivered_tokens: server.max_undelivered_tokens,
        ..Limits::default()
    }
}

fn connections(server: &Section) -> ConnectionLimits {
    ConnectionLimits {
        connections: server.max_connections,
        header_time: Duration::from_secs(server.header_timeout_seconds),
        write_time: Duration::from_secs(server.write_timeout_seconds),
        grace: Duration::from_secs(server.shutdown_grace_seconds),
    }
}

impl Server {
    /// Where it listens.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Waits until `stop` is set; calls `tick` now and then.
    pub fn wait_for(&self, stop: &AtomicBool, mut tick: impl FnMut()) {
        while !stop.load(Ordering::Relaxed) && !self.thread.is_finished() {
            std::thread::sleep(STOP_POLL);
            tick();
        }
    }

    /// Lets requests that run finish, and stops.
    pub fn stop(self) {
        let _ = self.shutdown.send(());
        if self.thread.join().is_err() {
            tracing::error!("the HTTP endpoint panicked");
        }
    }
}

/// Sets `stop` on Ctrl-C or SIGTERM and says what happens then; a second signal ends the process.
pub fn stop_on_signal(stop: &'static AtomicBool, says: &'static str) -> Result<(), anyhow::Error> {
    let runtime = runtime()?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            signal().await;
            eprintln!("\n{says} (once more to stop at once)");
            stop.store(true, Ordering::Relaxed);
            signal().await;
            std::process::exit(130);
        });
    })?;
    Ok(())
}

async fn signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = match signal(SignalKind::terminate()) {
        Ok(terminate) => terminate,
        Err(error) => {
            tracing::warn!(%error, "SIGTERM cannot be caught");
            return std::future::pending().await;
        }
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}

fn runtime() -> Result<Runtime, anyhow::Error> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.context("no threads for the HTTP endpoint")
}
