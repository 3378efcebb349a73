//! A generation told as a stream of events.

use crate::http::error::ApiError;
use crate::http::generation::{Generation, Update};
use crate::http::stream::{failure, respond};
use axum::response::Response;
use axum::response::sse::Event;
use futures::stream;
use serde::Serialize;
use std::collections::VecDeque;

/// How a route words what happens to its samples.
pub trait Teller: Send + 'static {
    /// What is said of an update; nothing if the client has not asked for what is in it.
    fn tell(&mut self, update: Update) -> Option<Event>;
    /// What is said when all samples have finished.
    fn close(&mut self) -> Option<Event>;
}

/// An event with JSON as its data.
pub fn event(data: &impl Serialize) -> Event {
    let event = Event::default().json_data(data);
    event.unwrap_or_else(|error| failure(&ApiError::internal(error.to_string())))
}

struct Telling<T> {
    generation: Generation,
    teller: T,
    ready: VecDeque<Event>,
    over: bool,
}

/// Answers with a stream that ends with `[DONE]`, or with an error event without it.
pub fn stream_of(generation: Generation, teller: impl Teller) -> Response {
    let telling = Telling { generation, teller, ready: VecDeque::new(), over: false };
    respond(stream::unfold(telling, async |mut telling| Some((telling.next().await?, telling))))
}

impl<T: Teller> Telling<T> {
    async fn next(&mut self) -> Option<Event> {
        while self.ready.is_empty() && !self.over {
            match self.generation.next().await {
                Some(Ok(update)) => self.ready.extend(self.teller.tell(update)),
                Some(Err(error)) => self.end([failure(&error)]),
                None => {
                    let last = self.teller.close();
                    self.end(last.into_iter().chain([Event::default().data("[DONE]")]));
                }
            }
        }
        self.ready.pop_front()
    }

    fn end(&mut self, events: impl IntoIterator<Item = Event>) {
        self.over = true;
        self.ready.extend(events);
    }
}
