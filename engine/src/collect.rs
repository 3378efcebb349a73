//! Groups of samples gathered in memory, for callers in the same process.

use onpolicy_plugin_api::{
    Engine, EngineError, Event, FinishReason, Request, RequestId, Sink, Token,
};
use serde::{Deserialize, Serialize};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    time::Instant,
};

/// One finished sample.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Its tokens, the one that ended it included.
    pub tokens: Vec<Token>,
    /// Why it ended.
    pub finish: FinishReason,
}

/// All samples of one request.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Samples {
    /// One entry per sample, by index.
    pub samples: Vec<Sample>,
    /// Log-probs of the prompt's tokens after the first, if they were asked for.
    pub prompt_logprobs: Vec<f32>,
}

/// Why a group was not gathered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CollectError {
    /// The engine refused or failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The deadline passed; what was unfinished has been aborted.
    #[error("the engine did not finish the requests in time")]
    Timeout,
}

type Message = (usize, Event, Instant);

struct ChannelSink {
    number: usize,
    events: Sender<Message>,
    closed: Arc<AtomicBool>,
}

impl Sink for ChannelSink {
    fn send(&mut self, event: Event) -> bool {
        self.events.send((self.number, event, Instant::now())).is_ok()
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }
}

/// Requests that the engine works on. Dropping it aborts what is unfinished.
pub struct Pending {
    ids: Vec<RequestId>,
    gathered: Vec<Gathered>,
    inbox: Receiver<Message>,
    closed: Arc<AtomicBool>,
}

/// What requests came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Collected {
    /// Their samples, in the order of the requests.
    pub groups: Vec<Samples>,
    /// When the last sample ended.
    pub ended: Instant,
}

/// Submits all requests at once, to be waited for later.
///
/// # Errors
/// The first refusal; nothing was started then.
pub fn submit(engine: &dyn Engine, requests: Vec<Request>) -> Result<Pending, CollectError> {
    let closed = Arc::new(AtomicBool::new(false));
    let (events, inbox) = channel();
    let gathered = requests.iter().map(|r| Gathered::new(r.params.n)).collect();
    let sinks = requests.into_iter().enumerate().map(|(number, request)| {
        let sink = ChannelSink { number, events: events.clone(), closed: closed.clone() };
        (request, Box::new(sink) as Box<dyn Sink>)
    });
    let ids = engine.submit_all(sinks.collect())?;
    Ok(Pending { ids, gathered, inbox, closed })
}

impl Pending {
    /// Blocks until all requests have ended. `progress` is told of every new token.
    ///
    /// # Errors
    /// The first failure, or [`CollectError::Timeout`]; the others are aborted.
    pub fn wait(
        mut self,
        engine: &dyn Engine,
        deadline: Instant,
        progress: &mut dyn FnMut(),
    ) -> Result<Collected, CollectError> {
        match gather(&self.inbox, &mut self.gathered, deadline, progress) {
            Ok(ended) => {
                let groups = std::mem::take(&mut self.gathered);
                Ok(Collected { groups: groups.into_iter().map(Gathered::finish).collect(), ended })
            }
            Err(error) => {
                self.closed.store(true, Ordering::Relaxed);
                self.ids.iter().for_each(|&id| engine.abort(id, None));
                Err(error)
            }
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
    }
}

/// Submits all requests at once and gathers their samples, in the order of the requests; blocks
/// until all have ended. `progress` is told of every new token.
///
/// # Errors
/// The first refusal or failure, or [`CollectError::Timeout`]; the others are aborted.
pub fn collect(
    engine: &dyn Engine,
    requests: Vec<Request>,
    deadline: Instant,
    progress: &mut dyn FnMut(),
) -> Result<Vec<Samples>, CollectError> {
    Ok(submit(engine, requests)?.wait(engine, deadline, progress)?.groups)
}

/// A request's samples while they come in.
struct Gathered {
    tokens: Vec<Vec<Token>>,
    finish: Vec<Option<FinishReason>>,
    prompt_logprobs: Vec<f32>,
}

impl Gathered {
    fn new(n: usize) -> Self {
        Self { tokens: vec![Vec::new(); n], finish: vec![None; n], prompt_logprobs: Vec::new() }
    }

    fn finish(self) -> Samples {
        let ended = self.tokens.into_iter().zip(self.finish);
        let samples = ended
            .map(|(tokens, finish)| Sample {
                tokens,
                finish: finish.unwrap_or(FinishReason::Abort),
            })
            .collect();
        Samples { samples, prompt_logprobs: self.prompt_logprobs }
    }
}

/// Takes events until every sample has ended; says when the last did.
fn gather(
    inbox: &Receiver<Message>,
    gathered: &mut [Gathered],
    deadline: Instant,
    progress: &mut dyn FnMut(),
) -> Result<Instant, CollectError> {
    let mut open: usize = gathered.iter().map(|request| request.finish.len()).sum();
    let mut ended = Instant::now();
    while open > 0 {
        let left = deadline.saturating_duration_since(Instant::now());
        let (number, event, at) = inbox.recv_timeout(left).map_err(|error| match error {
            RecvTimeoutError::Timeout => CollectError::Timeout,
            RecvTimeoutError::Disconnected => CollectError::Engine(EngineError::Stopped),
        })?;
        let request = &mut gathered[number];
        match event {
            Event::Prompt { tokens } => {
                request.prompt_logprobs = tokens.iter().map(|token| token.logprob).collect();
            }
            Event::Token { index, token } => {
                request.tokens[index].push(token);
                progress();
            }
            Event::Finished { index, reason } => {
                request.finish[index] = Some(reason);
                (open, ended) = (open - 1, at);
            }
            Event::Failed { error } => return Err(error.into()),
        }
    }
    Ok(ended)
}
