//! A pool of vLLM or SGLang servers as one engine. Prompts go out as token ids, tokens and the
//! log-probs of the distribution they were drawn from come back; weights travel as a directory
//! that the servers can read.
//!
//! # Layout
//! In the order that a request's data flows:
//! - [`options`]: limits and habits.
//! - `live`: one request: abort, deadline, delivery.
//! - `pool`: which server gets it, and how new weights reach them all.
//! - `server`, `dialect`, `vllm`, `sglang`: what a server can be asked, and in which words.
//! - `client`: one HTTP request.
//! - `health`: servers that fail are taken out, and let back in.

mod client;
mod dialect;
mod health;
mod live;
pub mod options;
mod pool;
mod server;
mod sglang;
mod vllm;

pub use options::{RemoteOptions, Speaks, base_url, is_local};

use live::Signals;
use onpolicy_plugin_api::{
    Engine, EngineError, ModelInfo, PauseMode, Request, RequestId, Sink, WeightUpdate,
};
use pool::Pool;
use std::{
    collections::HashMap,
    future::Future,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};
use tokio::{
    runtime::Runtime,
    sync::{
        mpsc::{UnboundedSender, unbounded_channel},
        watch,
    },
};

/// How long the end of an engine waits for its requests to hear of it.
const GRACE: Duration = Duration::from_secs(5);

/// What is known of the model without asking a server, and how much may go on at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteModel {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Tokens that end a sample.
    pub eos_token_ids: Vec<u32>,
    /// Longest sequence; the servers may say less.
    pub max_model_len: usize,
    /// Most samples of one request.
    pub max_samples: usize,
    /// Most requests under way; more are refused.
    pub max_requests: usize,
}

/// Requests under way, by id, and how each is told to end early.
type Requests = HashMap<RequestId, UnboundedSender<Option<usize>>>;

/// A pool of servers.
pub struct RemoteEngine {
    pool: Arc<Pool>,
    info: ModelInfo,
    max_requests: usize,
    requests: Arc<Mutex<Requests>>,
    next_id: AtomicU64,
    stop: watch::Sender<bool>,
    /// `None` only while it is being dropped.
    runtime: Option<Runtime>,
}

impl RemoteEngine {
    /// Meets the servers at `urls`. Those that do not answer get requests once they do.
    ///
    /// # Errors
    /// A wrong address or option, or no server that answers.
    pub fn start(
        urls: &[String],
        model: RemoteModel,
        options: RemoteOptions,
    ) -> Result<Self, EngineError> {
        options.validate()?;
        let mut bases = Vec::new();
        for url in urls {
            let invalid = |rule| EngineError::invalid("urls", format!("'{url}': {rule}"));
            let base = base_url(url).map_err(invalid)?;
            if bases.contains(&base) {
                return Err(invalid("is named twice".to_string()));
            }
            bases.push(base);
        }
        if bases.is_empty() {
            return Err(EngineError::invalid("urls", "must name a server"));
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("remote-engine")
            .enable_all()
            .build()
            .map_err(|error| EngineError::Internal(format!("no threads: {error}")))?;
        let pool = Arc::new(Pool::new(bases, options)?);
        let meeting = pool.clone();
        wait_for(&runtime, async move { meeting.meet_all().await })??;
        for index in 0..pool.servers.len() {
            runtime.spawn(health::watch(Arc::downgrade(&pool), index));
        }
        Ok(Self {
            info: info(&pool, &model),
            max_requests: model.max_requests,
            pool,
            requests: Arc::default(),
            next_id: AtomicU64::new(0),
            stop: watch::channel(false).0,
            runtime: Some(runtime),
        })
    }

    /// Servers that get requests now.
    pub fn serving(&self) -> usize {
        self.pool.servers.iter().filter(|server| server.is_serving()).count()
    }

    fn requests(&self) -> MutexGuard<'_, Requests> {
        self.requests.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    /// Runs `work` on the engine's threads and blocks until it is done.
    fn call<T: Send + 'static, F>(
        &self,
        work: impl FnOnce(Arc<Pool>) -> F,
    ) -> Result<T, EngineError>
    where
        F: Future<Output = Result<T, EngineError>> + Send + 'static,
    {
        let runtime = self.runtime.as_ref().ok_or(EngineError::Stopped)?;
        wait_for(runtime, work(self.pool.clone()))?
    }

    fn check(&self, request: &Request) -> Result<(), EngineError> {
        let (params, info) = (&request.params, &self.info);
        params.validate()?;
        if request.prompt.is_empty() {
            return Err(EngineError::invalid("prompt", "must hold at least one token"));
        }
        for (field, ids) in
            [("prompt", &request.prompt), ("stop_token_ids", &params.stop_token_ids)]
        {
            if let Some(id) = ids.iter().find(|&&id| id as usize >= info.vocab_size) {
                let reason =
                    format!("token id {id} is not below the vocabulary's {}", info.vocab_size);
                return Err(EngineError::invalid(field, reason));
            }
        }
        if params.n > info.max_samples {
            let reason = format!("must be at most {}", info.max_samples);
            return Err(EngineError::invalid("n", reason));
        }
        let room = info.max_model_len.saturating_sub(request.prompt.len());
        if params.max_tokens > room {
            let reason =
                format!("a prompt of {} tokens leaves room for {room}", request.prompt.len());
            return Err(EngineError::invalid("max_tokens", reason));
        }
        let servers = self.pool.servers.iter();
        let faces = servers.filter_map(|server| server.state().face.clone());
        faces.map(|face| face.dialect).try_for_each(|dialect| dialect.check(request))
    }
}

/// Blocks until `work` is done on the runtime's threads; may be called from other async code,
/// whose thread it holds up.
fn wait_for<T: Send + 'static>(
    runtime: &Runtime,
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T, EngineError> {
    let (report, done) = mpsc::sync_channel(1);
    runtime.spawn(async move {
        // Nobody listens if the caller is gone.
        let _ = report.send(work.await);
    });
    done.recv().map_err(|_| EngineError::Stopped)
}

fn info(pool: &Pool, model: &RemoteModel) -> ModelInfo {
    let faces = pool.servers.iter().filter_map(|server| server.state().face.clone());
    let faces: Vec<_> = faces.collect();
    let told = faces.iter().filter_map(|face| face.max_model_len);
    ModelInfo {
        name: faces.first().map(|face| face.model.clone()).unwrap_or_default(),
        max_model_len: told.chain([model.max_model_len]).min().unwrap_or(model.max_model_len),
        vocab_size: model.vocab_size,
        eos_token_ids: model.eos_token_ids.clone(),
        max_samples: model.max_samples,
    }
}

impl Engine for RemoteEngine {
    fn info(&self) -> ModelInfo {
        self.info.clone()
    }

    fn submit(&self, request: Request, sink: Box<dyn Sink>) -> Result<RequestId, EngineError> {
        self.check(&request)?;
        let runtime = self.runtime.as_ref().ok_or(EngineError::Stopped)?;
        let id = RequestId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let (abort, aborts) = unbounded_channel();
        {
            let mut requests = self.requests();
            let waiting = requests.len();
            if waiting >= self.max_requests {
                return Err(EngineError::Overloaded { waiting });
            }
            requests.insert(id, abort);
        }
        let signals = Signals { aborts, stop: self.stop.subscribe() };
        let (pool, requests) = (self.pool.clone(), self.requests.clone());
        runtime.spawn(async move {
            live::serve(pool, request, sink, signals).await;
            requests.lock().unwrap_or_else(|poison| poison.into_inner()).remove(&id);
        });
        Ok(id)
    }

    fn submit_all(
        &self,
        requests: Vec<(Request, Box<dyn Sink>)>,
    ) -> Result<Vec<RequestId>, EngineError> {
        requests.iter().try_for_each(|(request, _)| self.check(request))?;
        let waiting = self.requests().len();
        if waiting + requests.len() > self.max_requests {
            return Err(EngineError::Overloaded { waiting });
        }
        requests.into_iter().map(|(request, sink)| self.submit(request, sink)).collect()
    }

    fn abort(&self, id: RequestId, index: Option<usize>) {
        if let Some(abort) = self.requests().get(&id) {
            // A request that has just ended has nothing left to abort.
            let _ = abort.send(index);
        }
    }

    fn weight_version(&self) -> u64 {
        self.pool.version()
    }

    fn update_weights(
        &self,
        update: WeightUpdate,
        version: Option<u64>,
    ) -> Result<u64, EngineError> {
        let WeightUpdate::Directory(dir) = update else {
            return Err(EngineError::unsupported("weights written in place, over a remote server"));
        };
        let dir: PathBuf = std::path::absolute(&dir)
            .map_err(|error| EngineError::invalid("weight_dir", error.to_string()))?;
        self.call(move |pool| async move { pool.update(dir, version).await })
    }

    fn set_weight_version(&self, version: u64) -> Result<(), EngineError> {
        self.call(move |pool| async move { pool.name_weights(version).await })
    }

    fn pause(&self, mode: PauseMode, clear_cache: bool) -> Result<(), EngineError> {
        if mode == PauseMode::Abort {
            self.abort_all()?;
        }
        self.call(move |pool| async move { pool.pause(mode, clear_cache).await })
    }

    fn resume(&self) -> Result<(), EngineError> {
        self.call(|pool| async move { pool.resume().await })
    }

    fn is_paused(&self) -> bool {
        self.pool.is_paused()
    }

    fn abort_all(&self) -> Result<(), EngineError> {
        let ids: Vec<RequestId> = self.requests().keys().copied().collect();
        ids.iter().for_each(|&id| self.abort(id, None));
        let deadline = Instant::now() + GRACE;
        while ids.iter().any(|id| self.requests().contains_key(id)) {
            if Instant::now() > deadline {
                return Err(EngineError::Internal("requests did not end in time".into()));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn reset_prefix_cache(&self) -> Result<(), EngineError> {
        self.call(|pool| async move { pool.reset_caches().await })
    }
}

impl Drop for RemoteEngine {
    /// Requests under way fail with [`EngineError::Stopped`].
    fn drop(&mut self) {
        let _ = self.stop.send(true);
        let deadline = Instant::now() + GRACE;
        while !self.requests().is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
