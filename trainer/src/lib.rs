//! GRPO with entropy-discriminator clipping over a live engine.
//!
//! # Layout
//! In the order that a run's data flows:
//! - [`config`]: raw TOML and flags become one validated configuration.
//! - [`builtins`]: the plug-ins that come with the crate: [`tasks`], [`verifiers`], [`entropy`].
//! - [`served`]: a model that is loaded, served, and ready to be trained. [`engines`]: by which
//!   engine. [`transfer`]: new weights for one that has its own.
//! - [`memory_plan`]: what a run takes. [`device_room`]: what K and V get of a device.
//! - [`run`]: a run from start to end. [`train`]: one step from top to bottom.
//! - [`rollout`]: problems become groups of samples. [`queue`]: those of the next steps.
//! - [`reward`]: samples become rewards.
//! - [`advantage`], [`entropy`]: rewards and token statistics become advantages and a keep mask.
//! - [`own_stats`]: token statistics where the engine tells none. [`room`]: how much goes through
//!   the model at a time.
//! - [`batch`]: scored groups become packs. [`loss`]: packs become gradients, through the output
//!   [`head`] in chunks. [`correction`]: the engine's log-probs against the trainer's.
//! - [`optimizer`], [`schedule`]: gradients become new weights. [`checkpoint`]: weights and moments on disk.
//! - [`eval`]: Avg@K and Pass@K. [`samples`], [`metrics`], [`plot`]: what a run leaves behind.

pub mod advantage;
pub mod batch;
pub mod builtins;
pub mod checkpoint;
mod clock;
pub mod config;
pub mod correction;
pub mod device_room;
pub mod engines;
pub mod entropy;
pub mod error;
pub mod eval;
pub mod head;
pub mod loss;
pub mod memory_plan;
pub mod metrics;
pub mod optimizer;
pub mod own_stats;
pub mod plot;
pub mod queue;
pub mod reward;
pub mod rollout;
pub mod room;
pub mod run;
pub mod samples;
pub mod schedule;
pub mod served;
pub mod tasks;
pub mod train;
pub mod transfer;
pub mod verifiers;
