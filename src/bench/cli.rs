//! The command line of `onpolicy bench`.

use super::{
    check, decode, modes, plot, products, report::Report, rollout, shapes::Shape, step, train,
    update,
};
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// Shown after the list of benchmarks.
const EXAMPLES: &str = "\
Each prints one table: median, smallest and largest of the runs, and beside them what the machine
needs for the same work at the rates that were measured in the same run.

  onpolicy bench rollout --model PATH --workload W1,W2 --no-sharing --profile
  onpolicy bench rollout --model PATH --workload W2 --compare vllm=http://127.0.0.1:8100 --no-seed
  onpolicy bench train --model PATH --no-sharing --json train.json
  onpolicy bench step --model PATH
  onpolicy bench update --model PATH --samples 16
  onpolicy bench decode --model PATH --random qwen2.5-1.5b --device cuda --batch 1,16,64
  onpolicy bench products --model PATH --random qwen2.5-7b --device cuda --dtype bf16
  onpolicy bench check --golden tests/golden/tiny --device cuda
  onpolicy bench plot train.json step.json --out picture.png";

/// `onpolicy bench`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Bench {
    /// What to measure.
    #[command(subcommand)]
    pub which: Which,
}

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum Which {
    /// New tokens a second: in process, over HTTP, and of other servers
    Rollout(rollout::Arguments),
    /// Forward and backward pass of one batch, without rollouts
    Train(train::Arguments),
    /// A whole GRPO step: rollout, rewards, training, update
    Step(step::Arguments),
    /// The weight swap while samples stream
    Update(update::Arguments),
    /// Prefill, and decode steps of batches of several sizes
    Decode(decode::Arguments),
    /// On a CUDA device, the products of a decode step, by every kernel that there is for them
    Products(products::Arguments),
    /// Whether a device computes what it should: log-probs, updates, learning
    Check(check::Arguments),
    /// Draw results as bars
    Plot(plot::Arguments),
    /// Online rollouts against batch training: whole runs in each train.mode, in turn
    Loop(modes::Arguments),
}

/// What all benchmarks take.
#[derive(Debug, Args)]
pub struct Common {
    /// A Hugging Face directory, a GGUF file, or a hub id
    #[arg(short, long, value_name = "PATH")]
    pub model: String,
    /// Where the tensors live: cpu, cuda, auto (model.device)
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// Type of the weights: f32, bf16, f16 (model.dtype)
    #[arg(long, value_name = "TYPE")]
    pub dtype: Option<String>,
    /// Random weights of another shape: qwen2.5-0.5b, qwen2.5-1.5b, qwen2.5-7b, tiny, or a path to a
    /// config.json; of the model the tokenizer is taken alone
    #[arg(long, value_name = "SHAPE", value_parser = Shape::parse)]
    pub random: Option<Shape>,
    /// Seed of prompts, samples and weights' changes
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Runs that do not count
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub warmup: usize,
    /// Runs that count; shown are median, smallest and largest
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = positive)]
    pub runs: usize,
    /// Threads of libtorch and the kernels; all cores if not given
    #[arg(long, value_name = "N", value_parser = positive)]
    pub threads: Option<usize>,
    /// Write all results, run by run, to this file; - prints them in place of the table
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw the results as bars into this file (.svg or .png)
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,
    /// A key of the configuration, as section.key=value (examples/config.toml); may be repeated
    #[arg(short, long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

impl Common {
    /// Keys of the configuration that say where the tensors live.
    pub fn placement(&self) -> Vec<String> {
        placement(self.device.as_deref(), self.dtype.as_deref())
    }

    /// Prints the report, and writes the files that were asked for.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn publish(&self, report: &Report) -> Result<(), anyhow::Error> {
        match self.json.as_deref() {
            Some(path) if path.as_os_str() == "-" => {
                println!("{}", serde_json::to_string_pretty(report)?);
            }
            Some(path) => {
                print!("{report}");
                report.write(path)?;
            }
            None => print!("{report}"),
        }
        match &self.plot {
            Some(path) => plot::draw(&[(report.bench.clone(), report.clone())], path),
            None => Ok(()),
        }
    }
}

/// `model.device` and `model.dtype` as `section.key=value`, where they are given.
pub fn placement(device: Option<&str>, dtype: Option<&str>) -> Vec<String> {
    let keys = [("device", device), ("dtype", dtype)].into_iter();
    keys.filter_map(|(key, value)| Some(format!("model.{key}={:?}", value?))).collect()
}

/// A whole number that is not 0.
///
/// # Errors
/// It is something else.
pub fn positive(text: &str) -> Result<usize, String> {
    let number: usize = text.parse().map_err(|_| "must be a whole number".to_string())?;
    if number == 0 { Err("must be at least 1".into()) } else { Ok(number) }
}
