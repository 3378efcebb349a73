//! One function for each command.

mod eval;
mod plan;
mod plot;
mod serve;
mod train;

use crate::{
    bench,
    cli::{Arguments, Command},
};
use onpolicy_plugin_api::Plugins;
use onpolicy_trainer::config::Config;

/// Says what is loaded, and where the weights go.
fn announce(config: &Config) -> Result<(), anyhow::Error> {
    eprintln!("loading {} ({}) ...", config.model.path, config.model.placement()?);
    Ok(())
}

/// Runs the command that the arguments name.
pub fn run(
    arguments: Arguments,
    plugins: impl FnOnce(Plugins) -> Plugins,
) -> Result<(), anyhow::Error> {
    match arguments.command {
        Command::Train(arguments) => train::run(&arguments, plugins),
        Command::Serve(arguments) => serve::run(&arguments, plugins),
        Command::Eval(arguments) => eval::run(&arguments, plugins),
        Command::Plan(arguments) => plan::run(&arguments),
        Command::Plot(arguments) => plot::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
    }
}
