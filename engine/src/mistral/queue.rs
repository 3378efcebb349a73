//! Requests that wait and run. No tensors.

use super::{line::Line, live::Live};
use onpolicy_plugin_api::RequestId;
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

/// A sample: its request and its index.
pub(super) type Key = (RequestId, usize);

/// Samples begin in the order of their requests' priorities, then of arrival, as many at a time as
/// there are places.
pub(super) struct Queue {
    places: usize,
    /// Whether samples begin at all.
    pub paused: bool,
    /// Requests with samples that have not begun, and the first of these.
    waiting: BTreeMap<(i32, RequestId), (Arc<Live>, usize)>,
    running: HashMap<Key, (Arc<Live>, Arc<Line>)>,
}

impl Queue {
    /// A queue for as many running samples as there are `places`.
    pub fn new(places: usize) -> Self {
        Self { places, paused: false, waiting: BTreeMap::new(), running: HashMap::new() }
    }

    /// Adds a request.
    pub fn push(&mut self, live: Arc<Live>) {
        self.waiting.insert((live.priority, live.id), (live, 0));
    }

    /// How many requests wait; those that nobody listens to are left out.
    pub fn waiting(&mut self) -> usize {
        self.waiting.retain(|_, (live, _)| !live.is_abandoned());
        self.waiting.len()
    }

    /// The next sample to begin, if one may.
    pub fn next(&mut self) -> Option<(Arc<Live>, usize)> {
        if self.paused || self.running.len() >= self.places {
            return None;
        }
        loop {
            let mut entry = self.waiting.first_entry()?;
            let (live, index) = entry.get_mut();
            let next = (live.clone(), *index);
            *index += 1;
            if *index == live.params.n {
                entry.remove();
            }
            let (live, index) = &next;
            if live.is_open(*index) && !live.is_abandoned() {
                return Some(next);
            }
        }
    }

    /// A sample has begun.
    pub fn begin(&mut self, live: Arc<Live>, index: usize, line: Arc<Line>) {
        self.running.insert((live.id, index), (live, line));
    }

    /// A sample has ended.
    pub fn end(&mut self, key: Key) {
        self.running.remove(&key);
    }

    /// How many samples run.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// A request that waits or runs.
    pub fn find(&self, id: RequestId) -> Option<Arc<Live>> {
        let running = self.running.iter().find(|(key, _)| key.0 == id).map(|(_, (live, _))| live);
        let waiting = || self.waiting.values().map(|(live, _)| live).find(|live| live.id == id);
        running.or_else(waiting).cloned()
    }

    /// All requests.
    pub fn all(&self) -> Vec<Arc<Live>> {
        let running = self.running.values().map(|(live, _)| live.clone());
        let mut all: Vec<_> = self.waiting.values().map(|(live, _)| live.clone()).collect();
        all.extend(running);
        all.sort_by_key(|live| live.id);
        all.dedup_by_key(|live| live.id);
        all
    }

    /// The lines of running samples that have ended for whoever asked for them, and drops waiting
    /// requests of which none is left.
    pub fn ended(&mut self) -> Vec<Arc<Line>> {
        self.waiting.retain(|_, (live, first)| (*first..live.params.n).any(|i| live.is_open(i)));
        let ended = self.running.iter().filter(|((_, index), (live, _))| !live.is_open(*index));
        ended.map(|(_, (_, line))| line.clone()).collect()
    }
}
