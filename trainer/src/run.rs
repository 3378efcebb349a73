//! A run from start to end: load, serve, train, and leave behind what a person can read.

use crate::{
    builtins,
    checkpoint::{self, Snapshot, TrainState},
    config::{Config, Dtype},
    device_room, engines,
    error::TrainError,
    eval::{EvalReport, EvalSettings, evaluate},
    memory_plan::{HOST_KV, MemoryPlan, Subject},
    metrics::{MetricsLog, StepMetrics, Summary, log, memory},
    optimizer::{Optimizer, OptimizerSettings},
    plot,
    rollout::RolloutSettings,
    samples,
    served::Served,
    train::{Parts, Progress, Trainer},
    transfer::Transfer,
};
use onpolicy_engine::{
    chat::{Chat, ChatTokenizer},
    device::Placement,
    model::loading::load_to,
    sampler::stream_of,
};
use onpolicy_plugin_api::{Plugins, Problem};
use std::{
    collections::VecDeque,
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};
use tch::Device;

/// Completions that are written down for each problem, before and after.
const SAMPLES_PER_PROBLEM: usize = 2;

/// What a run tells whoever watches it.
#[derive(Debug)]
pub enum RunEvent<'a> {
    /// Inside a step.
    Progress(Progress),
    /// A step is done.
    Step(&'a StepMetrics),
    /// An evaluation is done.
    Evaluated(&'a EvalReport),
    /// A checkpoint was written.
    Saved(&'a Path),
}

/// Makes the task, verifier, gate and engine that the configuration names, out of the built-ins and
/// what `plugins` adds to them; the engine only if it is a plug-in's.
///
/// # Errors
/// A name that there is no plug-in of, or wrong options.
pub fn parts(
    config: &Config,
    plugins: impl FnOnce(Plugins) -> Plugins,
) -> Result<Parts, TrainError> {
    let plugins = plugins(builtins::register(Plugins::default(), config.train.seed));
    Ok(Parts {
        engine: engines::plugin(config, &plugins)?,
        task: plugins.make_task(&config.task.name, &config.task.options())?,
        verifier: plugins.make_verifier(&config.verifier.name, &config.verifier.options())?,
        gate: plugins.make_gate(&config.gate.name, &config.gate.options())?,
    })
}

/// Where the tensors of a run live.
fn placement(config: &Config) -> Result<Placement, TrainError> {
    let placement = config.model.placement()?;
    if config.model.dtype == Some(Dtype::F16) {
        return Err(TrainError::Refused(
            "model.dtype = \"f16\" is for serving: gradients leave the range of f16, and nothing \
             here scales them; train in \"bf16\" or \"f32\""
                .into(),
        ));
    }
    Ok(placement)
}

/// A training run.
pub struct Run {
    config: Config,
    dir: PathBuf,
    served: Served,
    trainer: Trainer,
    metrics: MetricsLog,
    /// Seconds of training so far, those before a resumption too.
    seconds: f64,
}

impl Run {
    /// Prepares the run's folder, loads the model and starts its engine; with `resume`, from the
    /// newest checkpoint in the folder.
    ///
    /// # Errors
    /// A folder that holds a run already (without `resume`) or none (with it), or what loading
    /// says.
    pub fn start(config: Config, parts: Parts, resume: bool) -> Result<Self, TrainError> {
        let dir = PathBuf::from(&config.output.dir);
        fs::create_dir_all(&dir).map_err(|e| TrainError::file(&dir, e))?;
        let resumed = resume.then(|| newest(&dir)).transpose()?;
        if resumed.is_none() && dir.join("metrics.jsonl").exists() {
            return Err(TrainError::Refused(format!(
                "{} already holds a run; go on with it with --resume, or choose another folder \
                 with --output",
                dir.display()
            )));
        }
        let model = resumed.as_ref().map_or(Path::new(&config.model.path), |(path, _)| path);
        let placement = placement(&config)?;
        let checkpoint = load_to(&model.to_string_lossy(), placement)?;
        let step = resumed.as_ref().map_or(0, |(_, state)| state.step);
        let prompts = prompt_lengths(&config, &parts, &checkpoint.tokenizer, step)?;
        let as_given = config.to_toml();
        device_room::settle_kernels(&checkpoint)?;
        let config = device_room::fit(&config, &checkpoint, &prompts)?;
        let served = Served::over(checkpoint, &config, parts.engine.clone())?;
        if let Some(native) = served.native() {
            native.train_weights();
        }
        let mut optimizer = Optimizer::new(&served.weights, OptimizerSettings::new(&config.train))?;
        let (mut step, mut seconds, mut drawn) = (0, 0.0, VecDeque::new());
        if let Some((checkpoint, state)) = &resumed {
            optimizer.load(&checkpoint::optimizer_file(checkpoint), state.optimizer_steps)?;
            (step, seconds) = (state.step, state.seconds);
            drawn = checkpoint::drawn(checkpoint)?;
        }
        let version = resumed.as_ref().map_or(0, |(_, state)| state.weight_version);
        let transfer = equal_weights(&config, &served, version)?;
        let file = dir.join("config.toml");
        fs::write(&file, as_given).map_err(|e| TrainError::file(&file, e))?;
        let file = dir.join("metrics.jsonl");
        let metrics = match &resumed {
            Some(_) => MetricsLog::resume(&file, step)?.0,
            None => MetricsLog::create(&file)?,
        };
        let trainer = Trainer::new(config.clone(), parts, &served, optimizer, (step, drawn));
        let trainer = trainer.with_transfer(transfer);
        Ok(Self { config, dir, served, trainer, metrics, seconds })
    }

    /// The model and its engine, to be served while the run goes on.
    pub fn served(&self) -> &Served {
        &self.served
    }

    /// Steps done; more than 0 at the start of a resumed run.
    pub fn steps_done(&self) -> u64 {
        self.trainer.steps_done()
    }

    /// How much memory the run will need, judged by the prompts of its next step. To be asked
    /// before the first one.
    ///
    /// # Errors
    /// A problem that makes no prompt.
    pub fn memory_plan(&self) -> Result<MemoryPlan, TrainError> {
        let Served { tokenizer, weights, .. } = &self.served;
        let prompts =
            prompt_lengths(&self.config, self.trainer.parts(), tokenizer, self.steps_done())?;
        let placement = self.served.placement();
        let memory = memory::on_device(placement.device).map(|memory| memory.total);
        let others = match placement.device {
            Device::Cpu => {
                let resident = (memory::resident_mb().unwrap_or(0.0) * 1024.0 * 1024.0) as usize;
                let pool = self.config.engine.kv_memory_mb.map_or(HOST_KV, |mb| mb << 20);
                // Native pages come as they are written.
                let pages = if placement.is_native() { 0 } else { pool };
                let own = weights.bytes() + self.trainer.optimizer()?.bytes();
                resident.saturating_sub(own + pages)
            }
            _ => 0,
        };
        let (model, config, prompts) = (self.served.model(), &self.config, &prompts[..]);
        Ok(MemoryPlan::new(&Subject { model, config, prompts, placement, others, memory }))
    }

    /// Trains to the last step, or until `stop` is set (then the step in progress is finished and
    /// a checkpoint written). Leaves metrics, samples, pictures and a checkpoint in the folder.
    ///
    /// # Errors
    /// Whatever stopped it.
    pub fn train(
        &mut self,
        stop: &AtomicBool,
        watch: &mut dyn FnMut(RunEvent<'_>),
    ) -> Result<Summary, TrainError> {
        if self.steps_done() == 0 {
            self.write_samples("samples_before.md")?;
        }
        while self.steps_done() < self.config.train.steps && !stop.load(Ordering::Relaxed) {
            self.step(watch)?;
            let (step, every) = (self.steps_done(), self.config.output.checkpoint_every);
            if due(self.config.eval.every, step) {
                self.evaluate(watch)?;
            }
            if due(every, step) && step < self.config.train.steps {
                self.save(watch)?;
            }
        }
        self.save(watch)?;
        self.write_samples("samples_after.md")?;
        let steps = log::read(&self.dir.join("metrics.jsonl"))?;
        if !steps.is_empty() {
            plot::run_folder(&self.dir)?;
        }
        let summary = Summary::from(&steps[..]);
        let file = self.dir.join("summary.txt");
        fs::write(&file, summary.to_string()).map_err(|e| TrainError::file(&file, e))?;
        Ok(summary)
    }

    fn step(&mut self, watch: &mut dyn FnMut(RunEvent<'_>)) -> Result<(), TrainError> {
        let started = Instant::now();
        let step = self.trainer.step(&mut |progress| watch(RunEvent::Progress(progress)));
        let mut metrics = step?;
        self.seconds += started.elapsed().as_secs_f64();
        metrics.elapsed_seconds = self.seconds;
        self.metrics.append(&metrics)?;
        watch(RunEvent::Step(&metrics));
        Ok(())
    }

    /// Waits for rollouts that are under way, so that nothing else runs beside what follows.
    fn settle(&mut self) -> Result<(), TrainError> {
        self.seconds += self.trainer.settle()?;
        Ok(())
    }

    fn evaluate(&mut self, watch: &mut dyn FnMut(RunEvent<'_>)) -> Result<(), TrainError> {
        self.settle()?;
        let parts = self.trainer.parts();
        let judges = (parts.task.as_ref(), parts.verifier.as_ref());
        let settings = EvalSettings::new(&self.config);
        let report = evaluate(&*self.served.engine, &self.served.tokenizer, judges, &settings)?;
        let path = self.dir.join("eval.jsonl");
        let record = serde_json::json!({ "step": self.steps_done(), "report": &report });
        let file = fs::OpenOptions::new().create(true).append(true).open(&path);
        file.and_then(|mut file| writeln!(file, "{record}"))
            .map_err(|e| TrainError::file(&path, e))?;
        watch(RunEvent::Evaluated(&report));
        Ok(())
    }

    fn save(&mut self, watch: &mut dyn FnMut(RunEvent<'_>)) -> Result<(), TrainError> {
        self.settle()?;
        let optimizer = self.trainer.optimizer()?;
        let drawn = self.trainer.drawn();
        let state = TrainState {
            step: self.steps_done(),
            weight_version: self.served.engine.weight_version(),
            optimizer_steps: optimizer.steps(),
            seconds: self.seconds,
        };
        let Served { source, weights, .. } = &self.served;
        let path = Snapshot { source, weights, optimizer, drawn, state }.save(&self.dir)?;
        checkpoint::prune(&self.dir, self.config.output.keep_checkpoints)?;
        watch(RunEvent::Saved(&path));
        Ok(())
    }

    fn write_samples(&self, file: &str) -> Result<(), TrainError> {
        let task = &self.trainer.parts().task;
        let problems: Vec<Problem> =
            (0..self.config.output.sample_prompts as u64).map_while(|i| task.eval(i)).collect();
        let seed = stream_of(self.config.train.seed, usize::MAX);
        let rollout = RolloutSettings::new(&self.config, seed);
        let settings = RolloutSettings { group_size: SAMPLES_PER_PROBLEM, ..rollout };
        samples::write(&self.dir.join(file), &self.served, &problems, &settings)
    }
}

/// Tokens of each prompt of the step after `step`.
fn prompt_lengths(
    config: &Config,
    parts: &Parts,
    tokenizer: &ChatTokenizer,
    step: u64,
) -> Result<Vec<usize>, TrainError> {
    let count = config.rollout.prompts_per_step as u64;
    let prompt = |index| {
        let problem = parts.task.train(index);
        tokenizer.encode_chat(&Chat::from_messages(&problem.messages)).map(|ids| ids.len())
    };
    Ok((step * count..(step + 1) * count).map(prompt).collect::<Result<Vec<_>, _>>()?)
}

/// Sees to it that the engine serves the trainer's weights, under this version.
fn equal_weights(
    config: &Config,
    served: &Served,
    version: u64,
) -> Result<Option<Transfer>, TrainError> {
    if served.engine.shares_weights() {
        served.engine.set_weight_version(version)?;
        return Ok(None);
    }
    let mut transfer = Transfer::new(config, served)?;
    transfer.deliver(version)?;
    Ok(Some(transfer))
}

fn newest(dir: &Path) -> Result<(PathBuf, TrainState), TrainError> {
    let path = checkpoint::latest(dir).ok_or_else(|| {
        TrainError::Refused(format!(
            "{} holds no checkpoint to resume from; start without --resume",
            dir.display()
        ))
    })?;
    let state = checkpoint::state(&path)?;
    Ok((path, state))
}

/// True if something that is to happen every `every` steps (0: never) happens after `step`.
fn due(every: u64, step: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}
