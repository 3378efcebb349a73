//! The command: parse, build, call. A crate that adds plug-ins calls [`main`] with them and is the
//! same command with more names in it.

mod bench;
mod cli;
mod commands;
mod profile;
mod progress;
mod server;

use clap::Parser;
use onpolicy_plugin_api::Plugins;
use std::process::ExitCode;

/// Runs the command over the process's arguments. `plugins` adds to the built-in plug-ins.
pub fn main(plugins: impl FnOnce(Plugins) -> Plugins) -> ExitCode {
    let arguments = cli::Arguments::parse();
    onpolicy_engine::panic::speak_briefly();
    let filter = tracing_subscriber::EnvFilter::try_from_env("ONPOLICY_LOG")
        .unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match commands::run(arguments, plugins) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
