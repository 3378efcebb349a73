//! `onpolicy bench`: how fast the parts are, and how that stands to what the machine can do.
//!
//! # Layout
//! - `cli`: the command line. `session`: a served model, its rounds of runs, the machine's rates.
//! - `workload`: how much is asked for, and the prompts.
//! - `arithmetic`: operations and bytes of the work. `roofline`: the time that they need.
//! - `report`: every run as data. `table`: as a person reads it.
//! - `machine`: what it was measured on.
//! - `train`: forward and backward passes.

#![allow(dead_code)] // rollout, step and update, which use the rest, follow

mod arithmetic;
mod cli;
mod machine;
mod report;
mod roofline;
mod session;
mod table;
mod train;
mod workload;

pub use cli::Bench;

/// Runs the benchmark that the arguments name.
///
/// # Errors
/// What the benchmark says.
pub fn run(arguments: &Bench) -> Result<(), anyhow::Error> {
    match &arguments.which {
        cli::Which::Train(arguments) => train::run(arguments),
    }
}
