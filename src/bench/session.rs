//! A model that is served and measured: loading, rounds, the machine's rates.

use super::{
    arithmetic::Costs,
    cli::Common,
    machine::{self, Machine, Versions},
    report::{Line, ModelFacts, Report, Settings},
    roofline::Rates,
    workload::{Prompt, Workload},
};
use anyhow::Context;
use onpolicy_engine::{
    device::Placement,
    engine::EngineHandle,
    model::loading::{Checkpoint, load_to},
    sampler::stream_of,
};
use onpolicy_trainer::{config::Config, metrics::memory, served::Served};
use tch::Device;

/// A served model, and what is needed to measure it.
pub struct Session {
    /// The model and its engine.
    pub served: Served,
    /// The engine.
    pub engine: EngineHandle,
    /// Its configuration.
    pub config: Config,
    /// What its work costs.
    pub costs: Costs,
    settings: Settings,
    machine: Machine,
    model: ModelFacts,
    rates: Rates,
    random: bool,
}

/// One run of everything that is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    /// Different for every run, the same for every start of the benchmark.
    pub seed: u64,
    /// False for a run that only warms up.
    pub counts: bool,
}

impl Session {
    /// Loads the model and starts its engine. `prepare` looks at the model first and returns keys
    /// of the configuration (`section.key=value`), over which those of the command line go.
    ///
    /// # Errors
    /// A model or configuration that does not work.
    pub fn start(
        common: &Common,
        prepare: impl FnOnce(&mut Checkpoint) -> Result<Vec<String>, anyhow::Error>,
    ) -> Result<Self, anyhow::Error> {
        // Before any thread asks libtorch how many there are.
        if let Some(threads) = common.threads {
            tch::set_num_threads(i32::try_from(threads)?);
        }
        let mut keys = vec![
            format!("model.path={:?}", common.model),
            format!("train.seed={}", common.seed),
            "server.port=0".to_string(),
        ];
        keys.extend(common.placement());
        // Before the other keys are known that those of the command line may depend on.
        let of_model = common.set.iter().filter(|key| key.starts_with("model.")).cloned();
        let of_model: Vec<String> = keys.iter().cloned().chain(of_model).collect();
        let placement = Config::parse("", &of_model)?.model.placement()?;
        let machine = Machine::here();
        let mut checkpoint = model(common, placement)?;
        keys.extend(prepare(&mut checkpoint)?);
        keys.extend_from_slice(&common.set);
        let config = Config::parse("", &keys)?;
        let costs = Costs::new(&checkpoint.config).placed(placement);
        let model = ModelFacts {
            name: format!("{} ({placement})", checkpoint.name),
            parameters: checkpoint.config.parameter_count(),
            gflop_per_token: costs.flop_per_token() / 1e9,
        };
        let settings = Settings {
            seed: common.seed,
            warmup: common.warmup,
            runs: common.runs,
            threads: usize::try_from(tch::get_num_threads())?,
        };
        let served = Served::over(checkpoint, &config, None)?;
        let engine = served.native().context("only the native engine is measured")?.clone();
        let costs = costs.serving_copies(engine.stats()?.copied_bytes);
        eprintln!("measuring the machine ...");
        let rates = Rates::measure(&served.weights);
        machine::reset_peak();
        let random = common.random.is_some();
        Ok(Self { served, engine, config, costs, settings, machine, model, rates, random })
    }

    /// The prompts of `workload` for one run, all different: of random tokens where the weights are random.
    ///
    /// # Errors
    /// As [`Workload::prompts`].
    pub fn prompts(&self, workload: &Workload, seed: u64) -> Result<Vec<Prompt>, anyhow::Error> {
        match self.random {
            true => Ok(workload.random_prompts(self.served.model().vocab_size, seed)),
            false => workload.prompts(&self.served.tokenizer, seed),
        }
    }

    /// The runs, those that warm up first.
    pub fn rounds(&self) -> impl Iterator<Item = Round> + use<> {
        let Settings { seed, warmup, runs, .. } = self.settings;
        (0..warmup + runs).map(move |index| {
            let counts = index >= warmup;
            let number = if counts { index - warmup + 1 } else { index + 1 };
            let what = if counts { "run" } else { "warm-up" };
            eprintln!("{what} {number} ...");
            Round { seed: stream_of(seed, index), counts }
        })
    }

    /// What the machine can do: the better of what was measured before the runs and now, after
    /// them.
    pub fn rates(&mut self) -> Rates {
        self.rates = self.rates.or_better(Rates::measure(&self.served.weights));
        self.rates
    }

    /// The report on `lines`.
    pub fn report(self, bench: &str, lines: Vec<Line>, notes: Vec<String>) -> Report {
        self.engine.shutdown();
        Report {
            bench: bench.into(),
            command: command(),
            settings: self.settings,
            machine: self.machine,
            versions: Versions::here(),
            model: self.model,
            rates: self.rates,
            lines,
            notes,
        }
    }
}

/// The model that is measured.
fn model(common: &Common, placement: Placement) -> Result<Checkpoint, anyhow::Error> {
    match &common.random {
        Some(shape) => {
            eprintln!("making random weights ...");
            shape.random(&common.model, placement)
        }
        None => {
            eprintln!("loading {} ...", common.model);
            Ok(load_to(&common.model, placement)?)
        }
    }
}

/// The command line, without where on this machine things are.
fn command() -> Vec<String> {
    let home = std::env::var("HOME").unwrap_or_default();
    let short = |text: String| {
        if home.len() > 1 { text.replace(&home, "~") } else { text }
    };
    let program = "onpolicy".to_string();
    std::iter::once(program).chain(std::env::args().skip(1).map(short)).collect()
}

/// Lines about the most memory that the process, and tensors on a device, have held since the runs
/// began; none where the system does not say.
pub fn peak_memory(group: &str) -> Vec<Line> {
    let line = |what: &str, mib| Line::values(group, what, "MiB", vec![mib]);
    let process = machine::peak_mib().map(|mib| line("peak memory of the process", mib));
    let device = memory::device_peak_mb(Device::cuda_if_available());
    let device = device.map(|mib| line("peak memory of the device", mib));
    process.into_iter().chain(device).collect()
}
