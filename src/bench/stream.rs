//! Samples that stream, and when each of their tokens came.

use super::workload::{Prompt, Workload};
use anyhow::{Context, anyhow, bail};
use onpolicy_engine::engine::EngineHandle;
use onpolicy_plugin_api::{Engine, Event, Request, RequestId, SamplingParams, Sink};
use std::{
    sync::mpsc::{Receiver, Sender, channel},
    time::{Duration, Instant},
};

/// Longest time that is waited for a token.
const PATIENCE: Duration = Duration::from_secs(120);

/// A group of samples that is being made.
pub struct Stream {
    id: RequestId,
    events: Receiver<(Instant, Event)>,
    tokens: Tokens,
}

/// When each token came, by sample.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tokens(Vec<Vec<Instant>>);

/// Notes the time of every event on the engine's thread.
struct Clock(Sender<(Instant, Event)>);

impl Sink for Clock {
    fn send(&mut self, event: Event) -> bool {
        self.0.send((Instant::now(), event)).is_ok()
    }

    fn is_closed(&self) -> bool {
        false
    }
}

impl Stream {
    /// Starts a group of `workload.samples` samples of `prompt`.
    ///
    /// # Errors
    /// The engine refuses it.
    pub fn start(
        engine: &EngineHandle,
        workload: &Workload,
        prompt: &Prompt,
        seed: u64,
    ) -> Result<Self, anyhow::Error> {
        let params = SamplingParams {
            n: workload.samples,
            max_tokens: workload.new_tokens,
            ignore_eos: true,
            seed: Some(seed),
            ..SamplingParams::default()
        };
        let (sender, events) = channel();
        let request = Request::new(prompt.ids.clone(), params);
        let id = engine.submit(request, Box::new(Clock(sender)))?;
        Ok(Self { id, events, tokens: Tokens(vec![Vec::new(); workload.samples]) })
    }

    /// Waits until every sample has had `count` more tokens, from now on.
    ///
    /// # Errors
    /// A sample ended before, or the engine failed.
    pub fn wait(&mut self, count: usize) -> Result<(), anyhow::Error> {
        while let Ok(event) = self.events.try_recv() {
            self.take(event)?;
        }
        let wanted: Vec<usize> = self.tokens.0.iter().map(|sample| sample.len() + count).collect();
        while self.tokens.0.iter().zip(&wanted).any(|(sample, wanted)| sample.len() < *wanted) {
            let event = self.events.recv_timeout(PATIENCE).context("no token came in time")?;
            self.take(event)?;
        }
        Ok(())
    }

    fn take(&mut self, (time, event): (Instant, Event)) -> Result<(), anyhow::Error> {
        match event {
            Event::Token { index, .. } => self.tokens.0[index].push(time),
            Event::Failed { error } => return Err(error.into()),
            Event::Finished { .. } => {
                bail!("a sample ended too early; take a model of more context")
            }
            Event::Prompt { .. } => {}
        }
        Ok(())
    }

    /// Ends the samples; when their tokens came.
    pub fn stop(self, engine: &EngineHandle) -> Tokens {
        engine.abort(self.id, None);
        self.tokens
    }
}

impl Tokens {
    /// Seconds between neighbouring tokens of a sample, of those pairs that `wanted` takes.
    pub fn gaps(&self, wanted: impl Fn(Instant, Instant) -> bool) -> Vec<f64> {
        let pairs = self.0.iter().flat_map(|sample| sample.windows(2));
        let wanted = pairs.filter(|pair| wanted(pair[0], pair[1]));
        wanted.map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect()
    }

    /// The longest of [`Tokens::gaps`].
    ///
    /// # Errors
    /// There is none.
    pub fn longest_gap(
        &self,
        wanted: impl Fn(Instant, Instant) -> bool,
    ) -> Result<f64, anyhow::Error> {
        let gaps = self.gaps(wanted);
        gaps.into_iter().reduce(f64::max).ok_or_else(|| anyhow!("no token came during the update"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_between_tokens_of_one_sample() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let tokens = Tokens(vec![vec![at(0), at(10), at(40)], vec![at(5), at(16)]]);
        let all = tokens.gaps(|_, _| true);
        let ms: Vec<u64> = all.iter().map(|gap| (gap * 1e3).round() as u64).collect();
        assert_eq!(ms, [10, 30, 11]);
        let overlapping = tokens.longest_gap(|from, to| from < at(12) && to > at(11));
        assert!((overlapping.expect("a gap") - 0.030).abs() < 1e-9);
        let early = tokens.longest_gap(|_, to| to < at(12)).expect("a gap");
        assert!((early - 0.010).abs() < 1e-9);
        assert!(tokens.longest_gap(|from, _| from > at(50)).is_err());
    }
}
