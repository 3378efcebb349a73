//! `onpolicy plot`

use crate::cli;
use anyhow::Context;
use onpolicy_trainer::{
    metrics::{StepMetrics, log},
    plot::{self, PlotError},
};
use std::path::{Path, PathBuf};

pub fn run(arguments: &cli::Plot) -> Result<(), anyhow::Error> {
    if let [run] = &arguments.runs[..] {
        let dir = PathBuf::from(run.split_once('=').map_or(run.as_str(), |(_, dir)| dir));
        let steps = read(&dir)?;
        return draw(arguments.output.as_ref().unwrap_or(&dir), "curves", |path| {
            plot::curves(&steps, path)
        });
    }
    let runs = arguments.runs.iter().map(|run| {
        let (name, dir) = run.split_once('=').unwrap_or((run, run));
        Ok((name.to_string(), read(Path::new(dir))?))
    });
    let runs: Vec<_> = runs.collect::<Result<_, anyhow::Error>>()?;
    let output = arguments.output.clone().unwrap_or_else(|| PathBuf::from("."));
    draw(&output, "compare", |path| plot::compare(&runs, path))
}

fn read(dir: &Path) -> Result<Vec<StepMetrics>, anyhow::Error> {
    Ok(log::read(&dir.join("metrics.jsonl"))?)
}

/// Draws a picture as SVG and as PNG and says where they are.
fn draw(
    dir: &Path,
    name: &str,
    draw: impl Fn(&Path) -> Result<(), PlotError>,
) -> Result<(), anyhow::Error> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    for extension in ["svg", "png"] {
        let path = dir.join(name).with_extension(extension);
        draw(&path)?;
        println!("{}", path.display());
    }
    Ok(())
}
