//! The handle: requests in, weights in.

use super::{
    Options,
    instance::{Instance, Weights},
    live::Live,
    lock,
    params::room,
    queue::Queue,
    shared::{GLANCE, Shared, State},
};
use crate::{
    chat::ChatTokenizer,
    grammar::{Grammars, Place},
    model::loading::Description,
    torch::memory::trim,
};
use onpolicy_plugin_api::{
    Engine, EngineError, ModelInfo, PauseMode, Request, RequestId, Sink, WeightUpdate,
};
use std::sync::{
    Arc, Condvar, Mutex, Weak,
    atomic::{AtomicU64, Ordering},
};
use tokio::runtime::Runtime;

/// A running engine over mistral.rs. It stops when it is dropped.
pub struct MistralEngine {
    shared: Arc<Shared>,
    grammars: Grammars,
    next_id: AtomicU64,
    /// Held while weights are loaded; the instance that was replaced last.
    retired: Mutex<Weak<Instance>>,
    /// None once the engine is dropped.
    runtime: Option<Runtime>,
}

impl MistralEngine {
    /// Loads `weights`, of the described `model`, and serves them as version 0.
    ///
    /// # Errors
    /// mistral.rs cannot load them, or an option does not fit.
    pub(super) fn start(
        model: &Description,
        weights: &Weights,
        options: Options,
    ) -> Result<Self, EngineError> {
        let instance = Instance::load(weights, &options, 0);
        let instance = instance.map_err(|reason| EngineError::invalid("model", reason))?;
        let info = ModelInfo {
            name: options.name.clone().unwrap_or_else(|| model.name.clone()),
            max_model_len: max_model_len(&options, instance.max_model_len())?,
            vocab_size: model.vocab_size,
            eos_token_ids: model.eos_token_ids.clone(),
            max_samples: options.max_samples,
        };
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime =
            runtime.worker_threads(1).thread_name("mistralrs-lines").enable_time().build();
        let runtime = runtime.map_err(|error| EngineError::Internal(error.to_string()))?;
        let (tokenizer, vocab_size) = (model.tokenizer.clone(), model.vocab_size);
        let eos = info.eos_token_ids.clone();
        let shared = Shared {
            info,
            filler: filler(&model.tokenizer, model.vocab_size),
            state: Mutex::new(State {
                queue: Queue::new(options.max_num_seqs),
                current: Arc::new(instance),
            }),
            ended: Condvar::new(),
            runtime: runtime.handle().clone(),
            options,
        };
        Ok(Self {
            grammars: Grammars::new(Some(tokenizer), vocab_size, eos),
            shared: Arc::new(shared),
            next_id: AtomicU64::new(0),
            retired: Mutex::new(Weak::new()),
            runtime: Some(runtime),
        })
    }

    /// How many tokens may follow a request's prompt, and its grammar, compiled.
    fn check(&self, request: &Request) -> Result<(usize, Option<Place>), EngineError> {
        let room = room(request, &self.shared.info)?;
        let grammar = request.params.grammar.as_ref();
        let place = grammar.map(|grammar| self.grammars.compile(grammar)).transpose()?;
        Ok((room, place))
    }
}

/// Gives the memory of a replaced instance back to the system, once it is gone. Its thread frees it
/// in many small pieces, which the allocator would keep.
async fn give_back(retired: Weak<Instance>) {
    while retired.strong_count() > 0 {
        tokio::time::sleep(GLANCE).await;
    }
    // Until mistral.rs' thread has seen that nobody asks any more.
    tokio::time::sleep(20 * GLANCE).await;
    trim();
}

/// The longest sequence: what is asked for, or the model's own limit.
fn max_model_len(options: &Options, limit: usize) -> Result<usize, EngineError> {
    let asked = options.max_model_len.unwrap_or(limit);
    if (2..=limit).contains(&asked) {
        return Ok(asked);
    }
    let reason = format!("must be between 2 and the model's own limit of {limit}");
    Err(EngineError::invalid("max_model_len", reason))
}

/// The first token of plain text.
fn filler(tokenizer: &ChatTokenizer, vocab_size: usize) -> u32 {
    let plain = |id: &u32| {
        let bytes = tokenizer.token_bytes(*id);
        !bytes.is_empty() && bytes.iter().all(u8::is_ascii_alphanumeric)
    };
    (0..vocab_size as u32).find(plain).unwrap_or_default()
}

impl Engine for MistralEngine {
    fn info(&self) -> ModelInfo {
        self.shared.info.clone()
    }

    fn submit(&self, request: Request, sink: Box<dyn Sink>) -> Result<RequestId, EngineError> {
        Ok(self.submit_all(vec![(request, sink)])?[0])
    }

    fn submit_all(
        &self,
        requests: Vec<(Request, Box<dyn Sink>)>,
    ) -> Result<Vec<RequestId>, EngineError> {
        let shared = &self.shared;
        let checked = requests.iter().map(|(request, _)| self.check(request));
        let checked = checked.collect::<Result<Vec<_>, EngineError>>()?;
        let mut ids = Vec::with_capacity(requests.len());
        let mut state = lock(&shared.state);
        let waiting = state.queue.waiting();
        if waiting + requests.len() > shared.options.max_waiting {
            return Err(EngineError::Overloaded { waiting });
        }
        for ((request, sink), (room, grammar)) in requests.into_iter().zip(checked) {
            let id = RequestId(self.next_id.fetch_add(1, Ordering::Relaxed));
            let eos = &shared.info.eos_token_ids;
            let live = Live::new(id, request, sink, (eos, room), grammar);
            state.queue.push(Arc::new(live));
            ids.push(id);
        }
        drop(state);
        shared.begin();
        Ok(ids)
    }

    fn abort(&self, id: RequestId, index: Option<usize>) {
        let live = lock(&self.shared.state).queue.find(id);
        self.shared.abort(live.as_slice(), index);
    }

    fn weight_version(&self) -> u64 {
        lock(&self.shared.state).current.version()
    }

    fn update_weights(
        &self,
        update: WeightUpdate,
        version: Option<u64>,
    ) -> Result<u64, EngineError> {
        let WeightUpdate::Directory(dir) = update else {
            let what = "writing its weights where they lie; give it a directory";
            return Err(EngineError::unsupported(what));
        };
        let mut retired = lock(&self.retired);
        self.shared.wait_for(&retired);
        let version = version.unwrap_or_else(|| self.weight_version() + 1);
        let next = Arc::new(self.shared.load(&dir, version)?);
        let replaced = std::mem::replace(&mut lock(&self.shared.state).current, next);
        *retired = Arc::downgrade(&replaced);
        self.shared.runtime.spawn(give_back(retired.clone()));
        Ok(version)
    }

    fn set_weight_version(&self, version: u64) -> Result<(), EngineError> {
        lock(&self.shared.state).current.set_version(version);
        Ok(())
    }

    fn pause(&self, mode: PauseMode, _clear_cache: bool) -> Result<(), EngineError> {
        if mode == PauseMode::Keep {
            let what = "pausing in the middle of a sample; pause with 'wait' or 'abort'";
            return Err(EngineError::unsupported(what));
        }
        lock(&self.shared.state).queue.paused = true;
        if mode == PauseMode::Abort {
            self.shared.abort(&self.shared.all(), None);
        }
        let state = lock(&self.shared.state);
        let runs = |state: &mut State| state.queue.paused && state.queue.running() > 0;
        drop(self.shared.ended.wait_while(state, runs));
        Ok(())
    }

    fn resume(&self) -> Result<(), EngineError> {
        lock(&self.shared.state).queue.paused = false;
        self.shared.begin();
        Ok(())
    }

    fn is_paused(&self) -> bool {
        lock(&self.shared.state).queue.paused
    }

    fn abort_all(&self) -> Result<(), EngineError> {
        self.shared.abort(&self.shared.all(), None);
        Ok(())
    }

    /// There is none: every request computes its prompt.
    fn reset_prefix_cache(&self) -> Result<(), EngineError> {
        Ok(())
    }
}

impl Drop for MistralEngine {
    fn drop(&mut self) {
        lock(&self.shared.state).queue.paused = true;
        self.shared.all().iter().for_each(|live| live.fail(EngineError::Stopped));
        self.shared.abort(&[], None);
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
