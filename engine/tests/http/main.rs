//! The HTTP routes over real sockets, with an engine that says what it is told.

mod chat;
mod completions;
mod disconnects;
mod failures;
mod fields;
mod others;
mod render;
mod scripted;
mod server;
mod stop;
mod streams;
mod structured;
mod text;
mod tokenizer;
mod tools;

/// The routes under test.
const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";
