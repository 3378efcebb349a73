//! `onpolicy train`

use crate::{cli, profile::Printer, progress::Bar, server};
use onpolicy_plugin_api::Plugins;
use onpolicy_trainer::{
    config::{Config, EngineKind},
    metrics::memory,
    run,
};
use std::sync::atomic::AtomicBool;

pub fn run(
    arguments: &cli::Train,
    plugins: impl FnOnce(Plugins) -> Plugins,
) -> Result<(), anyhow::Error> {
    let config = arguments.config()?;
    let parts = run::parts(&config, plugins)?;
    let metrics = server::record_metrics()?;
    super::announce(&config)?;
    let mut run = run::Run::start(config.clone(), parts, arguments.resume)?;
    let served = run.served();
    let run_folder = Some(config.output.dir.clone().into());
    let server = server::start(&config, (&served.engine, &served.tokenizer), metrics, run_folder)?;
    describe(&config, &run, server.as_ref())?;
    let plan = run.memory_plan()?;
    eprintln!("{plan}");
    plan.check()?;

    let stop: &'static AtomicBool = Box::leak(Box::default());
    server::stop_on_signal(stop, "finishing the step and saving a checkpoint")?;
    let mut profile = Printer::new(run.served().native());
    let mut bar = Bar::new(&config, run.steps_done());
    let outcome = run.train(stop, &mut |event| bar.show(&event));
    bar.finish();
    let summary = outcome?;
    profile.print();
    println!("\n{summary}");
    let device = memory::device_peak_mb(run.served().placement().device);
    if let Some(peak) = device.or_else(memory::peak_mb) {
        println!("memory: {peak:.0} MiB at the most, {:.0} MiB planned", plan.total_mb());
    }
    println!("run folder: {}", config.output.dir);
    println!("  curves.png, curves.svg   reward, entropy, dropped tokens, time");
    println!("  samples_before.md, samples_after.md, metrics.jsonl, config.toml, summary.txt");
    println!("  checkpoint-*             a Hugging Face directory; --resume goes on from it");
    if let Some(server) = server {
        server.stop();
    }
    run.served().shutdown();
    Ok(())
}

fn describe(
    config: &Config,
    run: &run::Run,
    server: Option<&server::Server>,
) -> Result<(), anyhow::Error> {
    let served = run.served();
    let millions = served.weights.parameters() as f64 / 1e6;
    eprintln!(
        "{millions:.1} M parameters; task {}, verifier {}, gate {}; {} prompts x {} samples a step, \
         {}",
        config.task.name,
        config.verifier.name,
        config.gate.name,
        config.rollout.prompts_per_step,
        config.rollout.group_size,
        config.train.mode,
    );
    if let Some(copies) = served.copies()? {
        eprintln!("{copies}");
    }
    if config.engine.kind() != EngineKind::Native {
        eprintln!("samples are drawn by {}", config.engine.kind());
    }
    if let Some(warning) = config.warning() {
        eprintln!("warning: {warning}");
    }
    if let Some(server) = server {
        eprintln!("serving on {}/v1 while it trains", server.url());
    }
    if run.steps_done() > 0 {
        eprintln!("resumed after step {}", run.steps_done());
    }
    Ok(())
}
