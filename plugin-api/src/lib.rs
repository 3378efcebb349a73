//! What a plug-in is written against: four traits and plain data. No tensors, no HTTP.
//!
//! # Layout
//! - [`engine`]: groups of samples in; tokens, log-probs and weight versions out; weights in.
//! - [`sampling`]: how samples are drawn; [`control`]: pausing, sleeping, new weights.
//! - [`task`]: where problems come from.
//! - [`verifier`]: problem and completion in, reward out.
//! - [`gate`]: token statistics in, keep mask out (what Clip_B and Clip_V are).
//! - [`plugins`]: the table that maps a name in a configuration file to one of the above.

pub mod control;
pub mod engine;
pub mod gate;
pub mod plugins;
pub mod sampling;
pub mod task;
pub mod verifier;

pub use control::{Memory, PauseMode, Sleep, WeightUpdate};
pub use engine::{
    Engine, EngineError, Event, FinishReason, ModelInfo, PromptToken, Request, RequestId, Sink,
    Token, TokenStats,
};
pub use gate::{TokenBatch, TokenGate};
pub use plugins::{Options, PluginError, Plugins};
pub use sampling::{Grammar, LogprobsMode, SamplingParams};
pub use task::{Message, Problem, Role, TaskSource};
pub use verifier::{Attempt, Score, Verifier, VerifyError};
