//! One sample while mistral.rs runs it: a row of logits in, the next token out.
//!
//! mistral.rs calls [`Sample::apply`] once for each token, at the end of a step and on threads of
//! its own, and draws the token from what that returns: a row that leaves no choice.

use super::{instance::Instance, line::Line, live::Live, lock};
use crate::{
    grammar::Place,
    sampler::{Counts, Draw, Drawn as Next, Past, has_penalties, sample_row, stream_of},
};
use mistralrs::{CustomLogitsProcessor, Device, Tensor};
use onpolicy_plugin_api::{EngineError, FinishReason, Token};
use std::sync::{Arc, Mutex};

/// One sample of a request.
pub(super) struct Sample {
    pub live: Arc<Live>,
    pub index: usize,
    pub instance: Arc<Instance>,
    pub line: Arc<Line>,
    /// What it has drawn so far.
    pub drawn: Mutex<Drawn>,
    /// A token of plain text. A sample that has ended goes on with it for the step or two that
    /// mistral.rs takes to notice: it looks only when the text so far is whole.
    pub filler: u32,
}

/// The tokens of a sample so far.
pub(super) struct Drawn {
    tokens: Vec<u32>,
    /// The same and the prompt's, counted, if penalties ask for it.
    counts: Option<Counts>,
    /// Where the sample stands in its grammar, if it has one.
    place: Option<Place>,
}

impl Drawn {
    /// Nothing yet.
    pub fn new(live: &Live) -> Self {
        let counted = has_penalties(&live.params);
        let counts = counted.then(|| Counts::new(&live.prompt));
        Self { tokens: Vec::new(), counts, place: live.place() }
    }

    /// Draws the next token from a row of logits.
    fn draw(&mut self, row: &[f32], live: &Live, index: usize) -> Result<Next, EngineError> {
        let grammar = |why: String| EngineError::invalid("grammar", why);
        self.place.as_mut().map_or(Ok(()), Place::look).map_err(grammar)?;
        let (position, place) = (self.tokens.len(), self.place.as_ref());
        // A grammar that is at its end is not held back by `min_tokens`.
        let held = position < live.params.min_tokens
            && place.is_none_or(|place| place.allows_other_than(&live.stop_ids));
        let draw = Draw {
            stream: stream_of(live.seed, index),
            position,
            forbidden: if held { &live.stop_ids[..] } else { &[] },
            mask: place.map(Place::allowed),
            past: Past { tokens: &self.tokens, counts: self.counts.as_ref() },
            ..Draw::new(0, &live.params)
        };
        let next = sample_row(row, &draw).map_err(EngineError::Internal)?;
        if let Some(place) = &mut self.place {
            place.advance(next.id).map_err(grammar)?;
        }
        if let Some(counts) = &mut self.counts {
            counts.push(next.id);
        }
        self.tokens.push(next.id);
        Ok(next)
    }
}

impl CustomLogitsProcessor for Sample {
    /// `context` is the prompt and what followed. Never an error: one would end the step before
    /// the other samples have their tokens.
    fn apply(&self, logits: &Tensor, context: &[u32]) -> mistralrs::Result<Tensor> {
        let mut drawn = lock(&self.drawn);
        let position = context.len().saturating_sub(self.live.prompt.len());
        if let Some(&known) = drawn.tokens.get(position) {
            return only(known);
        }
        if !self.line.is_open() {
            return only(self.filler);
        }
        match logits.to_vec1::<f32>() {
            Ok(row) => only(self.next(&row, &mut drawn)),
            Err(error) => only(self.fail(EngineError::Internal(error.to_string()))),
        }
    }
}

/// Logits of which `token` is the likeliest; mistral.rs takes the likeliest.
fn only(token: u32) -> mistralrs::Result<Tensor> {
    let mut row = vec![0.0f32; token as usize + 1];
    row[token as usize] = 1.0;
    let len = row.len();
    Tensor::from_vec(row, len, &Device::Cpu)
}

impl Sample {
    /// Draws, delivers, and ends the sample where it ends.
    fn next(&self, row: &[f32], drawn: &mut Drawn) -> u32 {
        let live = &self.live;
        if live.is_abandoned() || !live.is_open(self.index) {
            return self.end(FinishReason::Abort);
        }
        let next = match drawn.draw(row, live, self.index) {
            Ok(next) => next,
            Err(error) => return self.fail(error),
        };
        let weight_version = self.instance.version();
        let token = Token { id: next.id, stats: next.stats, weight_version, top: next.top };
        if !live.deliver(self.index, token) {
            self.end(FinishReason::Abort);
        } else if live.stop_ids.contains(&next.id) {
            self.end(FinishReason::Stop);
        } else if drawn.tokens.len() >= live.params.max_tokens {
            self.end(FinishReason::Length);
        }
        next.id
    }

    fn end(&self, reason: FinishReason) -> u32 {
        self.live.finish(self.index, reason);
        self.line.hang_up();
        self.filler
    }

    fn fail(&self, error: EngineError) -> u32 {
        self.live.fail(error);
        self.line.hang_up();
        self.filler
    }
}
