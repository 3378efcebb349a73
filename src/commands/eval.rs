//! `onpolicy eval`

use crate::cli;
use onpolicy_plugin_api::Plugins;
use onpolicy_trainer::{
    config::EngineKind,
    eval::{EvalSettings, evaluate},
    run,
    served::Serving,
};

pub fn run(
    arguments: &cli::Eval,
    plugins: impl FnOnce(Plugins) -> Plugins,
) -> Result<(), anyhow::Error> {
    let config = arguments.config()?;
    let parts = run::parts(&config, plugins)?;
    if config.engine.kind() == EngineKind::Native {
        super::announce(&config)?;
    }
    let served = Serving::start(&config.model.path, &config, parts.engine.clone())?;
    let settings = EvalSettings::new(&config);
    eprintln!("{} problems x {} samples ...", settings.problems, settings.rollout.group_size);
    let judges = (parts.task.as_ref(), parts.verifier.as_ref());
    let report = evaluate(&*served.engine, &served.tokenizer, judges, &settings)?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    served.shutdown();
    Ok(())
}
