//! Engines that have weights of their own: a copy of the native one that hides its statistics
//! trains exactly as the native one does, and the example's engine trains at all.

#[path = "../../examples/plugin/src/parrot.rs"]
mod parrot;

use onpolicy_engine::{
    engine::{EngineConfig, EngineHandle, Model},
    model::loading::load,
    weights::Weights,
};
use onpolicy_plugin_api::{
    Attempt, Engine, EngineError, Event, ModelInfo, PluginError, Request, RequestId, Score, Sink,
    Verifier, WeightUpdate,
};
use onpolicy_trainer::{
    config::Config,
    error::TrainError,
    metrics::{StepMetrics, log},
    run::{Run, parts},
    train::Parts,
};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, atomic::AtomicBool},
};

const STEPS: usize = 4;

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tiny/llama-tied")
}

/// A native engine with weights of its own, which takes new ones from a directory and tells
/// neither entropy nor baseline.
struct Blind {
    inner: EngineHandle,
    weights: Arc<Mutex<Weights>>,
    /// Directories that it was given.
    given: Arc<Mutex<Vec<PathBuf>>>,
}

struct Blindfold(Box<dyn Sink>);

impl Sink for Blindfold {
    fn send(&mut self, event: Event) -> bool {
        self.0.send(match event {
            Event::Token { index, mut token } => {
                (token.stats.entropy, token.stats.baseline) = (f32::NAN, f32::NAN);
                Event::Token { index, token }
            }
            event => event,
        })
    }

    fn is_closed(&self) -> bool {
        self.0.is_closed()
    }
}

impl Blind {
    fn start() -> Self {
        let checkpoint = load(tiny().to_str().expect("UTF-8")).expect("the checkpoint loads");
        // Other weights than the trainer's: it has to be given those.
        let zeros = checkpoint.tensors.iter().map(|(name, t)| (name.clone(), t.zeros_like()));
        let weights = Weights::new(zeros.collect());
        let model = Model {
            name: checkpoint.name,
            config: checkpoint.config,
            weights: weights.share(),
            tokenizer: None,
        };
        let config = EngineConfig { kv_memory: 16 << 20, ..EngineConfig::default() };
        let inner = EngineHandle::start(model, config).expect("the engine starts");
        Self { inner, weights: Arc::new(Mutex::new(weights)), given: Arc::default() }
    }
}

impl Engine for Blind {
    fn info(&self) -> ModelInfo {
        self.inner.info()
    }

    fn submit(&self, request: Request, sink: Box<dyn Sink>) -> Result<RequestId, EngineError> {
        self.inner.submit(request, Box::new(Blindfold(sink)))
    }

    fn submit_all(
        &self,
        requests: Vec<(Request, Box<dyn Sink>)>,
    ) -> Result<Vec<RequestId>, EngineError> {
        let blind = |(request, sink)| (request, Box::new(Blindfold(sink)) as Box<dyn Sink>);
        self.inner.submit_all(requests.into_iter().map(blind).collect())
    }

    fn abort(&self, id: RequestId, index: Option<usize>) {
        self.inner.abort(id, index);
    }

    fn weight_version(&self) -> u64 {
        self.inner.weight_version()
    }

    fn update_weights(
        &self,
        update: WeightUpdate,
        version: Option<u64>,
    ) -> Result<u64, EngineError> {
        let WeightUpdate::Directory(dir) = update else { panic!("it shares no weights") };
        let new = load(dir.to_str().expect("UTF-8"))
            .map_err(|e| EngineError::invalid("weight_dir", e.to_string()))?;
        self.given.lock().unwrap().push(dir);
        let weights = self.weights.lock().unwrap().share();
        let write = WeightUpdate::InPlace(Box::new(move || {
            for ((name, served), (other, new)) in weights.iter().zip(&new.tensors) {
                assert_eq!(name, other);
                served.shallow_clone().copy_(new);
            }
            Ok(())
        }));
        self.inner.update_weights(write, version)
    }
}

/// As good as random, so that most groups are mixed.
struct Lottery;

impl Verifier for Lottery {
    fn verify(&self, attempts: &[Attempt<'_>]) -> Vec<Score> {
        let sum = |text: &str| text.bytes().map(u32::from).sum::<u32>();
        attempts.iter().map(|a| Score::Reward((sum(a.completion) % 3 == 0).into())).collect()
    }
}

fn config(dir: &Path, flags: &[&str]) -> Config {
    let text = format!(
        "[model]\npath = {:?}\n[gate]\nname = \"clip_b\"\nmu = 0.5\n[rollout]\n\
         prompts_per_step = 4\ngroup_size = 4\nmax_new_tokens = 16\n[train]\nsteps = {STEPS}\n\
         lr = 1e-3\nmicro_batch_tokens = 40\n[output]\ndir = {dir:?}\nsample_prompts = 1\n",
        tiny()
    );
    let flags: Vec<String> = flags.iter().map(ToString::to_string).collect();
    Config::parse(&text, &flags).expect("a configuration")
}

fn train(config: &Config, parts: Parts) -> Result<Vec<StepMetrics>, TrainError> {
    let mut run = Run::start(config.clone(), parts, false)?;
    run.train(&AtomicBool::new(false), &mut |_| {})?;
    run.served().shutdown();
    Ok(log::read(&Path::new(&config.output.dir).join("metrics.jsonl"))?)
}

fn lottery(config: &Config, engine: Option<Arc<dyn Engine>>) -> Parts {
    let native = Config { engine: Default::default(), ..config.clone() };
    let parts = parts(&native, |plugins| plugins).expect("built-ins");
    Parts { verifier: Box::new(Lottery), engine, ..parts }
}

fn close(a: f64, b: f64, what: &str) {
    assert!((a - b).abs() <= 1e-5 * (1.0 + b.abs()), "{what}: {a} and {b}");
}

#[test]
fn an_engine_with_weights_of_its_own_trains_as_the_native_one_does() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let transfer = tempfile::tempdir().unwrap();
    let native = config(dir.path(), &["engine.kv_memory_mb=16"]);
    let native = train(&native, lottery(&native, None)).expect("it trains");
    let place = format!("engine.transfer_dir={:?}", transfer.path().display().to_string());
    let blind = config(other.path(), &["engine.kind=blind", &place]);
    let engine = Blind::start();
    let given = engine.given.clone();
    let blind = train(&blind, lottery(&blind, Some(Arc::new(engine)))).expect("it trains");

    assert_eq!(native.len(), STEPS);
    assert!(native.iter().any(|step| step.dropped_fraction > 0.0), "the gate has work");
    for (own, shared) in blind.iter().zip(&native) {
        // The same weights to the bit draw the same samples.
        assert_eq!(own.reward_mean, shared.reward_mean, "step {}", own.step);
        assert_eq!(own.completion_tokens, shared.completion_tokens);
        assert_eq!(own.weight_version, shared.weight_version);
        assert_eq!((own.staleness_max, own.grad_norm), (0, shared.grad_norm));
        assert_eq!(own.dropped_fraction, shared.dropped_fraction);
        close(own.entropy, shared.entropy, "entropy");
        close(own.score_gap_mean, shared.score_gap_mean, "gap");
        close(own.entropy_predicted, shared.entropy_predicted, "prediction");
        assert!(own.mismatch_max < 1e-5 && own.mismatch_far == 0.0, "{}", own.mismatch_max);
    }
    // Before the first step and after every update, and nothing is left behind.
    let updates = native.last().unwrap().weight_version as usize;
    let given = given.lock().unwrap().clone();
    assert_eq!(given.len(), 1 + updates);
    assert!(given[updates].ends_with(format!("version-{updates:06}")));
    assert_eq!(std::fs::read_dir(transfer.path()).unwrap().count(), 0);
}

fn parrot_config(dir: &Path, flags: &[&str]) -> Config {
    let own = [
        "engine.kind=parrot",
        "engine.options.lines=[[5, 6, 7], [8, 9], [10]]",
        "engine.options.vocab_size=160",
    ];
    config(dir, &[&own, flags].concat())
}

fn parrot_parts(config: &Config) -> Result<Parts, TrainError> {
    let add = |plugins: onpolicy_plugin_api::Plugins| {
        plugins.with_engine("parrot", |options| options.parse::<parrot::Parrot>())
    };
    let parts = parts(config, add)?;
    Ok(Parts { verifier: Box::new(Lottery), ..parts })
}

#[test]
fn a_plug_in_brings_an_engine() {
    let dir = tempfile::tempdir().unwrap();
    let config = parrot_config(dir.path(), &["train.correction=tis"]);
    let steps = train(&config, parrot_parts(&config).expect("plug-ins")).expect("it trains");
    assert_eq!(steps.len(), STEPS);
    for (number, step) in steps.iter().enumerate() {
        // Four groups of four samples: lines of 3, 2, 1 and again 3 tokens.
        assert_eq!((step.completion_tokens, step.samples), (4 * 9, 16));
        assert_eq!(step.weight_version, number as u64 + 1);
        assert!(step.entropy > 0.0 && step.score_gap_mean.is_finite());
        // The model does not think that all tokens are alike.
        assert!(step.mismatch_mean > 1e-3 && step.mismatch_far > 0.0, "{}", step.mismatch_mean);
    }
    assert!(dir.path().join("checkpoint-000004/model.safetensors").is_file());
}

#[test]
fn engines_that_are_not_there_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let unknown = config(dir.path(), &["engine.kind=parott"]);
    let Err(TrainError::Plugin(PluginError::Unknown { known, .. })) = parrot_parts(&unknown) else {
        panic!("it is not there")
    };
    assert_eq!(known, "native, mistralrs, remote, http://host:port, parrot");
    let wrong = parrot_config(dir.path(), &["engine.options.word=1"]);
    let error = parrot_parts(&wrong).err().expect("a wrong option").to_string();
    assert!(error.contains("engine 'parrot'") && error.contains("word"), "{error}");
    // Port 9 of this machine: nobody is there.
    let nobody = config(dir.path(), &["engine.kind=http://127.0.0.1:9"]);
    let error = train(&nobody, lottery(&nobody, None)).unwrap_err().to_string();
    assert!(error.contains("no server answers"), "{error}");
}
