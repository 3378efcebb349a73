//! A step, from its plan to its tokens.
//!
//! On a device that computes by itself a step is planned and given to it before the tokens of the one
//! before are known to the host: the device has them. So it never waits for the host, which tells
//! tokens, delivers and plans meanwhile. A sample that turns out to have ended has been computed once
//! too often then, and what was drawn for it is dropped.

use super::{
    request::LiveRequest,
    runner::{StepOutput, predicted_prompt},
    targets::{self, Target},
    worker::Worker,
};
use crate::{
    device::drawing::Drawing,
    profile::{self, Phase, timed},
    sampler::{Draw, Drawn, NOTHING_LEFT},
    scheduler::Step,
};
use onpolicy_plugin_api::{EngineError, FinishReason, RequestId, Token};
use std::{collections::HashMap, time::Instant};

/// A step that is computed.
pub struct Flight {
    /// Samples that get a token, one for each draw.
    targets: Vec<Target>,
    drawing: Drawing,
    /// Requests whose grammar cannot go on.
    stuck: HashMap<RequestId, EngineError>,
    num_tokens: usize,
    began: Instant,
}

impl Worker {
    /// Ends the step under way and begins the next one: in this order, unless the next one can do
    /// without the tokens of the one before.
    pub(super) fn step(&mut self) {
        let mut before = self.flight.take();
        if let Some(flight) = before.take_if(|flight| !self.can_plan_behind(flight)) {
            self.land(flight);
        }
        self.begin(before);
        if !self.overlaps {
            self.land_flight();
        }
    }

    /// Ends the step under way: its tokens are known and taken.
    pub(super) fn land_flight(&mut self) {
        if let Some(flight) = self.flight.take() {
            self.land(flight);
        }
    }

    /// Whether the next step can be planned before the tokens of this one are known.
    fn can_plan_behind(&self, flight: &Flight) -> bool {
        let blind =
            |target: &Target| self.live.get(&target.request).is_none_or(LiveRequest::draws_blindly);
        flight.drawing.tokens().is_some()
            && flight.targets.iter().all(blind)
            // Nobody loses blocks to samples that have ended.
            && self.scheduler.has_room()
    }

    /// True if no request has begun that has not ended, and no step is computed for one that has.
    pub(super) fn is_drained(&self) -> bool {
        self.flight.is_none() && self.scheduler.is_drained()
    }

    /// Plans a step and gives it to the device, behind the step `before` if that is still computed; this
    /// one ends then.
    fn begin(&mut self, before: Option<Flight>) {
        let began = Instant::now();
        let step = timed(Phase::Schedule, || {
            let expected = before.as_ref().map_or(&[][..], |flight| &flight.targets);
            let expected = expected.iter().enumerate();
            expected.for_each(|(draw, target)| self.scheduler.expect(target.seq, draw));
            self.scheduler.schedule()
        });
        let output = (!step.is_empty()).then(|| {
            self.steps_ahead += u64::from(before.is_some());
            let drawn = before.as_ref().and_then(|flight| flight.drawing.tokens());
            self.runner.forward(&step, &self.scheduler, drawn)
        });
        // While the device computes, and before anything waits for that.
        if let Some(flight) = before {
            self.land(flight);
        }
        self.hand_over();
        let Some(output) = output else { return };
        timed(Phase::Sampling, || self.collect_prompt_logprobs(&step, &output));
        timed(Phase::Schedule, || self.scheduler.computed(&step));
        let flight = timed(Phase::Sampling, || self.draw(&step, &output, began));
        self.flight = Some(flight);
    }

    fn collect_prompt_logprobs(&mut self, step: &Step, output: &StepOutput) {
        for (index, chunk) in step.chunks.iter().enumerate() {
            let Some(sequence) = self.scheduler.sequence(chunk.seq) else { continue };
            let Some(live) = self.live.get_mut(&sequence.group) else { continue };
            if let Some(top) = live.wanted_of_prompt() {
                let (first, next) = predicted_prompt(chunk, &sequence.tokens, sequence.prompt_len);
                live.add_prompt_tokens(first, self.runner.next_tokens(output, index, &next, top));
            }
        }
    }

    /// Draws a token for every sample whose turn it is, and for each of their guesses the one that
    /// follows it. A group's first tokens are all drawn from the one row that its prompt ends in.
    fn draw(&mut self, step: &Step, output: &StepOutput, began: Instant) -> Flight {
        let targets = self.targets(step);
        let stuck = targets::look(&mut self.live, &targets);
        let (targets, draws): (Vec<Target>, Vec<Draw<'_>>) = targets
            .into_iter()
            .filter(|(_, target)| !stuck.contains_key(&target.request))
            .map(|(row, target)| {
                let sequence = self.scheduler.sequence(target.seq).expect("a sequence that draws");
                let draw = self.live[&target.request].draw(row, sequence, target.ahead);
                (target, draw)
            })
            .unzip();
        let drawing = match draws[..] {
            [] => Drawing::known(Vec::new()),
            _ => self.runner.draw(output, &draws),
        };
        Flight { targets, drawing, stuck, num_tokens: step.num_tokens(), began }
    }

    /// Who draws from which of the step's sampled rows.
    fn targets(&mut self, step: &Step) -> Vec<(usize, Target)> {
        let (mut targets, mut row) = (Vec::new(), 0);
        for chunk in step.chunks.iter().filter(|chunk| chunk.sample) {
            for seq in self.scheduler.fork(chunk.seq) {
                let sequence = self.scheduler.sequence(seq).expect("a forked sequence exists");
                let ahead = 0..=chunk.drafts;
                targets.extend(ahead.map(|ahead| (row + ahead, Target::of(sequence, ahead))));
            }
            row += 1 + chunk.drafts;
        }
        targets
    }

    /// Ends a step: waits for its tokens and gives them to their samples.
    fn land(&mut self, flight: Flight) {
        let Flight { targets, drawing, stuck, num_tokens, began } = flight;
        let drawn = timed(Phase::Sampling, || drawing.wait());
        timed(Phase::Delivery, || {
            stuck.into_iter().for_each(|(request, error)| self.fail(request, error));
            self.deliver(targets.into_iter().zip(drawn));
        });
        self.steps += 1;
        profile::count_step(num_tokens);
        metrics::counter!("onpolicy_step_tokens_total").increment(num_tokens as u64);
        // Behind another one it begins when that has ended.
        let began = self.landed.map_or(began, |landed| landed.max(began));
        let landed = *self.landed.insert(Instant::now());
        metrics::histogram!("onpolicy_step_seconds").record(landed - began);
    }

    fn deliver(&mut self, drawn: impl Iterator<Item = (Target, Result<Drawn, String>)>) {
        let weight_version = self.shared.version.get();
        let mut delivered = 0;
        for (target, drawn) in drawn {
            // It has ended while this was computed, or an earlier token was another than the guess that
            // this one follows, or the last.
            let ended = self.scheduler.sequence(target.seq).is_none();
            if ended || target.ahead > 0 && !self.scheduler.draws(target.seq) {
                continue;
            }
            // An earlier sample of the same step may have ended the whole request.
            let Some(live) = self.live.get_mut(&target.request) else { continue };
            let taken = drawn.map_err(|reason| draw_error(reason, live)).and_then(|drawn| {
                live.advance(target.index, drawn.id)?;
                Ok(drawn)
            });
            let drawn = match taken {
                Ok(drawn) => drawn,
                Err(error) => {
                    self.fail(target.request, error);
                    continue;
                }
            };
            delivered += 1;
            let stop = live.stops_at(drawn.id);
            let token = Token { id: drawn.id, stats: drawn.stats, weight_version, top: drawn.top };
            live.take(target.index, token);
            let full = self.scheduler.append(target.seq, drawn.id);
            if stop || full {
                let reason = if stop { FinishReason::Stop } else { FinishReason::Length };
                self.scheduler.finish(target.seq);
                if live.finish(target.index, reason) {
                    self.live.remove(&target.request);
                }
            }
        }
        metrics::counter!("onpolicy_generated_tokens_total").increment(delivered);
        if !self.overlaps {
            self.hand_over();
        }
    }
}

/// Whose fault it is that no token could be drawn.
fn draw_error(reason: String, live: &LiveRequest) -> EngineError {
    match live.restriction().filter(|_| reason == NOTHING_LEFT) {
        Some(field) => {
            EngineError::invalid(field, "no token is left to draw: allow more, or forbid fewer")
        }
        None => EngineError::Internal(reason),
    }
}

#[cfg(test)]
mod tests;
