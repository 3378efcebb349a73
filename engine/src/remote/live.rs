//! One request from its start to its end. However often it is tried, its sink hears of every
//! sample's end exactly once: nothing is delivered before a whole answer is there.

use super::{dialect::Answer, pool::Pool};
use onpolicy_plugin_api::{EngineError, Event, FinishReason, Request, Sink};
use std::{sync::Arc, time::Duration};
use tokio::sync::{mpsc::UnboundedReceiver, watch};

/// How often a request looks whether anybody still listens.
const LISTEN_POLL: Duration = Duration::from_millis(50);

/// A request's sink, and which samples it has not heard the end of.
struct Outlet {
    sink: Box<dyn Sink>,
    open: Vec<bool>,
}

/// What a request has to be told: to end early, or that the engine stops.
pub(super) struct Signals {
    /// One sample, or all.
    pub aborts: UnboundedReceiver<Option<usize>>,
    pub stop: watch::Receiver<bool>,
}

/// Answers a request.
pub(super) async fn serve(
    pool: Arc<Pool>,
    request: Request,
    sink: Box<dyn Sink>,
    mut signals: Signals,
) {
    let mut outlet = Outlet { sink, open: vec![true; request.params.n] };
    let deadline = pool.options.deadline();
    let work = tokio::time::timeout(deadline, pool.answer(&request));
    tokio::pin!(work);
    let mut poll = tokio::time::interval(LISTEN_POLL);
    loop {
        tokio::select! {
            biased;
            _ = signals.stop.wait_for(|stop| *stop) => return outlet.fail(EngineError::Stopped),
            abort = signals.aborts.recv() => {
                // Without a sender nobody can abort any more: the engine has stopped.
                let Some(abort) = abort else { return outlet.fail(EngineError::Stopped) };
                if !outlet.abort(abort) {
                    return;
                }
            }
            _ = poll.tick() => if outlet.sink.is_closed() {
                return;
            },
            done = &mut work => return match done {
                Ok(Ok(answer)) => outlet.deliver(answer),
                Ok(Err(error)) => outlet.fail(error),
                Err(_) => outlet.fail(EngineError::Internal(format!(
                    "no server answered within {:.1} s", deadline.as_secs_f64()
                ))),
            },
        }
    }
}

impl Outlet {
    /// Ends one sample, or all. False once none is left.
    fn abort(&mut self, index: Option<usize>) -> bool {
        let indices = match index {
            Some(index) => index..index + 1,
            None => 0..self.open.len(),
        };
        for index in indices {
            self.finish(index, FinishReason::Abort);
        }
        self.open.contains(&true)
    }

    fn is_open(&self, index: usize) -> bool {
        self.open.get(index).is_some_and(|open| *open)
    }

    fn finish(&mut self, index: usize, reason: FinishReason) {
        if self.is_open(index) {
            self.open[index] = false;
            self.sink.send(Event::Finished { index, reason });
        }
    }

    fn deliver(mut self, answer: Answer) {
        if let Some(tokens) = answer.prompt {
            self.sink.send(Event::Prompt { tokens });
        }
        for (index, sample) in answer.samples.into_iter().enumerate() {
            if !self.is_open(index) {
                continue;
            }
            for token in sample.tokens {
                if !self.sink.send(Event::Token { index, token }) {
                    return;
                }
            }
            self.finish(index, sample.finish);
        }
    }

    fn fail(mut self, error: EngineError) {
        self.sink.send(Event::Failed { error });
    }
}
