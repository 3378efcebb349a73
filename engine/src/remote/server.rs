//! One server of a pool: how it stands, and what it can be asked.

use super::{
    client::{Client, Fault, Plane, quote},
    dialect::{Answer, Call, Dialect, told},
    options::{RemoteOptions, Speaks},
};
use onpolicy_plugin_api::{FinishReason, PauseMode, Request};
use serde_json::Value;
use std::{
    path::Path,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

/// How often a server that drains is looked at.
const DRAIN_POLL: Duration = Duration::from_millis(10);

/// Whether a server gets requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Standing {
    /// It does.
    Serving,
    /// It takes new weights.
    Updating,
    /// It does not; the reason says why.
    Out(String),
}

/// What a server is.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Face {
    pub dialect: Dialect,
    /// The model's name there.
    pub model: String,
    /// Longest sequence, if the server says it.
    pub max_model_len: Option<usize>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct State {
    pub standing: Standing,
    /// Failures in a row.
    pub failures: u32,
    pub face: Option<Face>,
    /// Version of the weights, as far as it is known.
    pub version: u64,
    /// Whether the server has told the version that it was given.
    pub tells_version: bool,
}

/// A server.
pub(super) struct Server {
    /// `http://host:port`
    pub url: String,
    /// Samples under way there.
    in_flight: AtomicUsize,
    state: Mutex<State>,
}

/// Samples that are counted as under way until it is dropped.
pub(super) struct Place<'a> {
    pub server: &'a Server,
    samples: usize,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.server.in_flight.fetch_sub(self.samples, Ordering::Relaxed);
    }
}

/// How new weights are given to a server.
#[derive(Debug, Clone, Copy)]
pub(super) struct Transfer<'a> {
    pub dir: &'a Path,
    pub version: u64,
    /// Leave the server paused.
    pub stay_paused: bool,
}

impl Server {
    pub fn new(url: String) -> Self {
        let state = State {
            standing: Standing::Out("it was not asked yet".into()),
            failures: 0,
            face: None,
            version: 0,
            tells_version: false,
        };
        Self { url, in_flight: AtomicUsize::new(0), state: Mutex::new(state) }
    }

    /// The state, to be looked at or changed at once.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    pub fn is_serving(&self) -> bool {
        self.state().standing == Standing::Serving
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Counts samples as under way.
    pub fn take_place(&self, samples: usize) -> Place<'_> {
        self.in_flight.fetch_add(samples, Ordering::Relaxed);
        Place { server: self, samples }
    }

    fn face(&self) -> Result<Face, Fault> {
        self.state().face.clone().ok_or_else(|| Fault::Broken("it was never reached".into()))
    }

    fn path(&self, path: &str) -> String {
        format!("{}{path}", self.url)
    }

    /// Asks the server what it is.
    pub async fn meet(&self, client: &Client, options: &RemoteOptions) -> Result<Face, Fault> {
        let limit = options.health_timeout();
        let dialect = match options.dialect {
            Speaks::Vllm => Dialect::Vllm,
            Speaks::Sglang => Dialect::Sglang,
            Speaks::Auto => self.dialect(client, limit).await?,
        };
        let models = client.get(&self.path("/v1/models"), Plane::Data, limit).await?;
        let model = &models["data"][0];
        let name = model["id"].as_str();
        let name = name.ok_or_else(|| Fault::Broken("/v1/models names no model".into()))?;
        let max_model_len = model["max_model_len"].as_u64().map(|len| len as usize);
        Ok(Face { dialect, model: name.to_string(), max_model_len })
    }

    /// vLLM and this project answer `/version`, SGLang `/get_model_info`, since 0.5.4 also as
    /// `/model_info`.
    async fn dialect(&self, client: &Client, limit: Duration) -> Result<Dialect, Fault> {
        let probes = [
            ("/version", Dialect::Vllm),
            ("/get_model_info", Dialect::Sglang),
            ("/model_info", Dialect::Sglang),
        ];
        for (path, dialect) in probes {
            match client.get(&self.path(path), Plane::Data, limit).await {
                Ok(_) => return Ok(dialect),
                Err(fault) if fault.is_unknown_route() => {}
                Err(fault) => return Err(fault),
            }
        }
        let reason = "it has neither /version (vLLM) nor /get_model_info (SGLang); set dialect";
        Err(Fault::Broken(reason.into()))
    }

    /// Whether it is well.
    pub async fn health(&self, client: &Client, limit: Duration) -> Result<(), Fault> {
        client.get(&self.path("/health"), Plane::Data, limit).await.map(|_| ())
    }

    /// The version that it tells; none if it has no such route.
    pub async fn told_version(
        &self,
        client: &Client,
        limit: Duration,
    ) -> Result<Option<String>, Fault> {
        for path in self.face()?.dialect.version_paths() {
            match client.get(&self.path(path), Plane::Control, limit).await {
                Ok(answer) => return Ok(told(&answer["weight_version"])),
                Err(fault) if fault.is_unknown_route() => {}
                Err(fault) => return Err(fault),
            }
        }
        Ok(None)
    }

    /// Samples for a request.
    pub async fn generate(
        &self,
        client: &Client,
        request: &Request,
        limit: Duration,
    ) -> Result<Answer, Fault> {
        let face = self.face()?;
        let (version, tells) = {
            let state = self.state();
            (state.version, state.tells_version)
        };
        let (path, body) = face.dialect.generate(request, &face.model);
        let text = client.generate(&self.path(path), &body, limit).await?;
        let answer = face.dialect.parse(&text, request, version).map_err(|reason| {
            Fault::Broken(format!("unexpected answer ({reason}): {}", quote(&text)))
        })?;
        if let Some(told) = answer.told.as_ref().filter(|_| tells) {
            // A newer one may be in force at the end.
            if told.parse::<u64>().ok().is_none_or(|told| told < version) {
                let reason = format!("it answered with weights '{told}', not {version}");
                return Err(Fault::Stale(reason));
            }
        }
        match answer.samples.iter().any(|sample| sample.finish == FinishReason::Abort) {
            true => Err(Fault::Aborted),
            false => Ok(answer),
        }
    }

    async fn call(&self, client: &Client, call: &Call, limit: Duration) -> Result<Value, Fault> {
        let answer = client.control(&self.path(&call.path), call.body.as_ref(), limit).await;
        answer.map_err(|fault| match fault {
            Fault::Refused { status, param, message } => {
                let message = format!("{}: {message}", call.path);
                Fault::Refused { status, param, message }
            }
            Fault::Gone(reason) => Fault::Gone(reason),
            fault => Fault::Broken(format!("{}: {}", call.path, fault.reason())),
        })
    }

    /// Calls the first of several routes that there is.
    async fn any(&self, client: &Client, calls: &[Call], limit: Duration) -> Result<(), Fault> {
        let mut reasons = Vec::new();
        for call in calls {
            match self.call(client, call, limit).await {
                Ok(_) => return Ok(()),
                Err(fault) if fault.is_unknown_route() => reasons.push(fault.reason()),
                Err(fault) => return Err(fault),
            }
        }
        Err(Fault::Refused { status: 404, param: None, message: reasons.join("; ") })
    }

    /// Stops its samples.
    pub async fn pause(
        &self,
        client: &Client,
        mode: PauseMode,
        clear_cache: bool,
        limit: Duration,
    ) -> Result<(), Fault> {
        let dialect = self.face()?.dialect;
        while mode == PauseMode::Wait && !dialect.drains() && self.in_flight() > 0 {
            tokio::time::sleep(DRAIN_POLL).await;
        }
        self.call(client, &dialect.pause(mode, clear_cache), limit).await.map(|_| ())
    }

    /// Lets its samples go on.
    pub async fn resume(&self, client: &Client, limit: Duration) -> Result<(), Fault> {
        self.call(client, &self.face()?.dialect.resume(), limit).await.map(|_| ())
    }

    /// Forgets the KV of earlier requests.
    pub async fn reset_cache(&self, client: &Client, limit: Duration) -> Result<(), Fault> {
        self.any(client, &self.face()?.dialect.reset_cache(), limit).await
    }

    /// Names its weights; false if it has no names for them.
    pub async fn name_weights(
        &self,
        client: &Client,
        version: u64,
        limit: Duration,
    ) -> Result<bool, Fault> {
        let calls = self.face()?.dialect.name_weights(version);
        match self.any(client, &calls, limit).await {
            Ok(()) => Ok(true),
            Err(Fault::Refused { .. }) => Ok(false),
            Err(fault) => Err(fault),
        }
    }

    /// Gives it new weights: pause, load, name, forget old KV, check, go on.
    pub async fn update(
        &self,
        client: &Client,
        options: &RemoteOptions,
        transfer: Transfer<'_>,
    ) -> Result<(), Fault> {
        let limit = options.update_timeout();
        let done = tokio::time::timeout(limit, self.load(client, options, transfer)).await;
        let done = done.unwrap_or_else(|_| {
            let seconds = limit.as_secs_f64();
            Err(Fault::Broken(format!("no new weights within {seconds:.1} s")))
        });
        if done.is_err() && !transfer.stay_paused {
            // What it holds now is not known, and it gets no requests; but it should not hang.
            let _ = self.resume(client, options.health_timeout()).await;
        }
        done
    }

    async fn load(
        &self,
        client: &Client,
        options: &RemoteOptions,
        Transfer { dir, version, stay_paused }: Transfer<'_>,
    ) -> Result<(), Fault> {
        let limit = options.update_timeout();
        let dialect = self.face()?.dialect;
        self.pause(client, options.pause, false, limit).await?;
        self.any(client, &dialect.load(dir, version), limit).await?;
        let named = self.name_weights(client, version, limit).await?;
        self.reset_cache(client, limit).await?;
        let told = self.told_version(client, limit).await?;
        let tells = named || told.as_deref() == Some(&version.to_string());
        if let Some(told) = told.filter(|told| tells && *told != version.to_string()) {
            let reason = format!("it holds weights '{told}' after the update to {version}");
            return Err(Fault::Stale(reason));
        }
        if !stay_paused {
            self.resume(client, limit).await?;
        }
        let mut state = self.state();
        (state.version, state.tells_version) = (version, tells);
        Ok(())
    }
}
