//! The engine over mistral.rs. `make test-mistralrs` compiles and runs it.

#[path = "../common/mod.rs"]
mod common;
mod http;
mod oracle;
mod refusals;
mod requests;
mod support;
mod swap;
