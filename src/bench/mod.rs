//! `onpolicy bench`: how fast the parts are, and how that stands to what the machine can do.
//!
//! # Layout
//! - `cli`: the command line. `session`: a served model, its rounds of runs, the machine's rates.
//! - `workload`: how much is asked for, and the prompts.
//! - `arithmetic`: operations and bytes of the work. `roofline`: the time that they need.
//! - `report`: every run as data. `table`: as a person reads it. `plot`: as bars.
//! - `machine`: what it was measured on.
//! - `rollout`: new tokens a second; `client`: over HTTP; `compare`: which servers to race;
//!   `phases`: where the time went.
//! - `train`: forward and backward passes. `step`: a whole GRPO step.
//! - `decode`: prefill and decode steps by size of the batch. `shapes`: random weights in the shapes
//!   of known models. `products`: the ways to make a step's products.
//! - `update`: the weight swap under load; `stream`: that load.
//! - `check`: whether a device computes what it should.
//! - `modes`: `bench loop`: online rollouts against batch training.

mod arithmetic;
mod check;
mod cli;
mod client;
mod compare;
mod decode;
mod machine;
mod modes;
mod phases;
mod plot;
mod products;
mod report;
mod rollout;
mod roofline;
mod session;
mod shapes;
mod step;
mod stream;
mod table;
mod train;
mod update;
mod workload;

pub use cli::Bench;

/// Runs the benchmark that the arguments name.
///
/// # Errors
/// What the benchmark says.
pub fn run(arguments: &Bench) -> Result<(), anyhow::Error> {
    match &arguments.which {
        cli::Which::Rollout(arguments) => rollout::run(arguments),
        cli::Which::Train(arguments) => train::run(arguments),
        cli::Which::Step(arguments) => step::run(arguments),
        cli::Which::Update(arguments) => update::run(arguments),
        cli::Which::Decode(arguments) => decode::run(arguments),
        cli::Which::Products(arguments) => products::run(arguments),
        cli::Which::Check(arguments) => check::run(arguments),
        cli::Which::Plot(arguments) => plot::run(arguments),
        cli::Which::Loop(arguments) => modes::run(arguments),
    }
}
