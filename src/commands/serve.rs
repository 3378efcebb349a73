//! `onpolicy serve`

use crate::{cli, profile::Printer, server};
use onpolicy_trainer::served::Served;
use std::sync::atomic::AtomicBool;

pub fn run(arguments: &cli::Serve) -> Result<(), anyhow::Error> {
    let mut config = arguments.config()?;
    config.server.enabled = true;
    let metrics = server::record_metrics()?;
    eprintln!("loading {} ...", config.model.path);
    let served = Served::start(&config.model.path, &config)?;
    if let Some(copies) = served.copies()? {
        eprintln!("{copies}");
    }
    let server = server::start(&config, &served, metrics, None)?;
    let Some(server) = server else { anyhow::bail!("the server did not start") };
    println!("serving on {}/v1 (Ctrl-C stops it)", server.url());
    let stop: &'static AtomicBool = Box::leak(Box::default());
    server::stop_on_signal(stop, "finishing what runs")?;
    let mut profile = Printer::new(&served.engine);
    server.wait_for(stop, || profile.tick());
    server.stop();
    profile.print();
    served.engine.shutdown();
    Ok(())
}
