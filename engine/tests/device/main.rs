//! The libtorch path, on the CPU: in f64, where it has to give what the native path gives, and in
//! bf16, the type that a CUDA device serves.

#[path = "../common/mod.rs"]
mod common;

mod golden;
mod http;
mod refusals;
mod requests;
mod support;
mod weights;
