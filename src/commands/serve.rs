//! `onpolicy serve`

use crate::{cli, profile::Printer, server};
use onpolicy_plugin_api::Plugins;
use onpolicy_trainer::{config::EngineKind, engines, served::Serving};
use std::sync::atomic::AtomicBool;

pub fn run(
    arguments: &cli::Serve,
    plugins: impl FnOnce(Plugins) -> Plugins,
) -> Result<(), anyhow::Error> {
    let mut config = arguments.config()?;
    config.server.enabled = true;
    let metrics = server::record_metrics()?;
    if config.engine.kind() == EngineKind::Native {
        super::announce(&config)?;
    }
    let plugin = engines::plugin(&config, &plugins(Plugins::default()))?;
    let served = Serving::start(&config.model.path, &config, plugin)?;
    if let Some(copies) = served.copies() {
        eprintln!("{copies}");
    }
    let server = server::start(&config, (&served.engine, &served.tokenizer), metrics, None)?;
    let Some(server) = server else { anyhow::bail!("the server did not start") };
    println!("serving on {}/v1 (Ctrl-C stops it)", server.url());
    let stop: &'static AtomicBool = Box::leak(Box::default());
    server::stop_on_signal(stop, "finishing what runs")?;
    let mut profile = Printer::new(served.native());
    server.wait_for(stop, || profile.tick());
    server.stop();
    profile.print();
    served.shutdown();
    Ok(())
}
