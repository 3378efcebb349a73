//! A request that has not ended.

use super::{instance::Instance, lock};
use crate::grammar::Place;
use onpolicy_plugin_api::{
    EngineError, Event, FinishReason, Request, RequestId, SamplingParams, Sink, Token,
};
use std::sync::{Arc, Mutex, OnceLock};

/// A request that has not ended. Its samples are drawn on several threads.
pub(super) struct Live {
    /// Its name.
    pub id: RequestId,
    /// Requests of lower numbers begin first.
    pub priority: i32,
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// How to draw; `max_tokens` is no more than the model's length leaves.
    pub params: SamplingParams,
    /// What the samples' random streams are made from.
    pub seed: u64,
    /// Tokens that end a sample.
    pub stop_ids: Vec<u32>,
    /// The beginning of its grammar, if it has one. Locked because it may not be read by two
    /// threads at a time.
    grammar: Option<Mutex<Place>>,
    /// The weights that serve it, all samples the same.
    instance: OnceLock<Arc<Instance>>,
    events: Mutex<Events>,
}

struct Events {
    sink: Box<dyn Sink>,
    open: Vec<bool>,
}

impl Live {
    /// A request that has just arrived. `room` is how many tokens may follow its prompt.
    pub fn new(
        id: RequestId,
        request: Request,
        sink: Box<dyn Sink>,
        (eos_token_ids, room): (&[u32], usize),
        grammar: Option<Place>,
    ) -> Self {
        let mut params = request.params;
        params.max_tokens = params.max_tokens.min(room);
        let mut stop_ids = params.stop_token_ids.clone();
        if !params.ignore_eos {
            stop_ids.extend_from_slice(eos_token_ids);
        }
        Self {
            id,
            priority: request.priority,
            prompt: request.prompt,
            seed: params.seed.unwrap_or_else(rand::random),
            stop_ids,
            grammar: grammar.map(Mutex::new),
            instance: OnceLock::new(),
            events: Mutex::new(Events { sink, open: vec![true; params.n] }),
            params,
        }
    }

    /// The beginning of its grammar, for one sample.
    pub fn place(&self) -> Option<Place> {
        self.grammar.as_ref().map(|place| lock(place).clone())
    }

    /// The weights that serve the request: those that its first sample began with.
    pub fn instance(&self, current: &Arc<Instance>) -> Arc<Instance> {
        self.instance.get_or_init(|| current.clone()).clone()
    }

    /// Whether a sample has not ended.
    pub fn is_open(&self, index: usize) -> bool {
        lock(&self.events).open[index]
    }

    /// True once nobody listens any more.
    pub fn is_abandoned(&self) -> bool {
        lock(&self.events).sink.is_closed()
    }

    /// Delivers a token of a sample that has not ended; false if nobody listens any more.
    pub fn deliver(&self, index: usize, token: Token) -> bool {
        let mut events = lock(&self.events);
        events.open[index] && events.sink.send(Event::Token { index, token })
    }

    /// Ends one sample. One that has ended already is left alone.
    pub fn finish(&self, index: usize, reason: FinishReason) {
        let mut events = lock(&self.events);
        if std::mem::replace(&mut events.open[index], false) {
            events.sink.send(Event::Finished { index, reason });
        }
    }

    /// Ends one sample, or all that have not ended.
    pub fn abort(&self, index: Option<usize>) {
        let all = 0..self.params.n;
        let aborted = all.filter(|&i| index.is_none_or(|index| index == i));
        aborted.for_each(|index| self.finish(index, FinishReason::Abort));
    }

    /// Ends the request with an error, unless all of its samples have ended.
    pub fn fail(&self, error: EngineError) {
        let mut events = lock(&self.events);
        if events.open.contains(&true) {
            events.open.fill(false);
            events.sink.send(Event::Failed { error });
        }
    }
}
