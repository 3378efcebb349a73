//! Raw TOML and `section.key=value` flags become one validated configuration.
//!
//! - [`sections`]: the keys, their types and their defaults.
//! - `raw`: reads the file, lays the flags over it, and names what does not fit.
//! - `validate`: ranges, and rules between keys. `engine_kind`: those of the engines.

pub mod sections;

mod engine_kind;
mod raw;
mod validate;

pub use engine_kind::EngineKind;
pub use sections::{
    ControlPlane, Correction, DeviceName, Dtype, Engine, Eval, Key, Mode, Model, OnUpdate, Output,
    Plugin, RemoteOptions, Rollout, Schedule, ServeDtype, Server, Train,
};

use serde::Serialize;
use std::path::Path;

/// Everything that a run needs to know. It only comes into being valid.
///
/// `examples/config.toml` lists every key with its default.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Config {
    /// The model to serve and train.
    pub model: Model,
    /// The inference engine.
    pub engine: Engine,
    /// The HTTP endpoint.
    pub server: Server,
    /// Where problems come from.
    pub task: Plugin,
    /// What judges completions.
    pub verifier: Plugin,
    /// What picks the tokens of the loss.
    pub gate: Plugin,
    /// How the completions of a step are drawn.
    pub rollout: Rollout,
    /// How the weights are updated.
    pub train: Train,
    /// How the policy is evaluated.
    pub eval: Eval,
    /// What is written, and where.
    pub output: Output,
}

/// Why a configuration was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {reason}")]
    Read { path: String, reason: String },
    /// The text is not TOML.
    #[error("the configuration is not valid TOML: {0}")]
    Syntax(String),
    /// There is no such key.
    #[error("unknown key '{key}'{hint}")]
    Unknown { key: String, hint: String },
    /// A key is missing or has the wrong type.
    #[error("{key}: {reason}")]
    Shape { key: String, reason: String },
    /// A value is out of range or does not go with another.
    #[error("{key} = {value}: {rule}")]
    Value { key: String, value: String, rule: String },
    /// A flag is not of the form `section.key=value`.
    #[error("'{flag}': {reason}")]
    Flag { flag: String, reason: String },
}

impl Config {
    /// Reads a file, if one is given, and lays `overrides` of the form `section.key=value` over
    /// it. A value is TOML; what is not TOML is a string, so `model.path=/models/a` needs no
    /// quotes. Those that name a plug-in or an engine are laid first, wherever they stand, so that
    /// the options beside them are its own.
    ///
    /// # Errors
    /// The first thing that is wrong, by its key.
    pub fn load(path: Option<&Path>, overrides: &[String]) -> Result<Self, ConfigError> {
        let text = match path {
            None => String::new(),
            Some(path) => std::fs::read_to_string(path).map_err(|e| ConfigError::Read {
                path: path.display().to_string(),
                reason: e.to_string(),
            })?,
        };
        Self::parse(&text, overrides)
    }

    /// As [`Config::load`], from a text.
    ///
    /// # Errors
    /// The first thing that is wrong, by its key.
    pub fn parse(text: &str, overrides: &[String]) -> Result<Self, ConfigError> {
        let mut table = raw::read(text)?;
        let (names, others): (Vec<_>, _) = overrides.iter().partition(|flag| raw::is_name(flag));
        for flag in names.into_iter().chain(others) {
            raw::lay_over(&mut table, flag)?;
        }
        let config = raw::resolve(table)?;
        config.validate()?;
        Ok(config)
    }

    /// What whoever trains should know about this configuration before it starts, if anything.
    pub fn warning(&self) -> Option<String> {
        let (engine, dtype) = (&self.engine, self.engine.serve_dtype);
        let drawn = match engine.kind() {
            EngineKind::Native if dtype == ServeDtype::F32 => match self.model.dtype {
                Some(narrow) if narrow != Dtype::F32 => {
                    format!("model.dtype = \"{narrow}\": engine and trainer round differently")
                }
                _ => return None,
            },
            EngineKind::Native => {
                format!("engine.serve_dtype = \"{dtype}\": samples are drawn with rounded weights")
            }
            _ => format!("engine.kind = \"{}\": samples are drawn by other code", engine.kind),
        };
        let uncorrected = self.train.correction == Correction::None;
        uncorrected.then(|| {
            format!(
                "{drawn}, and train.correction = \"none\" takes their log-probs for the trainer's; \
                 train.correction = \"tis\" corrects for the difference (see mismatch_* in \
                 metrics.jsonl)"
            )
        })
    }

    /// The resolved configuration, all defaults filled in; [`Config::parse`] reads it back.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a validated configuration has a TOML form")
    }
}
