//! Pools over fake servers, and sinks that write everything down.

use crate::fake::Fake;
use onpolicy_engine::{
    collect::{CollectError, Samples, collect},
    remote::{RemoteEngine, RemoteModel, RemoteOptions},
};
use onpolicy_plugin_api::{EngineError, Event, Request, SamplingParams, Sink};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

pub fn model() -> RemoteModel {
    RemoteModel {
        vocab_size: 1000,
        eos_token_ids: vec![2],
        max_model_len: 4096,
        max_samples: 8,
        max_requests: 32,
    }
}

/// Quick to notice and quick to give up.
pub fn options() -> RemoteOptions {
    RemoteOptions {
        timeout_seconds: 5.0,
        deadline_seconds: 10.0,
        update_timeout_seconds: 5.0,
        health_period_seconds: 0.05,
        health_timeout_seconds: 2.0,
        ..RemoteOptions::default()
    }
}

pub fn start(fakes: &[&Fake], options: RemoteOptions) -> Result<RemoteEngine, EngineError> {
    let urls: Vec<String> = fakes.iter().map(|fake| fake.url.clone()).collect();
    RemoteEngine::start(&urls, model(), options)
}

pub fn pool(fakes: &[&Fake]) -> RemoteEngine {
    start(fakes, options()).expect("the servers answer")
}

/// A request for `n` samples after a prompt that ends with `last`.
pub fn request(last: u32, n: usize) -> Request {
    Request::new(vec![7, last], SamplingParams { n, ..SamplingParams::default() })
}

pub fn answers(
    engine: &RemoteEngine,
    requests: Vec<Request>,
) -> Result<Vec<Samples>, CollectError> {
    collect(engine, requests, Instant::now() + Duration::from_secs(20), &mut || {})
}

/// The token ids of every sample.
pub fn ids(samples: &Samples) -> Vec<Vec<u32>> {
    let ids = |sample: &onpolicy_engine::collect::Sample| {
        sample.tokens.iter().map(|token| token.id).collect()
    };
    samples.samples.iter().map(ids).collect()
}

/// What the fake servers say.
pub fn expected(last: u32, n: u32) -> Vec<Vec<u32>> {
    (0..n).map(|index| (last + 1..=last + 1 + index).collect()).collect()
}

/// Waits until `condition` holds, for a while.
pub fn until(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "it did not happen in time");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Everything that a request was told.
#[derive(Clone, Default)]
pub struct Diary {
    pub events: Arc<Mutex<Vec<Event>>>,
    pub closed: Arc<AtomicBool>,
}

impl Sink for Diary {
    fn send(&mut self, event: Event) -> bool {
        self.events.lock().expect("no panic").push(event);
        !self.closed.load(SeqCst)
    }

    fn is_closed(&self) -> bool {
        self.closed.load(SeqCst)
    }
}

impl Diary {
    pub fn all(&self) -> Vec<Event> {
        self.events.lock().expect("no panic").clone()
    }
}
