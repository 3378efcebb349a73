//! `onpolicy bench check`: whether a device computes what it should, before anyone asks how fast.
//! Each check is one number beside the most (or least) that it may be.
//!
//! # Layout
//! - `kernels`: operations, one by one. `numbers`: log-probs against those that transformers computed,
//!   and the engine's against the trainer's. `training`: updates in place, checkpoints, twenty steps
//!   that learn. `memory`: allocations that fail.

mod kernels;
mod memory;
mod numbers;
mod training;

use super::{
    cli::placement,
    machine::{Machine, Versions},
};
use anyhow::{Context, ensure};
use clap::Args;
use onpolicy_engine::{device::Placement, panic::message};
use onpolicy_trainer::config::Config;
use serde::Serialize;
use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

/// `onpolicy bench check`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Folder of small checkpoints, each with a reference.json (tests/golden/tiny)
    #[arg(long, value_name = "DIR")]
    golden: PathBuf,
    /// Where the tensors live: cpu, cuda, auto (model.device)
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Type of the weights: f32, bf16 (model.dtype)
    #[arg(long, value_name = "TYPE")]
    dtype: Option<String>,
    /// Write the results to this file; - prints them in place of the table
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// One number, and what it may be.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Check {
    /// What was computed.
    pub name: String,
    /// The number; none where there was an error.
    pub value: Option<f64>,
    /// What it must not pass.
    pub limit: Limit,
    /// Whether it does not.
    pub passed: bool,
    /// What went wrong, or what else there is to say.
    pub note: String,
}

/// What a number may be.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// This or less.
    Most(f64),
    /// This or more.
    Least(f64),
}

impl Check {
    /// `value` against `limit`.
    pub fn new(name: impl Into<String>, value: f64, limit: Limit) -> Self {
        let passed = match limit {
            Limit::Most(most) => value <= most,
            Limit::Least(least) => value >= least,
        };
        Self { name: name.into(), value: Some(value), limit, passed, note: String::new() }
    }

    fn failed(name: &str, note: String) -> Self {
        Self { name: name.into(), value: None, limit: Limit::Most(0.0), passed: false, note }
    }
}

/// What all checks came to.
#[derive(Debug, Serialize)]
struct Checks {
    bench: &'static str,
    placement: String,
    machine: Machine,
    versions: Versions,
    checks: Vec<Check>,
}

/// Where the checks find models, and where their tensors shall live.
pub struct Place {
    keys: Vec<String>,
    placement: Placement,
}

impl Place {
    /// A configuration for the model at `path`, with more keys as `section.key=value`.
    ///
    /// # Errors
    /// Keys that make no sense.
    pub fn config(&self, path: &Path, keys: &[&str]) -> Result<Config, anyhow::Error> {
        let own = [format!("model.path={:?}", path.display().to_string())];
        let small = ["engine.kv_memory_mb=16", "server.enabled=false", "output.sample_prompts=0"];
        let more = small.iter().chain(keys).map(ToString::to_string);
        let all: Vec<String> = own.into_iter().chain(self.keys.clone()).chain(more).collect();
        Ok(Config::parse("", &all)?)
    }

    /// What a distance may be: `wide` in f32, `narrow` in a narrower type.
    pub fn most(&self, wide: f64, narrow: f64) -> Limit {
        Limit::Most(if self.placement.element_bytes() < 4 { narrow } else { wide })
    }
}

/// Runs the checks.
///
/// # Errors
/// A check that fails, after all have run and been reported.
pub fn run(arguments: &Arguments) -> Result<(), anyhow::Error> {
    let keys = placement(arguments.device.as_deref(), arguments.dtype.as_deref());
    let with_path = [&keys[..], &["model.path=\"x\"".into()]].concat();
    let placement = Config::parse("", &with_path)?.model.placement()?;
    let place = Place { keys, placement };
    let models = models(&arguments.golden)?;
    let mut checks = Vec::new();
    attempt(&mut checks, "kernels", || kernels::equal_references(&place));
    for path in &models {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        attempt(&mut checks, &format!("{name}: log-probs"), || numbers::golden(&place, path));
        attempt(&mut checks, &format!("{name}: engine"), || numbers::engine(&place, path));
    }
    attempt(&mut checks, "decode steps", || numbers::decoding(&place, &models[0]));
    attempt(&mut checks, "training", || training::learns(&place, &models[0]));
    attempt(&mut checks, "a checkpoint", || training::checkpoint(&place, &models[0]));
    attempt(&mut checks, "memory", || memory::failures(&place));
    let all = Checks {
        bench: "check",
        placement: placement.to_string(),
        machine: Machine::here(),
        versions: Versions::here(),
        checks,
    };
    all.publish(arguments.json.as_deref())?;
    let failed = all.checks.iter().filter(|check| !check.passed).count();
    ensure!(failed == 0, "{failed} of {} checks failed", all.checks.len());
    Ok(())
}

/// Adds what a group of checks comes to; an error or a panic is a check that failed.
fn attempt(
    checks: &mut Vec<Check>,
    name: &str,
    group: impl FnOnce() -> Result<Vec<Check>, anyhow::Error>,
) {
    eprintln!("{name} ...");
    match catch_unwind(AssertUnwindSafe(group)) {
        Ok(Ok(more)) => checks.extend(more),
        Ok(Err(error)) => checks.push(Check::failed(name, format!("{error:#}"))),
        Err(panic) => {
            let text = message(&*panic).unwrap_or("a panic");
            checks.push(Check::failed(name, text.to_string()));
        }
    }
}

/// The checkpoints under `golden`.
fn models(golden: &Path) -> Result<Vec<PathBuf>, anyhow::Error> {
    let entries = std::fs::read_dir(golden);
    let entries = entries.with_context(|| format!("cannot read {}", golden.display()))?;
    let paths = entries.flatten().map(|entry| entry.path());
    let mut models: Vec<PathBuf> =
        paths.filter(|path| path.join("reference.json").is_file()).collect();
    models.sort();
    ensure!(!models.is_empty(), "{} holds no folder with a reference.json", golden.display());
    Ok(models)
}

impl Checks {
    fn publish(&self, json: Option<&Path>) -> Result<(), anyhow::Error> {
        match json {
            Some(path) if path.as_os_str() == "-" => {
                println!("{}", serde_json::to_string_pretty(self)?);
            }
            Some(path) => {
                print!("{self}");
                std::fs::write(path, serde_json::to_string_pretty(self)? + "\n")?;
            }
            None => print!("{self}"),
        }
        Ok(())
    }
}

impl fmt::Display for Checks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gpu = self.machine.gpu.as_deref().unwrap_or("no GPU");
        writeln!(f, "bench check: {}; {gpu}; {}", self.placement, self.machine.cpu)?;
        let width = self.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
        for Check { name, value, limit, passed, note } in &self.checks {
            let verdict = if *passed { "ok  " } else { "FAIL" };
            let value = value.map_or_else(|| "-".to_string(), |value| format!("{value:.3e}"));
            let limit = match limit {
                Limit::Most(most) => format!("at most {most:.1e}"),
                Limit::Least(least) => format!("at least {least:.1e}"),
            };
            writeln!(f, "{verdict} {name:<width$}  {value:>10}  {limit}  {note}")?;
        }
        Ok(())
    }
}
