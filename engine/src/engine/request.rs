//! A request that the engine has taken and not ended yet.

use super::outlet::Outlet;
use crate::{
    grammar::Place,
    sampler::{Counts, Draw, Past, has_penalties, stream_of},
    sequence::Sequence,
};
use onpolicy_plugin_api::{
    EngineError, Event, FinishReason, PromptToken, Request, SamplingParams, Sink, Token,
};

/// A live request: its sink, how to draw, and which samples have not ended.
pub struct LiveRequest {
    params: SamplingParams,
    outlet: Outlet,
    seed: u64,
    /// Tokens that end a sample.
    stop_ids: Vec<u32>,
    prompt_len: usize,
    prompt_tokens: Vec<PromptToken>,
    /// What each sample has drawn; empty if there are no penalties.
    counts: Vec<Counts>,
    open: Vec<bool>,
    /// Where each sample stands in the request's grammar; none without one.
    places: Vec<Place>,
}

impl LiveRequest {
    /// A request that has just arrived.
    pub fn new(
        request: &Request,
        eos_token_ids: &[u32],
        sink: Box<dyn Sink>,
        grammar: Option<Place>,
    ) -> Self {
        let params = request.params.clone();
        let mut stop_ids = params.stop_token_ids.clone();
        if !params.ignore_eos {
            stop_ids.extend_from_slice(eos_token_ids);
        }
        let counted = if has_penalties(&params) { params.n } else { 0 };
        let mut live = Self {
            seed: params.seed.unwrap_or_else(rand::random),
            stop_ids,
            prompt_len: request.prompt.len(),
            prompt_tokens: Vec::new(),
            counts: vec![Counts::new(&request.prompt); counted],
            open: vec![true; params.n],
            places: grammar.map_or_else(Vec::new, |place| vec![place; params.n]),
            params,
            outlet: Outlet::new(sink),
        };
        // A prompt of one token has no log-probs to wait for.
        live.add_prompt_tokens(1, Vec::new());
        live
    }

    /// How many of the likeliest tokens are wanted beside each prompt token whose log-prob is still
    /// to be collected; none if no log-prob is.
    pub fn wanted_of_prompt(&self) -> Option<usize> {
        self.params.prompt_logprobs.filter(|_| self.prompt_tokens.len() + 1 < self.prompt_len)
    }

    /// Adds further prompt tokens, those from position `first` on. A prompt that is computed again
    /// repeats some; they are already known.
    pub fn add_prompt_tokens(&mut self, first: usize, tokens: Vec<PromptToken>) {
        let known = (self.prompt_tokens.len() + 1).saturating_sub(first);
        self.prompt_tokens.extend(tokens.into_iter().skip(known));
        let room = self.prompt_len.saturating_sub(1);
        self.prompt_tokens.truncate(room);
        if self.params.prompt_logprobs.is_some() && self.prompt_tokens.len() == room {
            // They are sent once.
            self.params.prompt_logprobs = None;
            self.outlet.send(Event::Prompt { tokens: std::mem::take(&mut self.prompt_tokens) });
        }
    }

    /// True if a draw depends on the number of the sample's tokens before it alone, not on which they are.
    pub fn draws_blindly(&self) -> bool {
        self.places.is_empty() && self.counts.is_empty() && self.params.bad_words.is_empty()
    }

    /// The draw from logits row `row` of the token that follows `sequence` and the first `ahead`
    /// of its guesses.
    pub fn draw<'a>(&'a self, row: usize, sequence: &'a Sequence, ahead: usize) -> Draw<'a> {
        let tokens = sequence.generated();
        let position = tokens.len() + ahead;
        let place = self.places.get(sequence.index);
        // A grammar that is at its end is not held back by `min_tokens`.
        let held = position < self.params.min_tokens
            && place.is_none_or(|place| place.allows_other_than(&self.stop_ids));
        let forbidden = if held { &self.stop_ids[..] } else { &[] };
        let stream = stream_of(self.seed, sequence.index);
        let past = Past { tokens, counts: self.counts.get(sequence.index) };
        let mask = place.map(Place::allowed);
        Draw { row, params: &self.params, stream, position, forbidden, mask, past }
    }

    /// Works out what the grammar allows next, for one sample; nothing without a grammar.
    ///
    /// # Errors
    /// Why the sample cannot go on.
    pub fn look(&mut self, index: usize) -> Result<(), EngineError> {
        let Some(place) = self.places.get_mut(index) else { return Ok(()) };
        place.look().map_err(|why| EngineError::invalid("grammar", why))
    }

    /// True if the samples follow a grammar.
    pub fn has_grammar(&self) -> bool {
        !self.places.is_empty()
    }

    /// Takes a drawn token into the sample's grammar.
    ///
    /// # Errors
    /// The grammar cannot go on with it.
    pub fn advance(&mut self, index: usize, token: u32) -> Result<(), EngineError> {
        let Some(place) = self.places.get_mut(index) else { return Ok(()) };
        place.advance(token).map_err(|why| EngineError::invalid("grammar", why))
    }

    /// The field that may leave no token to draw, if there is one.
    pub fn restriction(&self) -> Option<&'static str> {
        let params = &self.params;
        let fields = [
            (params.grammar.is_some(), "grammar"),
            (params.allowed_token_ids.is_some(), "allowed_token_ids"),
            (!params.bad_words.is_empty(), "bad_words"),
            (params.min_tokens > 0, "min_tokens"),
        ];
        fields.into_iter().find_map(|(restricts, field)| restricts.then_some(field))
    }

    /// Counts a token, which is delivered with the next event, or by [`LiveRequest::hand_over`].
    pub fn take(&mut self, index: usize, token: Token) {
        if let Some(counts) = self.counts.get_mut(index) {
            counts.push(token.id);
        }
        self.outlet.hold(Event::Token { index, token });
    }

    /// Delivers the tokens that were taken.
    pub fn hand_over(&mut self) {
        self.outlet.flush();
    }

    /// True if the token ends a sample.
    pub fn stops_at(&self, token: u32) -> bool {
        self.stop_ids.contains(&token)
    }

    /// Ends one sample; true if it was the last. One that has ended already is left alone.
    pub fn finish(&mut self, index: usize, reason: FinishReason) -> bool {
        if let Some(open) = self.open.get_mut(index).filter(|open| **open) {
            *open = false;
            self.outlet.send(Event::Finished { index, reason });
        }
        !self.open.contains(&true)
    }

    /// Ends all samples that have not ended.
    pub fn finish_all(&mut self, reason: FinishReason) {
        (0..self.open.len()).for_each(|index| {
            self.finish(index, reason);
        });
    }

    /// Ends the request with an error.
    pub fn fail(mut self, error: EngineError) {
        self.outlet.send(Event::Failed { error });
    }

    /// True once nobody listens any more.
    pub fn is_abandoned(&self) -> bool {
        self.outlet.is_closed()
    }
}
