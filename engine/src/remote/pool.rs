//! The servers together: which one gets a request, and how new weights reach them all.

use super::{
    client::{Client, Fault},
    dialect::Answer,
    options::RemoteOptions,
    server::{Place, Server, Standing, Transfer},
};
use futures::future::join_all;
use onpolicy_plugin_api::{EngineError, PauseMode, Request};
use std::{
    path::PathBuf,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::sync::Notify;

/// Pause before a server that had too much to do, or ended samples, is asked again.
const BACKOFF: Duration = Duration::from_millis(50);
/// The longest such pause.
const MAX_BACKOFF: Duration = Duration::from_secs(2);

/// The newest weights: where they are, and their version.
type Newest = Option<(PathBuf, u64)>;

/// The servers.
pub(super) struct Pool {
    pub servers: Vec<Server>,
    pub client: Client,
    pub options: RemoteOptions,
    /// What a server that comes back has to take first.
    newest: Mutex<Newest>,
    version: AtomicU64,
    paused: AtomicBool,
    /// A server may have begun to serve.
    changed: Notify,
    /// Held while weights change.
    updating: tokio::sync::Mutex<()>,
}

impl Pool {
    pub fn new(urls: Vec<String>, options: RemoteOptions) -> Result<Self, EngineError> {
        Ok(Self {
            servers: urls.into_iter().map(Server::new).collect(),
            client: Client::new(&options)?,
            options,
            newest: Mutex::new(None),
            version: AtomicU64::new(0),
            paused: AtomicBool::new(false),
            changed: Notify::new(),
            updating: tokio::sync::Mutex::new(()),
        })
    }

    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    fn newest(&self) -> Newest {
        self.newest.lock().unwrap_or_else(|poison| poison.into_inner()).clone()
    }

    fn set_newest(&self, newest: Newest) {
        *self.newest.lock().unwrap_or_else(|poison| poison.into_inner()) = newest;
    }

    fn serving(&self) -> impl Iterator<Item = &Server> {
        self.servers.iter().filter(|server| server.is_serving())
    }

    /// Meets all servers for the first time.
    ///
    /// # Errors
    /// None of them answers; the text says what each did.
    pub async fn meet_all(&self) -> Result<(), EngineError> {
        let met = join_all(self.servers.iter().map(|server| self.revive(server))).await;
        if met.iter().any(Result::is_ok) {
            return Ok(());
        }
        let reasons = self.servers.iter().zip(met).filter_map(|(server, met)| {
            let fault = met.err()?;
            Some(format!("{}: {}", server.url, fault.reason()))
        });
        let reasons: Vec<String> = reasons.collect();
        Err(EngineError::Internal(format!("no server answers ({})", reasons.join("; "))))
    }

    /// The answer to a request, from whichever server gives it.
    ///
    /// # Errors
    /// A refusal, or the last failure once there were too many.
    pub async fn answer(&self, request: &Request) -> Result<Answer, EngineError> {
        let (mut tries, mut avoid, mut pause) = (0, None, BACKOFF);
        loop {
            let place = self.pick(avoid, request.params.n).await;
            let server = place.server;
            let fault = match server.generate(&self.client, request, self.options.timeout()).await {
                Ok(answer) => {
                    server.state().failures = 0;
                    return Ok(answer);
                }
                Err(fault) => fault,
            };
            drop(place);
            match fault {
                Fault::Refused { .. } => return Err(fault.into_error(&server.url)),
                Fault::Busy(_) | Fault::Aborted => {
                    tokio::time::sleep(pause).await;
                    pause = (2 * pause).min(MAX_BACKOFF);
                }
                Fault::Stale(reason) => self.eject(server, &reason),
                Fault::Broken(_) | Fault::Gone(_) => {
                    self.failed(server, &fault);
                    (tries, avoid) = (tries + 1, Some(&server.url));
                    if tries > self.options.retries {
                        return Err(fault.into_error(&server.url));
                    }
                }
            }
        }
    }

    /// A place at the serving server with the fewest samples under way, if possible another one
    /// than `avoid`. Waits until there is one.
    async fn pick(&self, avoid: Option<&String>, samples: usize) -> Place<'_> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let load = |server: &&Server| (Some(&server.url) == avoid, server.in_flight());
            if let Some(server) = self.serving().min_by_key(load) {
                return server.take_place(samples);
            }
            changed.await;
        }
    }

    /// Counts a failure; too many in a row take the server out, and so does a process that is
    /// gone: another one at its address would have other weights.
    pub fn failed(&self, server: &Server, fault: &Fault) {
        let (failures, reason) = {
            let mut state = server.state();
            state.failures += 1;
            (state.failures, fault.reason())
        };
        tracing::warn!(url = server.url, failures, reason, "a server failed");
        if failures >= self.options.max_failures || matches!(fault, Fault::Gone(_)) {
            self.eject(server, &reason);
        }
    }

    /// Takes a server out, unless weights are just being given to it.
    pub fn eject(&self, server: &Server, reason: &str) {
        let mut state = server.state();
        if state.standing == Standing::Serving {
            tracing::warn!(url = server.url, reason, "a server gets no more requests");
            metrics::counter!("onpolicy_remote_ejections_total").increment(1);
            state.standing = Standing::Out(reason.into());
        }
    }

    fn admit(&self, server: &Server) {
        let mut state = server.state();
        (state.standing, state.failures) = (Standing::Serving, 0);
        drop(state);
        self.changed.notify_waiters();
    }

    /// Lets a server (back) in, if it is well and takes the newest weights.
    pub async fn revive(&self, server: &Server) -> Result<(), Fault> {
        let limit = self.options.health_timeout();
        server.health(&self.client, limit).await?;
        let face = server.meet(&self.client, &self.options).await?;
        server.state().face = Some(face);
        let _turn = self.updating.lock().await;
        match self.newest() {
            // It may have been started anew: what it holds does not count, whatever it tells.
            Some((dir, version)) => {
                let stay_paused = self.is_paused();
                let transfer = Transfer { dir: &dir, version, stay_paused };
                server.update(&self.client, &self.options, transfer).await?;
            }
            None => {
                self.adopt(server, server.told_version(&self.client, limit).await?);
                if self.is_paused() {
                    server.pause(&self.client, PauseMode::Keep, false, limit).await?;
                }
            }
        }
        self.admit(server);
        tracing::info!(url = server.url, version = self.version(), "a server gets requests");
        Ok(())
    }

    /// Takes the version that a server tells as the pool's; only where nobody here updates it.
    fn adopt(&self, server: &Server, told: Option<String>) {
        if let Some(version) = told.and_then(|told| told.parse().ok()) {
            server.state().version = version;
            self.version.fetch_max(version, Ordering::AcqRel);
        }
    }

    /// Looks whether a serving server still holds the weights that it was given.
    ///
    /// # Errors
    /// It does not tell.
    pub async fn check_version(&self, server: &Server) -> Result<(), Fault> {
        // While weights change there is nothing to compare with.
        let Ok(_turn) = self.updating.try_lock() else { return Ok(()) };
        let told = server.told_version(&self.client, self.options.health_timeout()).await?;
        let (version, tells) = {
            let state = server.state();
            (state.version, state.tells_version)
        };
        match (self.newest(), told) {
            (None, told) => self.adopt(server, told),
            (Some(_), Some(told)) if tells && told != version.to_string() => {
                self.eject(server, &format!("it holds weights '{told}', not {version}"));
            }
            _ => {}
        }
        Ok(())
    }

    /// Gives new weights to all serving servers. Those that do not take them are out until they
    /// do.
    ///
    /// # Errors
    /// No server took them; the pool's version and newest weights are those before.
    pub async fn update(&self, dir: PathBuf, version: Option<u64>) -> Result<u64, EngineError> {
        // Where all are out, one may be on its way back.
        let limit = self.options.update_timeout();
        let _ = tokio::time::timeout(limit, self.pick(None, 0)).await;
        let _turn = self.updating.lock().await;
        let version = version.unwrap_or_else(|| self.version() + 1);
        let servers: Vec<&Server> = self.serving().collect();
        for server in &servers {
            server.state().standing = Standing::Updating;
        }
        let transfer = Transfer { dir: &dir, version, stay_paused: self.is_paused() };
        let updates = servers.iter().map(|s| s.update(&self.client, &self.options, transfer));
        let outcomes = join_all(updates).await;
        let (mut reasons, mut taken) = (Vec::new(), Vec::new());
        for (server, done) in servers.into_iter().zip(outcomes) {
            match done {
                Ok(()) => taken.push(server),
                Err(fault) => {
                    tracing::warn!(url = server.url, reason = fault.reason(), "an update failed");
                    reasons.push(format!("{}: {}", server.url, fault.reason()));
                    server.state().standing = Standing::Out(fault.reason());
                }
            }
        }
        if taken.is_empty() {
            let reasons = if reasons.is_empty() { self.why_out() } else { reasons };
            let reasons = reasons.join("; ");
            return Err(EngineError::Internal(format!("no server took the weights ({reasons})")));
        }
        // First what servers that come back need to know, then what requests see.
        self.set_newest(Some((dir, version)));
        self.version.store(version, Ordering::Release);
        taken.into_iter().for_each(|server| self.admit(server));
        Ok(version)
    }

    fn why_out(&self) -> Vec<String> {
        let reason = |server: &Server| match &server.state().standing {
            Standing::Out(reason) => Some(format!("{}: {reason}", server.url)),
            _ => None,
        };
        self.servers.iter().filter_map(reason).collect()
    }

    /// Names the weights on all serving servers.
    pub async fn name_weights(&self, version: u64) -> Result<(), EngineError> {
        let _turn = self.updating.lock().await;
        let limit = self.options.health_timeout();
        for server in self.serving() {
            let named = server.name_weights(&self.client, version, limit).await;
            let named = named.map_err(|fault| fault.into_error(&server.url))?;
            let mut state = server.state();
            (state.version, state.tells_version) = (version, named && state.tells_version);
        }
        self.set_newest(self.newest().map(|(dir, _)| (dir, version)));
        self.version.store(version, Ordering::Release);
        Ok(())
    }

    pub async fn pause(&self, mode: PauseMode, clear_cache: bool) -> Result<(), EngineError> {
        let _turn = self.updating.lock().await;
        self.paused.store(true, Ordering::Release);
        let limit = self.options.update_timeout();
        let calls = self.serving().map(|server| async move {
            let paused = server.pause(&self.client, mode, clear_cache, limit).await;
            let paused = paused.map_err(|fault| fault.into_error(&server.url));
            let resets = clear_cache && !server.state().face.as_ref().is_some_and(clears);
            match (paused, resets) {
                (Ok(()), true) => self.reset(server).await,
                (paused, _) => paused,
            }
        });
        all(join_all(calls).await)
    }

    pub async fn resume(&self) -> Result<(), EngineError> {
        let _turn = self.updating.lock().await;
        self.paused.store(false, Ordering::Release);
        let limit = self.options.health_timeout();
        let calls = self.serving().map(|server| async move {
            let resumed = server.resume(&self.client, limit).await;
            resumed.map_err(|fault| fault.into_error(&server.url))
        });
        all(join_all(calls).await)
    }

    pub async fn reset_caches(&self) -> Result<(), EngineError> {
        all(join_all(self.serving().map(|server| self.reset(server))).await)
    }

    async fn reset(&self, server: &Server) -> Result<(), EngineError> {
        let reset = server.reset_cache(&self.client, self.options.health_timeout()).await;
        reset.map_err(|fault| fault.into_error(&server.url))
    }
}

/// Whether pausing a server clears its cache where that is asked for.
fn clears(face: &super::server::Face) -> bool {
    face.dialect == super::dialect::Dialect::Vllm
}

/// The first error.
fn all(results: Vec<Result<(), EngineError>>) -> Result<(), EngineError> {
    results.into_iter().collect()
}
