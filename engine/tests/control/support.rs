//! An engine over a tiny checkpoint, requests to it, and what comes back.

use crate::common::engine;
use onpolicy_engine::{
    collect::{CollectError, Samples, collect},
    engine::{EngineConfig, EngineHandle, EngineStats},
    model::loading::Checkpoint,
};
use onpolicy_plugin_api::{
    Engine, EngineError, Event, FinishReason, Request, SamplingParams, Sink, Token,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

/// Bounds every wait.
pub const LIMIT: Duration = Duration::from_secs(60);

pub fn start(checkpoint: &Checkpoint) -> EngineHandle {
    start_with(checkpoint, EngineConfig::default())
}

pub fn start_with(checkpoint: &Checkpoint, config: EngineConfig) -> EngineHandle {
    engine(checkpoint, EngineConfig { kv_memory: 8 << 20, max_num_seqs: 32, ..config })
}

pub fn request(seed: u32, n: usize, max_tokens: usize) -> Request {
    let params = SamplingParams {
        n,
        max_tokens,
        temperature: 0.0,
        ignore_eos: true,
        ..SamplingParams::default()
    };
    Request::new((0..40).map(|i| 3 + (seed * 31 + i * 7) % 150).collect(), params)
}

pub fn try_run(engine: &EngineHandle, request: Request) -> Result<Samples, CollectError> {
    let deadline = Instant::now() + LIMIT;
    collect(engine, vec![request], deadline, &mut || {}).map(|mut groups| groups.remove(0))
}

pub fn ids(tokens: &[Token]) -> Vec<u32> {
    tokens.iter().map(|token| token.id).collect()
}

pub fn greedy(engine: &EngineHandle, seed: u32, max_tokens: usize) -> Vec<u32> {
    let answer = try_run(engine, request(seed, 1, max_tokens)).expect("an answer");
    ids(&answer.samples[0].tokens)
}

/// Log-probs of a prompt's tokens, which say more about the weights than greedy tokens do.
pub fn logprobs(engine: &EngineHandle, seed: u32) -> Vec<f32> {
    let mut request = request(seed, 1, 1);
    request.params.prompt_logprobs = Some(0);
    try_run(engine, request).expect("an answer").prompt_logprobs
}

pub fn stats(engine: &EngineHandle) -> EngineStats {
    engine.stats().expect("the engine runs")
}

/// What the engine says of a request that it does not take.
pub fn refusal(engine: &EngineHandle) -> EngineError {
    match try_run(engine, request(0, 1, 4)) {
        Err(CollectError::Engine(error)) => error,
        other => panic!("{other:?}"),
    }
}

/// Waits until `condition` holds.
pub fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

struct Listener {
    events: mpsc::Sender<Event>,
    gone: Arc<AtomicBool>,
}

impl Sink for Listener {
    fn send(&mut self, event: Event) -> bool {
        self.events.send(event).is_ok()
    }

    fn is_closed(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }
}

/// A request under way.
pub struct Running {
    events: mpsc::Receiver<Event>,
    gone: Arc<AtomicBool>,
    pub tokens: Vec<Token>,
    pub ends: Vec<FinishReason>,
}

impl Running {
    pub fn submit(engine: &EngineHandle, request: Request) -> Self {
        let (sender, events) = mpsc::channel();
        let gone = Arc::<AtomicBool>::default();
        let sink = Listener { events: sender, gone: gone.clone() };
        engine.submit(request, Box::new(sink)).expect("the request is taken");
        Self { events, gone, tokens: Vec::new(), ends: Vec::new() }
    }

    /// Waits until `count` tokens are there.
    pub fn read(&mut self, count: usize) {
        while self.tokens.len() < count {
            let event = self.events.recv_timeout(LIMIT).expect("a token");
            self.take(event);
        }
    }

    /// Takes what has arrived.
    pub fn drain(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            self.take(event);
        }
    }

    /// Waits for the end.
    pub fn finish(mut self) -> (Vec<Token>, Vec<FinishReason>) {
        while let Ok(event) = self.events.recv_timeout(LIMIT) {
            self.take(event);
        }
        (self.tokens, self.ends)
    }

    /// Does not listen any more.
    pub fn leave(&self) {
        self.gone.store(true, Ordering::Relaxed);
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Token { token, .. } => self.tokens.push(token),
            Event::Finished { reason, .. } => self.ends.push(reason),
            other => panic!("{other:?}"),
        }
    }
}
