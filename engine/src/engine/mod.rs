//! The engine's handle. Its thread (see [`worker`]) owns the model; commands go in by channel,
//! events come out through each request's sink.

pub(crate) mod check;
mod control;
mod flight;
mod handle;
mod hold;
#[cfg(test)]
mod on_kernels;
mod outlet;
mod request;
mod runner;
mod targets;
mod update;
mod worker;

#[cfg(test)]
use crate::cuda::harness;
use crate::{
    chat::ChatTokenizer,
    device::{Placement, pages::DevicePages},
    grammar::{Grammars, Place},
    in_place::update_in_place,
    kernels::matmul::{self, narrow},
    kv_cache::KvCache,
    model::config::ModelConfig,
    profile::{self, Profile},
    scheduler::{DraftLimits, Scheduler, SchedulerConfig},
    torch::stream,
    weights::{ServeDtype, Version, Weights},
};
use hold::Status;
use onpolicy_plugin_api::{EngineError, ModelInfo, Request};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc::{self, SyncSender},
    },
    thread::JoinHandle,
    time::Duration,
};
use tch::Device;
use worker::{Command, Worker};

/// What running samples do when the weights change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnUpdate {
    /// They go on with the KV they have; their later tokens carry the new version.
    #[default]
    Keep,
    /// Their KV is computed again with the new weights; then they go on.
    Recompute,
    /// The update waits until they have ended; no other is started before it.
    Drain,
}

/// Tokens that are guessed for a sample if nobody says how many.
const DRAFTS: usize = 7;

/// Size and behaviour of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineConfig {
    /// Bytes of KV pages, over all layers.
    pub kv_memory: usize,
    /// Most samples that run at a time.
    pub max_num_seqs: usize,
    /// Most tokens of one step, over all samples.
    pub max_batched_tokens: usize,
    /// Longest sequence; the model's own limit if none.
    pub max_model_len: Option<usize>,
    /// Most requests that wait.
    pub max_waiting: usize,
    /// Reuse the KV of common prefixes across requests.
    pub prefix_cache: bool,
    /// What running samples do when the weights change.
    pub on_update: OnUpdate,
    /// Time the phases of each step, for [`EngineHandle::profile`].
    pub profile: bool,
    /// The type that linear layers and the head are served in.
    pub serve_dtype: ServeDtype,
    /// Most tokens that are guessed for a sample and computed in the step of the token before, while
    /// a step has rows to spare ([`crate::scheduler::DraftLimits`]). If not given, 7 where weights are
    /// f32 on the CPU, and elsewhere, where results depend on the batch, none.
    pub num_speculative_tokens: Option<usize>,
    /// Launch every operation of a decode step on a CUDA device by itself, in place of recorded
    /// graphs, and leave products to libtorch.
    pub enforce_eager: bool,
    /// While a step is computed, deliver the tokens of the one before and plan the next one. If not
    /// given, that is so on a CUDA device, which computes by itself. Not for f32 on the CPU.
    pub async_scheduling: Option<bool>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            kv_memory: 1 << 30,
            max_num_seqs: 256,
            max_batched_tokens: 2048,
            max_model_len: None,
            max_waiting: 1024,
            prefix_cache: true,
            on_update: OnUpdate::Keep,
            profile: false,
            serve_dtype: ServeDtype::F32,
            num_speculative_tokens: None,
            enforce_eager: false,
            async_scheduling: None,
        }
    }
}

impl EngineConfig {
    fn scheduler(
        &self,
        model: &ModelConfig,
        placement: Placement,
    ) -> Result<SchedulerConfig, EngineError> {
        let needed = KvCache::block_bytes_in(model, placement);
        let num_blocks = self.kv_memory / needed;
        if num_blocks == 0 {
            let reason = format!("{} bytes hold no block; one takes {needed}", self.kv_memory);
            return Err(EngineError::invalid("kv_memory", reason));
        }
        let limit = model.max_position_embeddings;
        let max_model_len = self.max_model_len.unwrap_or(limit);
        if max_model_len == 0 || max_model_len > limit {
            let reason = format!("must be between 1 and the model's own limit of {limit}");
            return Err(EngineError::invalid("max_model_len", reason));
        }
        Ok(SchedulerConfig {
            num_blocks,
            max_num_seqs: self.max_num_seqs,
            max_batched_tokens: self.max_batched_tokens,
            max_model_len,
            max_waiting: self.max_waiting,
            prefix_cache: self.prefix_cache,
            drafts: self.drafts(placement),
        })
    }

    fn drafts(&self, placement: Placement) -> DraftLimits {
        let default = if placement.is_native() { DRAFTS } else { 0 };
        let rows = match self.serve_dtype {
            ServeDtype::F32 => matmul::free_rows(),
            _ => narrow::FREE_ROWS,
        };
        DraftLimits { per_sequence: self.num_speculative_tokens.unwrap_or(default), rows }
    }

    /// Refuses what weights in `placement` cannot have.
    fn check_placement(&self, placement: Placement) -> Result<(), EngineError> {
        if !placement.is_native() && self.serve_dtype != ServeDtype::F32 {
            let why = format!(
                "makes copies of f32 weights on the CPU; weights on {placement} are served as they \
                 are"
            );
            return Err(EngineError::invalid("serve_dtype", why));
        }
        if !placement.is_native() && self.num_speculative_tokens.is_some_and(|most| most > 0) {
            let why = format!(
                "needs rows that do not depend on their batch, which weights on {placement} do not \
                 give; leave it out or at 0"
            );
            return Err(EngineError::invalid("num_speculative_tokens", why));
        }
        if placement.is_native() && self.async_scheduling == Some(true) {
            let why = "has no effect on f32 weights on the CPU, which compute in the engine's own \
                       thread; leave it out or at false";
            return Err(EngineError::invalid("async_scheduling", why));
        }
        Ok(())
    }
}

/// Number of the CUDA device that the weights lie on.
fn cuda_index(placement: Placement) -> Option<usize> {
    match placement.device {
        Device::Cuda(index) => Some(index),
        _ => None,
    }
}

/// Pages for weights that are not native.
fn device_pages(
    model: &ModelConfig,
    num_blocks: usize,
    placement: Placement,
) -> Result<Option<DevicePages>, EngineError> {
    if placement.is_native() {
        return Ok(None);
    }
    let pages = DevicePages::new(model, num_blocks, placement);
    pages.map(Some).map_err(|error| {
        EngineError::invalid("kv_memory", format!("is more than there is on {placement}: {error}"))
    })
}

/// The model that an engine is started with.
pub struct Model {
    /// Name that clients use.
    pub name: String,
    /// Architecture and sizes.
    pub config: ModelConfig,
    /// Handles to the served tensors.
    pub weights: Weights,
    /// Says what the tokens stand for; without it no request may have a grammar.
    pub tokenizer: Option<ChatTokenizer>,
}

/// Numbers of the engine between two steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EngineStats {
    /// Samples that run.
    pub running: usize,
    /// Requests that wait.
    pub waiting: usize,
    /// Blocks held by running samples.
    pub blocks_used: usize,
    /// Blocks of the pool.
    pub blocks_total: usize,
    /// Steps taken.
    pub steps: u64,
    /// Those of them that were planned before the tokens of the one before were known.
    pub steps_ahead: u64,
    /// Samples whose blocks were taken away to let others run.
    pub preemptions: u64,
    /// Prompt tokens found in the prefix cache.
    pub prefix_hits: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Tokens that were guessed.
    pub drafted: u64,
    /// Tokens of them that were drawn then.
    pub accepted: u64,
    /// Decode steps that ran as a recorded graph of a CUDA device.
    pub graph_steps: u64,
    /// Bytes of the copies that are served in a narrow type.
    pub copied_bytes: usize,
    /// How long the last update took to make them anew.
    pub refresh: Duration,
}

/// State that handle and worker share.
struct Shared {
    version: Version,
    status: Status,
    /// Submitted requests that the worker has not taken yet.
    submitted: AtomicUsize,
    /// Requests that waited at the end of the last step.
    waiting: AtomicUsize,
}

impl Shared {
    /// Takes `count` places in the queue, if fewer than `most` requests are in it then.
    ///
    /// # Errors
    /// How many wait, if they are too many.
    fn take_places(&self, count: usize, most: usize) -> Result<(), usize> {
        let waiting = || self.waiting.load(Ordering::Relaxed);
        let taken =
            |submitted: usize| (submitted + waiting() + count <= most).then_some(submitted + count);
        let taken = self.submitted.fetch_update(Ordering::AcqRel, Ordering::Acquire, taken);
        taken.map(|_| ()).map_err(|submitted| submitted + waiting())
    }

    /// A request that was sent is counted among those that wait now, `waiting` in all.
    fn arrived(&self, waiting: usize) {
        // In this order, so that it is never missing from the sum.
        self.waiting.store(waiting, Ordering::Relaxed);
        self.submitted.fetch_sub(1, Ordering::Release);
    }
}

/// A clonable handle to a running native engine. The engine stops when told to, or when the last
/// handle is gone.
#[derive(Clone)]
pub struct EngineHandle {
    inner: Arc<Inner>,
}

struct Inner {
    commands: mpsc::Sender<Command>,
    info: ModelInfo,
    model: ModelConfig,
    serve_dtype: ServeDtype,
    placement: Placement,
    limits: SchedulerConfig,
    grammars: Grammars,
    shared: Arc<Shared>,
    next_id: AtomicU64,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl EngineHandle {
    /// Starts the engine's thread over `model`.
    ///
    /// # Errors
    /// A size that cannot work, with the number that would; pages for which there is no memory; weights that cannot be kept in
    /// [`EngineConfig::serve_dtype`].
    pub fn start(model: Model, config: EngineConfig) -> Result<Self, EngineError> {
        let (dtype, placement) = (config.serve_dtype, model.weights.placement());
        config.check_placement(placement)?;
        dtype.check(&model.weights).map_err(|why| EngineError::invalid("serve_dtype", why))?;
        let limits = config.scheduler(&model.config, placement)?;
        let pages = device_pages(&model.config, limits.num_blocks, placement)?;
        let scheduler = Scheduler::new(limits.clone())?;
        let shared = Arc::new(Shared {
            version: Version::default(),
            status: Status::default(),
            submitted: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
        });
        let info = ModelInfo {
            name: model.name.clone(),
            max_model_len: limits.max_model_len,
            vocab_size: model.config.vocab_size,
            eos_token_ids: model.config.eos_token_ids.clone(),
            max_samples: limits.max_num_seqs,
        };
        let eos = info.eos_token_ids.clone();
        let grammars = Grammars::new(model.tokenizer, info.vocab_size, eos);
        let (commands, inbox) = mpsc::channel();
        let worker_shared = shared.clone();
        let blocks = limits.num_blocks;
        let recorded = if config.enforce_eager { 0 } else { limits.max_model_len };
        let model_config = model.config.clone();
        #[cfg(test)]
        let stands_in = harness::stands_in();
        let thread = std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || {
                #[cfg(test)]
                harness::stand_in(stands_in);
                let device = cuda_index(placement);
                // The trainer's work on the device does not stand before the engine's then.
                if let Some(Err(error)) = device.map(stream::own) {
                    tracing::warn!(%error, "the engine shares the trainer's stream");
                }
                if config.profile {
                    profile::start(device);
                }
                let weights = (&model.weights, dtype);
                let runner = runner::Runner::new(&model.config, weights, (pages, blocks), recorded);
                let overlaps = config.async_scheduling.unwrap_or(device.is_some());
                let how = (config.on_update, overlaps);
                Worker::new(runner, scheduler, worker_shared, how).run(&inbox);
            })
            .map_err(|error| EngineError::Internal(format!("no thread: {error}")))?;
        let inner = Inner {
            commands,
            info,
            model: model_config,
            serve_dtype: dtype,
            placement,
            limits,
            grammars,
            shared,
            next_id: AtomicU64::new(0),
            thread: Mutex::new(Some(thread)),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Runs `write` on the engine's thread between two steps, with nothing else reading the
    /// weights there; when it succeeds the version goes up and older prefix hashes are void.
    /// Blocks until done. Returns what `write` returned, and the version now in force.
    ///
    /// # Errors
    /// [`EngineError::Stopped`], or [`EngineError::Internal`] if `write` failed or panicked.
    pub fn update<T: Send + 'static>(
        &self,
        write: impl FnOnce() -> Result<T, String> + Send + 'static,
    ) -> Result<(T, u64), EngineError> {
        update_in_place(self, write)
    }

    /// From now on a trainer works on the weights: they are not given back or reset.
    pub fn train_weights(&self) {
        self.inner.shared.status.trained.set(true);
    }

    /// Numbers of the engine between two steps; blocks until the one in progress is done.
    ///
    /// # Errors
    /// [`EngineError::Stopped`].
    pub fn stats(&self) -> Result<EngineStats, EngineError> {
        self.inner.ask(|reply| Command::Stats { reply })
    }

    /// Verifies all bookkeeping of blocks and samples; takes time proportional to the pool. For
    /// tests. Blocks until the step in progress is done.
    ///
    /// # Errors
    /// [`EngineError::Stopped`], or [`EngineError::Internal`] with what is wrong: a bug.
    pub fn check(&self) -> Result<(), EngineError> {
        self.inner.ask(|reply| Command::Check { reply })?.map_err(EngineError::Internal)
    }

    /// Where the engine's time has gone so far; none if [`EngineConfig::profile`] is off. Blocks
    /// until the step in progress is done.
    ///
    /// # Errors
    /// [`EngineError::Stopped`].
    pub fn profile(&self) -> Result<Option<Profile>, EngineError> {
        self.inner.ask(|reply| Command::Profile { reply })
    }

    /// Fails what runs and waits with [`EngineError::Stopped`], and ends the thread. Blocks until
    /// it has ended.
    pub fn shutdown(&self) {
        self.inner.stop();
    }
}

impl Inner {
    /// Sends a command and waits for its answer.
    fn ask<T>(&self, command: impl FnOnce(SyncSender<T>) -> Command) -> Result<T, EngineError> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.commands.send(command(reply)).map_err(|_| EngineError::Stopped)?;
        answer.recv().map_err(|_| EngineError::Stopped)
    }

    fn stop(&self) {
        let _ = self.commands.send(Command::Stop);
        let thread = self.thread.lock().unwrap_or_else(|poison| poison.into_inner()).take();
        // A sink may hold the last handle; the engine's own thread must not wait for itself.
        if let Some(thread) = thread.filter(|t| t.thread().id() != std::thread::current().id()) {
            let _ = thread.join();
        }
    }

    /// The request's grammar, compiled.
    fn grammar(&self, request: &Request) -> Result<Option<Place>, EngineError> {
        let grammar = request.params.grammar.as_ref();
        grammar.map(|grammar| self.grammars.compile(grammar)).transpose()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop();
    }
}
