//! One sample while mistral.rs runs it: a row of logits in, the next token out.
//!
//! mistral.rs calls [`Sample::apply`] once for each token, at the end of a step and on threads of
//! its own, and draws the token from what that returns: a row that leaves no choice.

use super::{instance::Instance, line::Line, live::Live, lock};
use crate::sampler::{Draw, sample_row, stream_of};
use mistralrs::{CustomLogitsProcessor, Device, Result, Tensor};
use onpolicy_plugin_api::{EngineError, FinishReason, Token};
use std::sync::{Arc, Mutex};

/// One sample of a request.
pub(super) struct Sample {
    pub live: Arc<Live>,
    pub index: usize,
    pub instance: Arc<Instance>,
    pub line: Arc<Line>,
    /// Its tokens so far.
    pub tokens: Mutex<Vec<u32>>,
    /// A token of plain text. A sample that has ended goes on with it for the step or two that
    /// mistral.rs takes to notice: it looks only when the text so far is whole.
    pub filler: u32,
}

impl CustomLogitsProcessor for Sample {
    /// `context` is the prompt and what followed. Never an error: one would end the step before
    /// the other samples have their tokens.
    fn apply(&self, logits: &Tensor, context: &[u32]) -> Result<Tensor> {
        let mut tokens = lock(&self.tokens);
        let position = context.len().saturating_sub(self.live.prompt.len());
        if let Some(&known) = tokens.get(position) {
            return only(known);
        }
        if !self.line.is_open() {
            return only(self.filler);
        }
        match logits.to_vec1::<f32>() {
            Ok(row) => only(self.next(&row, &mut tokens)),
            Err(error) => only(self.fail(error.to_string())),
        }
    }
}

/// Logits of which `token` is the likeliest; mistral.rs takes the likeliest.
fn only(token: u32) -> Result<Tensor> {
    let mut row = vec![0.0f32; token as usize + 1];
    row[token as usize] = 1.0;
    let len = row.len();
    Tensor::from_vec(row, len, &Device::Cpu)
}

impl Sample {
    /// Draws, delivers, and ends the sample where it ends.
    fn next(&self, row: &[f32], tokens: &mut Vec<u32>) -> u32 {
        let live = &self.live;
        if live.is_abandoned() || !live.is_open(self.index) {
            return self.end(FinishReason::Abort);
        }
        let position = tokens.len();
        let early = position < live.params.min_tokens;
        let draw = Draw {
            row: 0,
            params: &live.params,
            stream: stream_of(live.seed, self.index),
            position,
            forbidden: if early { &live.stop_ids[..] } else { &[] },
        };
        let drawn = match sample_row(row, &draw) {
            Ok(drawn) => drawn,
            Err(reason) => return self.fail(reason),
        };
        tokens.push(drawn.id);
        let weight_version = self.instance.version();
        let token = Token { id: drawn.id, stats: drawn.stats, weight_version, top: drawn.top };
        if !live.deliver(self.index, token) {
            self.end(FinishReason::Abort);
        } else if live.stop_ids.contains(&drawn.id) {
            self.end(FinishReason::Stop);
        } else if tokens.len() >= live.params.max_tokens {
            self.end(FinishReason::Length);
        }
        drawn.id
    }

    fn end(&self, reason: FinishReason) -> u32 {
        self.live.finish(self.index, reason);
        self.line.hang_up();
        self.filler
    }

    fn fail(&self, reason: String) -> u32 {
        self.live.fail(EngineError::Internal(reason));
        self.line.hang_up();
        self.filler
    }
}
