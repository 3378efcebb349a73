//! `onpolicy bench decode`: prefill, and decode steps of batches of several sizes, beside the time
//! that reading the weights and K and V takes.

use super::{
    cli::{Common, positive},
    report::{Line, Report, Unit},
    rollout::in_process,
    session::{Session, peak_memory},
    workload::{Prompt, Workload},
};
use clap::Args;
use onpolicy_engine::model::{config::ModelConfig, loading::Checkpoint};
use onpolicy_plugin_api::Engine;

/// `onpolicy bench decode`.
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Samples that run at a time, each with a prompt of its own
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = positive, default_value = "1,16,64,256")]
    batch: Vec<usize>,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = positive)]
    prompt_tokens: usize,
    /// Decode steps
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = positive)]
    new_tokens: usize,
    /// Tokens of each of the prompts that prefill is measured with
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = positive)]
    prefill_tokens: usize,
    /// Prompts that prefill is measured with
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = positive)]
    prefill_prompts: usize,
}

/// Runs the benchmark.
///
/// # Errors
/// A model or configuration that does not work.
pub fn run(arguments: &Arguments) -> Result<(), anyhow::Error> {
    let report = measure(arguments)?;
    arguments.common.publish(&report)
}

fn measure(arguments: &Arguments) -> Result<Report, anyhow::Error> {
    let prepare = |checkpoint: &mut Checkpoint| arguments.room(&checkpoint.config);
    let mut session = Session::start(&arguments.common, prepare)?;
    let mut prefill = Vec::new();
    let mut decode = vec![Vec::new(); arguments.batch.len()];
    for round in session.rounds() {
        let seconds = first_tokens(&session, &arguments.prefill(), round.seed)?;
        if round.counts {
            prefill.push(seconds);
        }
        for (&batch, times) in arguments.batch.iter().zip(&mut decode) {
            let seconds = steps(&session, &arguments.decode(batch), round.seed)?;
            if round.counts {
                times.push(seconds);
            }
        }
    }
    let memory = peak_memory("process");
    let rates = session.rates();
    let costs = &session.costs;
    let workload = arguments.prefill();
    let tokens = (workload.prompts * workload.prompt_tokens) as f64;
    let need = rates.need(&costs.rollout(&workload, true));
    let group = format!("prefill of {} x {} tokens", workload.prompts, workload.prompt_tokens);
    let unit = Unit::PerSecond(tokens, "tokens");
    let mut lines = vec![Line::times(&group, "prefill", unit, &prefill, Some(need))];
    let group = format!(
        "decode, {} steps after prompts of {} tokens",
        arguments.new_tokens, arguments.prompt_tokens
    );
    for (&batch, times) in arguments.batch.iter().zip(&decode) {
        let need = rates.need(&costs.decode(&arguments.decode(batch), true));
        let unit = Unit::PerSecond((batch * arguments.new_tokens) as f64, "tokens");
        let name = format!("batch {batch}");
        lines.push(Line::times(&group, &name, unit, times, Some(need)));
        let step = times.iter().map(|seconds| 1e3 * seconds / arguments.new_tokens as f64);
        lines.push(Line::values(&group, &format!("{name}: a step"), "ms", step.collect()));
    }
    lines.extend(memory);
    Ok(session.report("decode", lines, Vec::new()))
}

impl Arguments {
    fn prefill(&self) -> Workload {
        Workload::custom([self.prefill_prompts, 1, self.prefill_tokens, 1])
    }

    /// One token comes with the prefill.
    fn decode(&self, batch: usize) -> Workload {
        Workload::custom([batch, 1, self.prompt_tokens, self.new_tokens + 1])
    }

    /// Checks that the model can do it; the configuration that has room for it.
    fn room(&self, model: &ModelConfig) -> Result<Vec<String>, anyhow::Error> {
        let most = self.batch.iter().copied().max().unwrap_or(1);
        let workloads = [self.prefill(), self.decode(most)];
        workloads.iter().try_for_each(|workload| workload.check(model))?;
        let bytes = workloads.iter().map(|workload| workload.kv_bytes(model)).max().unwrap_or(0);
        Ok(vec![
            format!("engine.kv_memory_mb={}", (bytes >> 20) + 1),
            format!("engine.max_num_seqs={}", most.max(256)),
            format!("engine.max_batched_tokens={}", (most * self.prompt_tokens).max(8192)),
            format!("engine.max_waiting={}", most.max(1024)),
            // Each step is to give each sample one token.
            "engine.num_speculative_tokens=0".into(),
        ])
    }
}

/// Seconds of a rollout that finds nothing of an earlier one.
fn rollout(
    session: &Session,
    workload: &Workload,
    prompts: &[Prompt],
    seed: u64,
) -> Result<f64, anyhow::Error> {
    session.engine.reset_prefix_cache()?;
    in_process(&session.engine, workload, prompts, seed)
}

/// Seconds from the request to the last sample's first token.
fn first_tokens(session: &Session, workload: &Workload, seed: u64) -> Result<f64, anyhow::Error> {
    let prompts = session.prompts(workload, seed)?;
    rollout(session, workload, &prompts, seed)
}

/// Seconds of the decode steps: those of a whole rollout without those of its prefill.
fn steps(session: &Session, workload: &Workload, seed: u64) -> Result<f64, anyhow::Error> {
    let prompts = session.prompts(workload, seed)?;
    let whole = rollout(session, workload, &prompts, seed)?;
    let first = Workload { new_tokens: 1, ..workload.clone() };
    let prefill = rollout(session, &first, &prompts, seed)?;
    // At least something, should the clock have had another opinion of the prefill.
    Ok((whole - prefill).max(1e-6))
}
