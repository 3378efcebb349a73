//! What the engine's owner does to it: pauses, sleep, weights from disk; from inside and over HTTP.

#[path = "../common/mod.rs"]
mod common;

mod access;
mod directories;
mod pausing;
mod routes;
mod server;
mod sleeping;
mod support;
mod updates;
