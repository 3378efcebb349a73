//! The HTTP routes over real sockets, with an engine that says what it is told.

mod chat;
mod completions;
mod disconnects;
mod failures;
mod fields;
mod generate_sglang;
mod generate_trl;
mod generate_vllm;
mod health;
mod load_limits;
mod load_slow;
mod load_stop;
mod openapi;
mod others;
mod render;
mod sampling;
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
