//! Streamed answers: server-sent events in OpenAI's order. A stream that fails half-way ends with
//! an error event and without `[DONE]`.

use super::answer::{Envelope, Meta, Usage, Wording};
use super::error::ApiError;
use super::generation::{Generation, Update};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, Stream, StreamExt};
use onpolicy_plugin_api::PromptToken;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::panic::AssertUnwindSafe;

/// The chunks of one answer.
pub(super) struct Chunks<W: Wording> {
    wording: W,
    meta: Meta,
    generation: Generation,
    ready: VecDeque<Event>,
    completion_tokens: usize,
    prompt_shown: bool,
    over: bool,
}

impl<W: Wording> Chunks<W> {
    pub(super) fn new(wording: W, meta: Meta, generation: Generation) -> Self {
        let mut this = Self {
            wording,
            meta,
            generation,
            ready: VecDeque::new(),
            completion_tokens: 0,
            prompt_shown: false,
            over: false,
        };
        if !this.wording.opens_with_logprobs() {
            for index in 0..this.generation.samples() {
                this.open(index, None);
            }
        }
        this
    }

    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.over {
                return None;
            }
            match self.generation.next().await {
                Some(Ok(update)) => self.update(update),
                Some(Err(error)) => self.fail(&error),
                None => self.close(),
            }
        }
    }

    fn update(&mut self, update: Update) {
        match update {
            Update::Prompt { prompt, tokens } => {
                let per_prompt = self.generation.samples_per_prompt();
                for sample in 0..per_prompt {
                    self.open(prompt * per_prompt + sample, Some(&tokens));
                }
            }
            Update::Piece { index, piece } => {
                if let Some(delta) = self.wording.piece(index, piece) {
                    self.chunk(vec![delta], None);
                }
            }
            Update::Finished { index, finish } => {
                self.completion_tokens += finish.tokens;
                let delta = self.wording.finish(index, finish);
                self.chunk(vec![delta], None);
            }
        }
    }

    fn open(&mut self, index: usize, prompt_logprobs: Option<&[PromptToken]>) {
        if let Some(delta) = self.wording.opening(index, prompt_logprobs) {
            self.chunk(vec![delta], None);
        }
    }

    fn chunk(&mut self, choices: Vec<W::Delta>, usage: Option<Usage>) {
        let mut chunk = Envelope::new(&self.meta, W::CHUNK, choices);
        chunk.usage = self.meta.include_usage.then_some(usage);
        if !std::mem::replace(&mut self.prompt_shown, true) {
            chunk.prompt_token_ids = self.meta.prompt_token_ids.as_deref();
        }
        let event = Event::default().json_data(&chunk);
        self.ready.push_back(event.unwrap_or_else(|e| failure(&ApiError::internal(e.to_string()))));
    }

    fn fail(&mut self, error: &ApiError) {
        self.over = true;
        self.ready.push_back(failure(error));
    }

    fn close(&mut self) {
        self.over = true;
        if self.meta.include_usage {
            let usage = Usage::new(self.meta.prompt_tokens, self.completion_tokens);
            self.chunk(Vec::new(), Some(usage));
        }
        self.ready.push_back(Event::default().data("[DONE]"));
    }
}

/// The event that a failed stream ends with.
pub(super) fn failure(error: &ApiError) -> Event {
    tracing::error!("a stream failed: {}", error.message);
    Event::default().data(error.body().to_string())
}

impl<W: Wording> IntoResponse for Chunks<W> {
    fn into_response(self) -> Response {
        respond(stream::unfold(self, async |mut chunks| Some((chunks.next().await?, chunks))))
    }
}

/// Answers with the events; one that panics becomes a [`failure`].
pub(super) fn respond(events: impl Stream<Item = Event> + Send + 'static) -> Response {
    let events = AssertUnwindSafe(events).catch_unwind().map(|event| {
        let panicked = |_| failure(&ApiError::internal("the server failed; see its log"));
        Ok::<_, Infallible>(event.unwrap_or_else(panicked))
    });
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}
