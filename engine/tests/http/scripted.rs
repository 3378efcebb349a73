//! An engine that says what it was told to say, from a thread of its own per request.

use crate::tokenizer::{EOS, VOCAB};
use onpolicy_plugin_api::{
    Engine, EngineError, Event, FinishReason, ModelInfo, PromptToken, Request, RequestId, Sink,
    Token, TokenStats,
};
use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

pub const MODEL: &str = "test/scripted";
pub const MAX_MODEL_LEN: usize = 256;
pub const MAX_SAMPLES: usize = 8;
/// The weight version of the first token; see [`Script::swap_at`].
pub const VERSION: u64 = 7;

type Says = dyn Fn(&Request, usize) -> Vec<u32> + Send + Sync;

pub struct Script {
    /// Tokens of sample `index`; end-of-sequence follows.
    pub says: Box<Says>,
    /// Pause before each round of tokens.
    pub pause: Duration,
    /// Fail in place of this round.
    pub fails_at: Option<usize>,
    /// From this round on, tokens come from the next weight version.
    pub swap_at: usize,
    /// Refuse requests with this, from the request of this number on.
    pub refuses: Option<(u64, EngineError)>,
    /// Panic when asked for the weight version.
    pub panics: bool,
    /// Never end a request by itself: after the script, say `x` on and on.
    pub endless: bool,
    /// The model's context, in tokens.
    pub context: usize,
}

impl Script {
    pub fn saying(says: impl Fn(&Request, usize) -> Vec<u32> + Send + Sync + 'static) -> Self {
        Self {
            says: Box::new(says),
            pause: Duration::ZERO,
            fails_at: None,
            swap_at: usize::MAX,
            refuses: None,
            panics: false,
            endless: false,
            context: MAX_MODEL_LEN,
        }
    }
}

/// Statistics of a token at `position`, all exact in binary.
pub fn stats(position: usize) -> TokenStats {
    let step = position as f32;
    TokenStats { logprob: -(step + 1.0) / 8.0, entropy: 0.5 + step / 4.0, baseline: step / 16.0 }
}

/// What is said of prompt token `id`, the `i`-th after the first: every other one is the likeliest
/// at its position, and the rest come after all `top` that are listed.
fn prompt_token(i: usize, id: u32, top: usize) -> PromptToken {
    let first = (i % 2) as u32;
    let likeliest = (0..top as u32).map(|j| (id + first + j, -(i as f32) - j as f32 / 4.0));
    let rank = if first == 0 { 1 } else { top + 1 };
    PromptToken { logprob: -(i as f32), rank: (top > 0).then_some(rank), top: likeliest.collect() }
}

#[derive(Default)]
pub struct Seen {
    /// Every request that was submitted.
    pub requests: Mutex<Vec<Request>>,
    /// Requests whose thread runs.
    pub live: AtomicUsize,
    /// Every call of `abort`.
    pub aborts: Mutex<HashSet<(RequestId, Option<usize>)>>,
    /// Requests that ended because nobody listened.
    pub unheard: AtomicUsize,
    next: AtomicU64,
}

impl Seen {
    fn aborted(&self, id: RequestId, index: usize) -> bool {
        let aborts = self.aborts.lock().unwrap();
        aborts.contains(&(id, None)) || aborts.contains(&(id, Some(index)))
    }
}

pub struct Scripted {
    script: Arc<Script>,
    pub seen: Arc<Seen>,
}

impl Scripted {
    pub fn new(script: Script) -> Self {
        Self { script: Arc::new(script), seen: Arc::default() }
    }
}

impl Engine for Scripted {
    fn info(&self) -> ModelInfo {
        ModelInfo {
            name: MODEL.into(),
            max_model_len: self.script.context,
            vocab_size: VOCAB,
            eos_token_ids: vec![EOS],
            max_samples: MAX_SAMPLES,
        }
    }

    fn submit(&self, request: Request, sink: Box<dyn Sink>) -> Result<RequestId, EngineError> {
        let id = RequestId(self.seen.next.fetch_add(1, SeqCst));
        if let Some((_, error)) = self.script.refuses.as_ref().filter(|(from, _)| id.0 >= *from) {
            return Err(error.clone());
        }
        self.seen.requests.lock().unwrap().push(request.clone());
        self.seen.live.fetch_add(1, SeqCst);
        let (script, seen) = (self.script.clone(), self.seen.clone());
        thread::spawn(move || {
            let unheard = Run { id, request, script, seen: seen.clone(), sink }.play().is_none();
            seen.unheard.fetch_add(usize::from(unheard), SeqCst);
            seen.live.fetch_sub(1, SeqCst);
        });
        Ok(id)
    }

    fn abort(&self, id: RequestId, index: Option<usize>) {
        self.seen.aborts.lock().unwrap().insert((id, index));
    }

    fn weight_version(&self) -> u64 {
        assert!(!self.script.panics, "the script says so");
        VERSION
    }

    fn health(&self) -> Result<(), EngineError> {
        match &self.script.refuses {
            Some((_, EngineError::Stopped)) => Err(EngineError::Stopped),
            _ => Ok(()),
        }
    }
}

struct Run {
    id: RequestId,
    request: Request,
    script: Arc<Script>,
    seen: Arc<Seen>,
    sink: Box<dyn Sink>,
}

impl Run {
    fn send(&mut self, event: Event) -> Option<()> {
        self.sink.send(event).then_some(())
    }

    /// Plays the script; `None` if nobody listens.
    fn play(mut self) -> Option<()> {
        if let Some(top) = self.request.params.prompt_logprobs {
            let ids = self.request.prompt[1..].iter().enumerate();
            let tokens = ids.map(|(i, id)| prompt_token(i, *id, top)).collect();
            self.send(Event::Prompt { tokens })?;
        }
        let n = self.request.params.n;
        let mut lines: Vec<Option<Vec<u32>>> =
            (0..n).map(|index| Some((self.script.says)(&self.request, index))).collect();
        for round in 0.. {
            thread::sleep(self.script.pause);
            if self.script.fails_at == Some(round) {
                let error = EngineError::Internal("the script says so".into());
                return self.send(Event::Failed { error });
            }
            for (index, line) in lines.iter_mut().enumerate() {
                let Some(tokens) = line else { continue };
                let id = tokens.get(round).copied();
                let id = id.unwrap_or(if self.script.endless { 2 + u32::from(b'x') } else { EOS });
                if let Some(reason) = self.say(round, index, id)? {
                    *line = None;
                    self.send(Event::Finished { index, reason })?;
                }
            }
            if lines.iter().all(Option::is_none) {
                break;
            }
        }
        Some(())
    }

    /// Sends one token; tells whether the sample ends with it.
    fn say(&mut self, round: usize, index: usize, id: u32) -> Option<Option<FinishReason>> {
        if self.sink.is_closed() {
            return None;
        }
        if self.seen.aborted(self.id, index) {
            return Some(Some(FinishReason::Abort));
        }
        let params = &self.request.params;
        let stats = stats(round);
        let others = (1..).map(|i| (id.wrapping_add(i) % VOCAB as u32, stats.logprob - i as f32));
        let top = std::iter::once((id, stats.logprob)).chain(others).take(params.top_logprobs);
        let weight_version = VERSION + u64::from(round >= self.script.swap_at);
        let token = Token { id, stats, weight_version, top: top.collect() };
        let stops = params.stop_token_ids.contains(&id) || (id == EOS && !params.ignore_eos);
        let full = round + 1 == params.max_tokens;
        self.send(Event::Token { index, token })?;
        Some(match (stops, full) {
            (true, _) => Some(FinishReason::Stop),
            (_, true) => Some(FinishReason::Length),
            _ => None,
        })
    }
}
