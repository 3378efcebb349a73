//! The way of events from the engine's thread to the task of an HTTP request. The engine never
//! waits: where too many tokens wait for a slow reader, the feed closes and the engine drops the
//! request.

use onpolicy_plugin_api::{Event, Sink};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Instant,
};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};

/// Why a feed may close before its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeedLimits {
    /// Most tokens that wait to be taken.
    pub tokens: usize,
    /// When the request must have ended; never if none.
    pub deadline: Option<Instant>,
}

struct Shared {
    limits: FeedLimits,
    /// Tokens sent and not taken.
    waiting: AtomicUsize,
    lagged: AtomicBool,
}

impl Shared {
    fn is_over(&self) -> bool {
        self.lagged.load(Ordering::Relaxed)
            || self.limits.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }
}

/// The engine's end, for one prompt.
pub struct FeedSink {
    prompt: usize,
    events: UnboundedSender<(usize, Event)>,
    shared: Arc<Shared>,
}

/// The request's end.
pub struct Feed {
    events: UnboundedReceiver<(usize, Event)>,
    shared: Arc<Shared>,
}

/// A feed and its sinks, one for each of `prompts` prompts.
pub fn feed(prompts: usize, limits: FeedLimits) -> (Vec<FeedSink>, Feed) {
    let (sender, events) = mpsc::unbounded_channel();
    let (waiting, lagged) = (AtomicUsize::new(0), AtomicBool::new(false));
    let shared = Arc::new(Shared { limits, waiting, lagged });
    let sink = |prompt| FeedSink { prompt, events: sender.clone(), shared: shared.clone() };
    ((0..prompts).map(sink).collect(), Feed { events, shared })
}

impl Feed {
    /// The next event and the number of its prompt; `None` once the engine has let go.
    pub async fn next(&mut self) -> Option<(usize, Event)> {
        let (prompt, event) = self.events.recv().await?;
        if matches!(event, Event::Token { .. }) {
            self.shared.waiting.fetch_sub(1, Ordering::Relaxed);
        }
        Some((prompt, event))
    }

    /// True if it closed because too many tokens waited.
    pub fn lagged(&self) -> bool {
        self.shared.lagged.load(Ordering::Relaxed)
    }
}

impl Sink for FeedSink {
    fn send(&mut self, event: Event) -> bool {
        if self.is_closed() {
            return false;
        }
        if matches!(event, Event::Token { .. })
            && self.shared.waiting.fetch_add(1, Ordering::Relaxed) >= self.shared.limits.tokens
        {
            self.shared.lagged.store(true, Ordering::Relaxed);
            return false;
        }
        self.events.send((self.prompt, event)).is_ok()
    }

    fn is_closed(&self) -> bool {
        self.events.is_closed() || self.shared.is_over()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use onpolicy_plugin_api::{FinishReason, Token, TokenStats};
    use std::time::Duration;

    fn token() -> Event {
        let (stats, top) = (TokenStats::default(), Vec::new());
        Event::Token { index: 0, token: Token { id: 1, stats, weight_version: 0, top } }
    }

    fn pair(tokens: usize, deadline: Option<Instant>) -> (Vec<FeedSink>, Feed) {
        feed(2, FeedLimits { tokens, deadline })
    }

    #[tokio::test]
    async fn a_reader_that_keeps_up_gets_everything() {
        let (mut sinks, mut feed) = pair(2, None);
        for _ in 0..100 {
            assert!(sinks[1].send(token()));
            assert_eq!(feed.next().await, Some((1, token())));
        }
        let end = Event::Finished { index: 0, reason: FinishReason::Stop };
        assert!(sinks[0].send(end.clone()));
        assert_eq!(feed.next().await, Some((0, end)));
        drop(sinks);
        assert_eq!(feed.next().await, None);
        assert!(!feed.lagged());
    }

    #[tokio::test]
    async fn one_token_too_many_closes_it_for_all_prompts() {
        let (mut sinks, mut feed) = pair(3, None);
        let sent = [0, 1, 0, 1, 0].map(|prompt: usize| sinks[prompt].send(token()));
        assert_eq!(sent, [true, true, true, false, false]);
        assert!(sinks.iter().all(Sink::is_closed) && feed.lagged());
        // What the engine says on its way out is for nobody.
        assert!(!sinks[0].send(Event::Finished { index: 0, reason: FinishReason::Abort }));
        drop(sinks);
        let mut taken = 0;
        while feed.next().await.is_some() {
            taken += 1;
        }
        assert_eq!(taken, 3);
    }

    #[test]
    fn it_closes_at_the_deadline() {
        let (mut sinks, feed) = pair(3, Some(Instant::now() + Duration::from_millis(500)));
        assert!(sinks[0].send(token()) && !sinks[0].is_closed());
        std::thread::sleep(Duration::from_millis(550));
        assert!(sinks[0].is_closed() && !sinks[1].send(token()) && !feed.lagged());
    }
}
