//! GRPO with entropy-discriminator clipping over a live engine.
//!
//! # Layout
//! - [`config`]: raw TOML and flags become one validated configuration.
//! - [`tasks`], [`verifiers`]: the built-in problems and judges; [`builtins`] names them.
//! - [`advantage`], [`entropy`]: rewards and token statistics become advantages and a keep mask.
//! - [`metrics`], [`plot`]: what a run leaves behind.

pub mod advantage;
pub mod builtins;
pub mod config;
pub mod entropy;
pub mod metrics;
pub mod plot;
pub mod tasks;
pub mod verifiers;
