//! `onpolicy plot`

use crate::cli;
use anyhow::Context;
use onpolicy_trainer::{metrics, plot};
use std::path::{Path, PathBuf};

pub fn run(arguments: &cli::Plot) -> Result<(), anyhow::Error> {
    let runs = arguments.runs.iter().map(|run| {
        let (name, dir) = run.split_once('=').unwrap_or((run, run));
        let file = Path::new(dir).join("metrics.jsonl");
        let steps = metrics::read(&file).with_context(|| format!("{}", file.display()))?;
        anyhow::ensure!(!steps.is_empty(), "{}: no step has been recorded", file.display());
        Ok((name.to_string(), PathBuf::from(dir), steps))
    });
    let runs: Vec<_> = runs.collect::<Result<_, anyhow::Error>>()?;
    if let [(_, dir, steps)] = &runs[..] {
        let output = arguments.output.as_ref().unwrap_or(dir);
        plot::curves(steps, output)?;
        println!("{0}/curves.png, {0}/curves.svg", output.display());
        return Ok(());
    }
    let output = arguments.output.clone().unwrap_or_else(|| PathBuf::from("."));
    std::fs::create_dir_all(&output)?;
    let named: Vec<_> = runs.into_iter().map(|(name, _, steps)| (name, steps)).collect();
    plot::compare(&named, &output)?;
    println!("{0}/compare.png, {0}/compare.svg", output.display());
    Ok(())
}
