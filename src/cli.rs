//! The command line.

use crate::bench::Bench;
use clap::{Args, Parser, Subcommand};
use onpolicy_trainer::config::{Config, ConfigError};
use std::path::PathBuf;

/// Serve a language model and fine-tune it at the same time, in one process.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Fine-tune with GRPO; the policy is served over HTTP the whole time
    Train(Train),
    /// Serve a model over an OpenAI-compatible API
    Serve(Serve),
    /// Measure Avg@K and Pass@K on held-out problems
    Eval(Eval),
    /// Say how much memory a run will need, part by part, without loading the model
    Plan(Plan),
    /// Draw the curves of a run, or several runs in one picture
    Plot(Plot),
    /// Measure rollouts, training and updates beside what the machine can do
    Bench(Box<Bench>),
}

/// Where the configuration comes from.
#[derive(Debug, Args)]
pub struct Source {
    /// Configuration file (TOML); examples/config.toml lists every key with its default
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A Hugging Face directory, a GGUF file, or a hub id (model.path)
    #[arg(short, long, value_name = "PATH")]
    model: Option<String>,
    /// Where the tensors live: cpu, cuda, auto (model.device)
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Type of the weights: f32, bf16, f16 (model.dtype)
    #[arg(long, value_name = "TYPE")]
    dtype: Option<String>,
    /// Any other key of the configuration, as section.key=value; may be repeated
    #[arg(short, long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl Source {
    /// The configuration: file, then `--set`, then the other flags.
    fn load(&self, flags: &[(&str, Option<String>)]) -> Result<Config, ConfigError> {
        let mut overrides = self.set.clone();
        let quoted = |text: &Option<String>| text.as_ref().map(|text| format!("{text:?}"));
        let model = [
            ("model.path", quoted(&self.model)),
            ("model.device", quoted(&self.device)),
            ("model.dtype", quoted(&self.dtype)),
        ];
        let given = model.iter().chain(flags);
        overrides
            .extend(given.filter_map(|(key, value)| Some(format!("{key}={}", value.as_ref()?))));
        Config::load(self.config.as_deref(), &overrides)
    }
}

/// How the engine serves, for the commands that keep it running.
#[derive(Debug, Args)]
struct Serving {
    /// Print where the engine's time goes, by phase of a step (engine.profile)
    #[arg(long)]
    profile: bool,
    /// Type that linear layers and head are served in: f32, f16, bf16, int8 (engine.serve_dtype)
    #[arg(long, value_name = "TYPE")]
    serve_dtype: Option<String>,
    /// Whether clients may pause, update and sleep the engine: auto, on, off (server.control)
    #[arg(long, value_name = "WHEN")]
    control: Option<String>,
    /// Directory that clients may load weights from; may be repeated (server.weight_roots)
    #[arg(long = "weight-root", value_name = "DIR")]
    weight_roots: Vec<String>,
    #[command(flatten)]
    engine: EngineChoice,
}

/// Which engine draws the samples.
#[derive(Debug, Args)]
struct EngineChoice {
    /// Engine: native, mistralrs, a plug-in, or vLLM and SGLang servers as
    /// http://host:port[,http://...] (engine.kind)
    #[arg(long, value_name = "ENGINE")]
    engine: Option<String>,
}

impl EngineChoice {
    fn flag(&self) -> (&'static str, Option<String>) {
        ("engine.kind", self.engine.as_ref().map(|engine| format!("{engine:?}")))
    }
}

impl Serving {
    /// As flags of [`Source::load`].
    fn flags(&self) -> [(&'static str, Option<String>); 5] {
        let quoted = |text: &Option<String>| text.as_ref().map(|text| format!("{text:?}"));
        let roots = &self.weight_roots;
        [
            self.engine.flag(),
            ("engine.profile", self.profile.then(|| "true".into())),
            ("engine.serve_dtype", quoted(&self.serve_dtype)),
            ("server.control", quoted(&self.control)),
            ("server.weight_roots", (!roots.is_empty()).then(|| format!("{roots:?}"))),
        ]
    }
}

/// `onpolicy train`.
#[derive(Debug, Args)]
pub struct Train {
    #[command(flatten)]
    source: Source,
    /// Folder for metrics, samples, pictures and checkpoints (output.dir)
    #[arg(short, long, value_name = "DIR")]
    output: Option<String>,
    /// Training steps (train.steps)
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Seed of problems and samples (train.seed)
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Port of the HTTP endpoint; 0 takes a free one (server.port)
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    #[command(flatten)]
    serving: Serving,
    /// Go on from the newest checkpoint in the output folder
    #[arg(long)]
    pub resume: bool,
}

impl Train {
    /// The configuration of the run.
    pub fn config(&self) -> Result<Config, ConfigError> {
        let own = [
            ("output.dir", self.output.as_ref().map(|dir| format!("{dir:?}"))),
            ("train.steps", self.steps.map(|n| n.to_string())),
            ("train.seed", self.seed.map(|n| n.to_string())),
            ("server.port", self.port.map(|n| n.to_string())),
        ];
        self.source.load(&[&own[..], &self.serving.flags()].concat())
    }
}

/// `onpolicy serve`.
#[derive(Debug, Args)]
pub struct Serve {
    #[command(flatten)]
    source: Source,
    /// Address to listen on (server.host)
    #[arg(long, value_name = "HOST")]
    host: Option<String>,
    /// Port to listen on; 0 takes a free one (server.port)
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    #[command(flatten)]
    serving: Serving,
}

impl Serve {
    /// The configuration of the server.
    pub fn config(&self) -> Result<Config, ConfigError> {
        let own = [
            ("server.host", self.host.as_ref().map(|host| format!("{host:?}"))),
            ("server.port", self.port.map(|n| n.to_string())),
        ];
        self.source.load(&[&own[..], &self.serving.flags()].concat())
    }
}

/// `onpolicy eval`.
#[derive(Debug, Args)]
pub struct Eval {
    #[command(flatten)]
    source: Source,
    /// Held-out problems (eval.problems)
    #[arg(long, value_name = "N")]
    problems: Option<usize>,
    /// Samples per problem: the K of Avg@K (eval.samples)
    #[arg(long, value_name = "K")]
    samples: Option<usize>,
    #[command(flatten)]
    engine: EngineChoice,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

impl Eval {
    /// The configuration of the evaluation.
    pub fn config(&self) -> Result<Config, ConfigError> {
        self.source.load(&[
            self.engine.flag(),
            ("eval.problems", self.problems.map(|n| n.to_string())),
            ("eval.samples", self.samples.map(|n| n.to_string())),
        ])
    }
}

/// `onpolicy plan`.
#[derive(Debug, Args)]
pub struct Plan {
    #[command(flatten)]
    source: Source,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub prompt_tokens: usize,
    /// Memory to plan for, in GiB; if not given, that of this machine or its device
    #[arg(long, value_name = "GIB")]
    pub memory_gb: Option<f64>,
    /// Print the plan as JSON
    #[arg(long)]
    pub json: bool,
}

impl Plan {
    /// The configuration of the run.
    pub fn config(&self) -> Result<Config, ConfigError> {
        self.source.load(&[])
    }
}

/// `onpolicy plot`.
#[derive(Debug, Args)]
pub struct Plot {
    /// Folders of runs; NAME=DIR gives one a name in the picture
    #[arg(required = true, value_name = "RUN")]
    pub runs: Vec<String>,
    /// Folder that the pictures are written to; the run's own folder if there is one run
    #[arg(short, long, value_name = "DIR")]
    pub output: Option<PathBuf>,
}
