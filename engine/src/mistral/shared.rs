//! What the handle and the tasks of running samples share.

use super::{
    Options,
    instance::{Instance, Weights},
    line::Line,
    live::Live,
    lock,
    queue::{Key, Queue},
    sample::{Drawn, Sample},
};
use crate::model::loading::describe;
use mistralrs::{Constraint, CustomLogitsProcessor, NormalRequest, RequestMessage};
use onpolicy_plugin_api::{EngineError, ModelInfo};
use std::{
    path::Path,
    sync::{Arc, Condvar, Mutex, Weak},
    time::Duration,
};
use tokio::runtime::Handle;

/// How often a retired instance is looked at while its last samples end.
pub(super) const GLANCE: Duration = Duration::from_millis(10);

/// Answers that mistral.rs may give before it waits for one to be taken.
const ANSWERS: usize = 64;

/// The state of an engine.
pub(super) struct Shared {
    /// The served model.
    pub info: ModelInfo,
    /// How it is loaded and served.
    pub options: Options,
    /// See [`Sample::filler`].
    pub filler: u32,
    /// Requests, and the weights for those to come.
    pub state: Mutex<State>,
    /// A sample has ended.
    pub ended: Condvar,
    /// Looks after the lines of running samples.
    pub runtime: Handle,
}

/// Requests, and the weights that serve those which begin from now on.
pub(super) struct State {
    pub queue: Queue,
    pub current: Arc<Instance>,
}

impl Shared {
    /// Begins as many samples as there are places.
    pub fn begin(self: &Arc<Self>) {
        let mut failed = Vec::new();
        let mut state = lock(&self.state);
        while let Some((live, index)) = state.queue.next() {
            let instance = live.instance(&state.current);
            let (answers, inbox) = tokio::sync::mpsc::channel(ANSWERS);
            let line = Arc::new(Line::new(inbox));
            let sample = Sample {
                live: live.clone(),
                index,
                instance: instance.clone(),
                line: line.clone(),
                drawn: Mutex::new(Drawn::new(&live)),
                filler: self.filler,
            };
            match instance.send(request(sample, answers)) {
                Ok(()) => {
                    state.queue.begin(live.clone(), index, line.clone());
                    self.runtime.spawn(look_after(self.clone(), live, index, line));
                }
                Err(error) => failed.push((live, error)),
            }
        }
        drop(state);
        failed.into_iter().for_each(|(live, error)| live.fail(error));
    }

    /// A sample has left mistral.rs; others may begin.
    pub fn end(self: &Arc<Self>, key: Key) {
        lock(&self.state).queue.end(key);
        self.ended.notify_all();
        self.begin();
    }

    /// Ends these requests, or one sample of each.
    pub fn abort(&self, requests: &[Arc<Live>], index: Option<usize>) {
        requests.iter().for_each(|live| live.abort(index));
        let lines = lock(&self.state).queue.ended();
        lines.iter().for_each(|line| line.hang_up());
    }

    /// All requests that wait or run.
    pub fn all(&self) -> Vec<Arc<Live>> {
        lock(&self.state).queue.all()
    }

    /// Waits until the instance that was replaced last is gone, so that there are never more than
    /// two.
    pub fn wait_for(&self, retired: &Weak<Instance>) {
        let mut state = lock(&self.state);
        while retired.strong_count() > 0 {
            let woken = self.ended.wait_timeout(state, GLANCE);
            state = woken.unwrap_or_else(|poison| poison.into_inner()).0;
        }
    }

    /// The weights in `dir`, if they are those of the same model.
    pub fn load(&self, dir: &Path, version: u64) -> Result<Instance, EngineError> {
        let wrong = |reason: String| {
            EngineError::invalid("weights", format!("{}: {reason}", dir.display()))
        };
        let model = describe(&dir.to_string_lossy()).map_err(|e| wrong(e.to_string()))?;
        let (vocab_size, served) = (model.vocab_size, self.info.vocab_size);
        if vocab_size != served {
            return Err(wrong(format!("has {vocab_size} token ids, the served model {served}")));
        }
        let weights = Weights::Directory(dir.to_path_buf());
        let instance = Instance::load(&weights, &self.options, version).map_err(wrong)?;
        let (limit, served) = (instance.max_model_len(), self.info.max_model_len);
        if limit < served {
            return Err(wrong(format!("ends at {limit} tokens, the served model at {served}")));
        }
        Ok(instance)
    }
}

/// Waits until a sample has ended, or mistral.rs fails.
async fn look_after(shared: Arc<Shared>, live: Arc<Live>, index: usize, line: Arc<Line>) {
    if let Err(reason) = line.closed().await {
        live.fail(EngineError::Internal(reason));
        shared.abort(&[], None);
    }
    shared.end((live.id, index));
}

/// A sample as mistral.rs takes it. It is told to take the likeliest of the tokens that the sample
/// leaves, which is one.
fn request(
    sample: Sample,
    response: tokio::sync::mpsc::Sender<mistralrs::Response>,
) -> NormalRequest {
    let sampling_params = mistralrs::SamplingParams {
        temperature: Some(0.0),
        max_len: Some(sample.live.params.max_tokens),
        ..mistralrs::SamplingParams::deterministic()
    };
    let messages = RequestMessage::CompletionTokens(sample.live.prompt.clone());
    let processor: Arc<dyn CustomLogitsProcessor> = Arc::new(sample);
    NormalRequest {
        messages,
        sampling_params,
        response,
        return_logprobs: false,
        is_streaming: true,
        id: 0,
        constraint: Constraint::None,
        suffix: None,
        tools: None,
        tool_choice: None,
        logits_processors: Some(vec![processor]),
        return_raw_logits: false,
        web_search_options: None,
        model_id: None,
        truncate_sequence: false,
    }
}
