//! The sections of the configuration: keys, types, defaults.

use crate::advantage::Advantage;
pub use crate::correction::Correction;
pub use onpolicy_engine::{
    chat::ToolFormat,
    device::{DeviceName, Dtype},
    engine::OnUpdate,
    http::access::Key,
    remote::RemoteOptions,
    weights::ServeDtype,
};
use onpolicy_engine::{
    cuda,
    device::{Placement, PlacementError},
};
use onpolicy_plugin_api::Options;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fmt;
use tch::Device;

/// `[model]`: the model to serve and train.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// A directory, a GGUF file or a hub id. Required.
    pub path: String,
    /// Name that clients use for the model; made from `path` if not given.
    pub name: Option<String>,
    /// Where the tensors live, those of the engine and of the trainer.
    #[serde(default)]
    pub device: DeviceName,
    /// Type of the weights; f32 on the CPU and bf16 on a CUDA device if not given.
    pub dtype: Option<Dtype>,
    /// On a CUDA device: kernels of onpolicy's own; libtorch's operations alone if not.
    #[serde(default = "yes")]
    pub kernels: bool,
}

fn yes() -> bool {
    true
}

impl Model {
    /// Where the tensors live on this machine, and in which type. Opens what is needed for a device, and sets
    /// kernels aside if they are not wanted.
    ///
    /// # Errors
    /// There is no such device; the message says what to do.
    pub fn placement(&self) -> Result<Placement, PlacementError> {
        self.set_kernels_aside();
        Placement::resolve(self.device, self.dtype)
    }

    /// Does without kernels from now on, if they are not wanted.
    pub fn set_kernels_aside(&self) {
        if !self.kernels {
            cuda::set_aside();
        }
    }
}

/// `[engine]`: the inference engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Engine {
    /// Which engine: `native`, `mistralrs`, `remote`, addresses of servers with commas between
    /// them, or the name of a plug-in; see [`Engine::kind`](Self::kind()).
    pub kind: String,
    /// With `remote`: addresses of vLLM or SGLang servers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    /// Where new weights are written for an engine with weights of its own. Without it: in memory
    /// (`/dev/shm`) if the system has that, else in the run folder.
    pub transfer_dir: Option<String>,
    /// Memory for K and V, in MiB. If not given, 1024 in main memory, and on a CUDA device what
    /// weights, optimizer and training leave.
    pub kv_memory_mb: Option<usize>,
    /// Most samples that run at once.
    pub max_num_seqs: usize,
    /// Most tokens of one engine step.
    pub max_batched_tokens: usize,
    /// Longest sequence, in tokens; the model's own limit if not given.
    pub max_model_len: Option<usize>,
    /// Most requests that wait; one more is turned away.
    pub max_waiting: usize,
    /// Reuse the KV of equal prompt beginnings.
    pub prefix_cache: bool,
    /// What running samples do when the weights change.
    pub on_update: OnUpdate,
    /// Print where the engine's time goes, by phase of a step.
    pub profile: bool,
    /// Type that the linear layers and the head are served in.
    pub serve_dtype: ServeDtype,
    /// Most tokens that are guessed for a sample in a step with rows to spare; 0 guesses none. If not
    /// given, 7 for f32 on the CPU, and 0 elsewhere.
    pub num_speculative_tokens: Option<usize>,
    /// Launch every operation of a decode step on a CUDA device by itself, in place of recorded
    /// graphs, and leave products to libtorch.
    pub enforce_eager: bool,
    /// Plan a step, and deliver the tokens of the one before, while the device computes. If not given,
    /// that is so on a CUDA device.
    pub async_scheduling: Option<bool>,
    /// With `remote`: how the servers are spoken to.
    #[serde(skip_serializing_if = "is_default")]
    pub remote: RemoteOptions,
    /// Options of a plug-in, or of `mistralrs`; they check them themselves.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub options: Map<String, Value>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Default for Engine {
    fn default() -> Self {
        Self {
            kind: "native".into(),
            urls: Vec::new(),
            transfer_dir: None,
            kv_memory_mb: None,
            max_num_seqs: 256,
            max_batched_tokens: 2048,
            max_model_len: None,
            max_waiting: 1024,
            prefix_cache: true,
            on_update: OnUpdate::Keep,
            profile: false,
            serve_dtype: ServeDtype::F32,
            num_speculative_tokens: None,
            enforce_eager: false,
            async_scheduling: None,
            remote: RemoteOptions::default(),
            options: Map::new(),
        }
    }
}

/// `[server]`: the HTTP endpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Server {
    /// Serve while training.
    pub enabled: bool,
    /// Address to listen on.
    pub host: String,
    /// Port to listen on; 0 takes any free one.
    pub port: u16,
    /// What clients of the model must show; none lets everybody in. Never written to a file.
    #[serde(skip_serializing)]
    pub api_key: Option<Key>,
    /// What those that control the engine must show. Never written to a file.
    #[serde(skip_serializing)]
    pub control_key: Option<Key>,
    /// Whether the engine may be controlled over HTTP.
    pub control: ControlPlane,
    /// Directories that weights may be loaded from by a client, or from below them.
    pub weight_roots: Vec<String>,
    /// How the model writes calls of tools: `hermes` (Qwen too) or `llama3`; without it, as its chat
    /// template says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_format: Option<ToolFormat>,
    /// How long a client waits for a command before it is told that it goes on without it.
    pub control_timeout_seconds: u64,
    /// Generating requests at once; one more is answered with 429.
    pub max_concurrent_requests: usize,
    /// Open connections; one more waits until another is closed.
    pub max_connections: usize,
    /// Prompts of one request.
    pub max_prompts: usize,
    /// Samples of one request: prompts times `n`.
    pub max_samples: usize,
    /// Tokens of all prompts of one request.
    pub max_prompt_tokens: usize,
    /// Longest body of a request, in MiB.
    pub max_body_mb: usize,
    /// Tokens of a stream that may wait for a slow reader.
    pub max_undelivered_tokens: usize,
    /// Longest time of a request at the engine, in seconds; 0 sets no limit.
    pub request_timeout_seconds: u64,
    /// Longest time for a request's body to arrive, in seconds.
    pub body_timeout_seconds: u64,
    /// Longest time for a request's headers, and of a connection without a request, in seconds.
    pub header_timeout_seconds: u64,
    /// Longest time that a client may read nothing, in seconds.
    pub write_timeout_seconds: u64,
    /// How long requests may go on after the signal to stop, in seconds.
    pub shutdown_grace_seconds: u64,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            enabled: true,
            host: "127.0.0.1".into(),
            port: 8000,
            api_key: None,
            control_key: None,
            control: ControlPlane::Auto,
            weight_roots: Vec::new(),
            tool_format: None,
            control_timeout_seconds: 300,
            max_concurrent_requests: 1024,
            max_connections: 2048,
            max_prompts: 1024,
            max_samples: 16_384,
            max_prompt_tokens: 1 << 20,
            max_body_mb: 8,
            max_undelivered_tokens: 16_384,
            request_timeout_seconds: 3600,
            body_timeout_seconds: 60,
            header_timeout_seconds: 30,
            write_timeout_seconds: 30,
            shutdown_grace_seconds: 10,
        }
    }
}

/// Whether the engine may be controlled over HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlPlane {
    /// If the endpoint listens on the loopback interface, unless only the model has a key.
    #[default]
    Auto,
    /// Yes; needs a control key unless the endpoint listens on the loopback interface.
    On,
    /// No.
    Off,
}

/// `[task]`, `[verifier]` and `[gate]`: the name of a plug-in, and its options beside it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plugin {
    /// Name of the plug-in.
    pub name: String,
    /// Its options; the plug-in itself checks them.
    #[serde(flatten)]
    pub options: Map<String, Value>,
}

impl Plugin {
    /// The options, as a plug-in takes them.
    pub fn options(&self) -> Options {
        Options(self.options.clone())
    }
}

/// `[rollout]`: how the completions of a step are drawn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rollout {
    /// Problems of one step.
    pub prompts_per_step: usize,
    /// Completions of each problem.
    pub group_size: usize,
    /// Longest completion, in tokens.
    pub max_new_tokens: usize,
    /// Sampling temperature.
    pub temperature: f64,
    /// Longest time to wait for the completions of one step.
    pub timeout_seconds: u64,
}

impl Default for Rollout {
    fn default() -> Self {
        Self {
            prompts_per_step: 8,
            group_size: 8,
            max_new_tokens: 24,
            temperature: 1.0,
            timeout_seconds: 600,
        }
    }
}

/// `[train]`: how the weights are updated. Groups whose rewards are all equal are left out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Train {
    /// Training steps.
    pub steps: u64,
    /// Seed of the samples and of the built-in tasks.
    pub seed: u64,
    /// Which weights the completions of a step are drawn from.
    pub mode: Mode,
    /// AdamW: learning rate.
    pub lr: f64,
    /// AdamW: decay of the two running means.
    pub betas: [f64; 2],
    /// AdamW: added to the root of the second moment.
    pub eps: f64,
    /// AdamW: decoupled weight decay.
    pub weight_decay: f64,
    /// Gradients are scaled down to this global norm.
    pub max_grad_norm: f64,
    /// How the learning rate goes on after the warm-up.
    pub schedule: Schedule,
    /// Steps over which the learning rate rises from 0.
    pub warmup_steps: u64,
    /// With `cosine`: last learning rate, as a share of `lr`.
    pub min_lr_ratio: f64,
    /// PPO: ratios below `1 - clip_low` are clipped.
    pub clip_low: f64,
    /// PPO: ratios above `1 + clip_high` are clipped.
    pub clip_high: f64,
    /// Dual clip: with a negative advantage, the objective is not below `dual_clip * advantage`.
    pub dual_clip: f64,
    /// What is done about the engine's log-probs where they are not the trainer's.
    pub correction: Correction,
    /// With `tis`: largest weight of a token.
    pub tis_cap: f64,
    /// How rewards become advantages.
    pub advantage: Advantage,
    /// Optimizer steps of one batch; it is cut into this many parts.
    pub updates_per_batch: usize,
    /// Most tokens of one forward and backward pass; a longer sample has one of its own. If not given,
    /// 512 in main memory and 8192 on a CUDA device: see [`Train::pass_tokens`].
    pub micro_batch_tokens: Option<usize>,
    /// Keep only the layers' inputs for the backward pass and run each layer again: a tenth of
    /// the memory of the activations for about a quarter more time.
    pub activation_checkpointing: bool,
}

/// Which weights the completions of a step are drawn from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Those after the step before; the engine and the trainer take turns.
    #[default]
    Online,
    /// One-step off-policy: they are drawn while the trainer works on the step before, by the
    /// weights before its update and, as `engine.on_update` says, after it.
    Overlapped,
    /// Offline: all completions of the run are drawn first, by the weights it starts from.
    Batch,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Online => "online",
            Self::Overlapped => "overlapped",
            Self::Batch => "batch",
        })
    }
}

/// How the learning rate goes on after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// It stays.
    #[default]
    Constant,
    /// It falls along half a cosine to `min_lr_ratio * lr` at the last step.
    Cosine,
}

/// Cap of truncated importance sampling if none is given.
pub(super) const TIS_CAP: f64 = 2.0;

impl Train {
    /// Most tokens of one forward and backward pass where the weights lie on `device`. A GPU is idle
    /// most of a pass that is short.
    pub fn pass_tokens(&self, device: Device) -> usize {
        self.micro_batch_tokens.unwrap_or(if device.is_cuda() { 8192 } else { 512 })
    }
}

impl Default for Train {
    fn default() -> Self {
        Self {
            steps: 20,
            seed: 0,
            mode: Mode::Online,
            lr: 2e-5,
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            schedule: Schedule::Constant,
            warmup_steps: 0,
            min_lr_ratio: 0.0,
            clip_low: 0.2,
            clip_high: 0.2,
            dual_clip: 3.0,
            correction: Correction::None,
            tis_cap: TIS_CAP,
            advantage: Advantage::Grpo,
            updates_per_batch: 1,
            micro_batch_tokens: None,
            activation_checkpointing: false,
        }
    }
}

/// `[eval]`: how the policy is evaluated on held-out problems.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Eval {
    /// Evaluate after every so many training steps; 0 never does.
    pub every: u64,
    /// Problems of one evaluation.
    pub problems: usize,
    /// Completions of each problem.
    pub samples: usize,
    /// Sampling temperature; 0 is greedy.
    pub temperature: f64,
    /// The k of Pass@k to report.
    pub k: Vec<usize>,
}

impl Default for Eval {
    fn default() -> Self {
        Self { every: 0, problems: 64, samples: 4, temperature: 0.7, k: vec![1, 4] }
    }
}

/// `[output]`: what is written, and where.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Output {
    /// The run folder.
    pub dir: String,
    /// Save a checkpoint after every so many steps; 0 saves at the end only.
    pub checkpoint_every: u64,
    /// Checkpoints that are kept; older ones are deleted.
    pub keep_checkpoints: usize,
    /// Problems whose completions are written down before and after training.
    pub sample_prompts: usize,
}

impl Default for Output {
    fn default() -> Self {
        Self {
            dir: "runs/default".into(),
            checkpoint_every: 0,
            keep_checkpoints: 2,
            sample_prompts: 4,
        }
    }
}
