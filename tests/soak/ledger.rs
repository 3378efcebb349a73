//! An engine that writes down how each sample ends.

use onpolicy_engine::engine::EngineHandle;
use onpolicy_plugin_api::{
    Engine, EngineError, Event, Memory, ModelInfo, PauseMode, Request, RequestId, Sink, Sleep,
    WeightUpdate,
};
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering::SeqCst},
};

/// How often a request and each of its samples has ended.
struct Entry {
    failed: AtomicUsize,
    finished: Vec<AtomicUsize>,
}

/// Every request that the engine has taken.
#[derive(Default)]
pub struct Ledger {
    entries: Mutex<Vec<Arc<Entry>>>,
    ids: Mutex<Vec<RequestId>>,
}

impl Ledger {
    /// Requests taken so far.
    pub fn requests(&self) -> usize {
        self.ids.lock().unwrap().len()
    }

    /// The request that was taken `back` before the last.
    pub fn recent(&self, back: usize) -> Option<RequestId> {
        let ids = self.ids.lock().unwrap();
        ids.len().checked_sub(back + 1).map(|at| ids[at])
    }

    /// Checks that all samples have ended in one `Finished`, or their request in one `Failed`.
    /// Returns how many requests failed.
    pub fn check(&self) -> usize {
        let entries = self.entries.lock().unwrap();
        let mut failures = 0;
        for (number, entry) in entries.iter().enumerate() {
            let failed = entry.failed.load(SeqCst);
            let finished: Vec<usize> = entry.finished.iter().map(|n| n.load(SeqCst)).collect();
            match failed {
                0 => assert!(finished.iter().all(|n| *n == 1), "request {number}: {finished:?}"),
                1 => assert!(finished.iter().all(|n| *n <= 1), "request {number}: {finished:?}"),
                more => panic!("request {number} failed {more} times"),
            }
            failures += failed;
        }
        failures
    }
}

/// A native engine whose events are written down.
pub struct Watched {
    pub engine: EngineHandle,
    pub ledger: Arc<Ledger>,
}

struct WatchedSink {
    sink: Box<dyn Sink>,
    entry: Arc<Entry>,
}

impl Sink for WatchedSink {
    fn send(&mut self, event: Event) -> bool {
        match &event {
            Event::Finished { index, .. } => _ = self.entry.finished[*index].fetch_add(1, SeqCst),
            Event::Failed { .. } => _ = self.entry.failed.fetch_add(1, SeqCst),
            _ => {}
        }
        self.sink.send(event)
    }

    fn is_closed(&self) -> bool {
        self.sink.is_closed()
    }
}

impl Engine for Watched {
    fn info(&self) -> ModelInfo {
        self.engine.info()
    }

    fn submit(&self, request: Request, sink: Box<dyn Sink>) -> Result<RequestId, EngineError> {
        Ok(self.submit_all(vec![(request, sink)])?[0])
    }

    fn submit_all(
        &self,
        requests: Vec<(Request, Box<dyn Sink>)>,
    ) -> Result<Vec<RequestId>, EngineError> {
        let mut entries = Vec::new();
        let watched = requests.into_iter().map(|(request, sink)| {
            let finished = (0..request.params.n).map(|_| AtomicUsize::new(0)).collect();
            let entry = Arc::new(Entry { failed: AtomicUsize::new(0), finished });
            entries.push(entry.clone());
            (request, Box::new(WatchedSink { sink, entry }) as Box<dyn Sink>)
        });
        let ids = self.engine.submit_all(watched.collect())?;
        self.ledger.entries.lock().unwrap().extend(entries);
        self.ledger.ids.lock().unwrap().extend(&ids);
        Ok(ids)
    }

    fn abort(&self, id: RequestId, index: Option<usize>) {
        self.engine.abort(id, index);
    }

    fn weight_version(&self) -> u64 {
        self.engine.weight_version()
    }

    fn shares_weights(&self) -> bool {
        self.engine.shares_weights()
    }

    fn update_weights(
        &self,
        update: WeightUpdate,
        version: Option<u64>,
    ) -> Result<u64, EngineError> {
        self.engine.update_weights(update, version)
    }

    fn set_weight_version(&self, version: u64) -> Result<(), EngineError> {
        self.engine.set_weight_version(version)
    }

    fn checksums(&self) -> Result<Vec<(String, u64)>, EngineError> {
        self.engine.checksums()
    }

    fn pause(&self, mode: PauseMode, clear_cache: bool) -> Result<(), EngineError> {
        self.engine.pause(mode, clear_cache)
    }

    fn resume(&self) -> Result<(), EngineError> {
        self.engine.resume()
    }

    fn is_paused(&self) -> bool {
        self.engine.is_paused()
    }

    fn abort_all(&self) -> Result<(), EngineError> {
        self.engine.abort_all()
    }

    fn reset_prefix_cache(&self) -> Result<(), EngineError> {
        self.engine.reset_prefix_cache()
    }

    fn sleep(&self, depth: Sleep) -> Result<(), EngineError> {
        self.engine.sleep(depth)
    }

    fn wake_up(&self, memory: &[Memory]) -> Result<(), EngineError> {
        self.engine.wake_up(memory)
    }

    fn is_sleeping(&self) -> bool {
        self.engine.is_sleeping()
    }
}
