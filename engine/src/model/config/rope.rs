//! Rotary position embedding: its scaling rules, and the frequencies that follow from them.
//!
//! Formulas: `modeling_rope_utils.py` of transformers 4.57 (linear; llama3: Llama 3.1's own code;
//! yarn: arXiv 2309.00071), in f64 here, in f32 there.

use super::keys::Keys;
use crate::model::loading::LoadError;
use serde_json::{Value, json};
use std::f64::consts::PI;

/// How positions beyond the pre-training length are squeezed in.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Plain rotary embedding.
    None,
    /// Every frequency is divided by `factor`.
    Linear { factor: f64 },
    /// Llama 3.1: long wavelengths are divided by `factor`, short ones kept, between them a ramp.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position: usize,
    },
    /// YaRN: a ramp over the dimensions, and a factor on cos and sin.
    Yarn(Yarn),
}

/// The parameters of YaRN.
#[derive(Debug, Clone, PartialEq)]
pub struct Yarn {
    /// New length over original length.
    pub factor: f64,
    /// Length of pre-training, in tokens; `max_position_embeddings` if not given.
    pub original_max_position: Option<usize>,
    /// Dimensions that turn more often than this are left alone.
    pub beta_fast: f64,
    /// Dimensions that turn less often than this are fully interpolated.
    pub beta_slow: f64,
    /// What cos and sin are multiplied by; computed if not given.
    pub attention_factor: Option<f64>,
    /// Numerator's scale of the computed attention factor.
    pub mscale: Option<f64>,
    /// Denominator's scale of the computed attention factor.
    pub mscale_all_dim: Option<f64>,
    /// Whether the ramp's ends are rounded to whole dimensions.
    pub truncate: bool,
}

/// Base and scaling of the rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the wavelengths.
    pub theta: f64,
    /// How they are scaled.
    pub scaling: RopeScaling,
}

impl RopeConfig {
    /// Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).
    pub(super) fn from_keys(config: Keys) -> Result<Self, LoadError> {
        let empty = Value::Object(Default::default());
        let (group, name) = match config.get("rope_parameters") {
            Some(group) => (group, "rope_parameters"),
            None => (config.get("rope_scaling").unwrap_or(&empty), "rope_scaling"),
        };
        let group_is_plain =
            group.as_object().is_some_and(|keys| !keys.values().any(Value::is_object));
        if !group_is_plain {
            return Err(LoadError::config(name, "must be one set of parameters for all layers"));
        }
        let keys = Keys(group);
        for keys in [config, keys] {
            if let Some(part) = keys.optional_positive("partial_rotary_factor")?
                && part != 1.0
            {
                return Err(LoadError::unsupported("partial_rotary_factor", part.to_string(), "1"));
            }
        }
        let theta = match keys.optional_positive("rope_theta")? {
            Some(theta) => theta,
            None => config.optional_positive("rope_theta")?.unwrap_or(10_000.0),
        };
        if theta <= 1.0 {
            return Err(LoadError::config("rope_theta", "must be above 1"));
        }
        Ok(Self { theta, scaling: RopeScaling::from_keys(keys, name)? })
    }

    /// The keys that [`RopeConfig::from_keys`] reads, in the form that every transformers version
    /// reads.
    pub(super) fn to_hf(&self) -> (Value, Value) {
        (json!(self.theta), self.scaling.to_hf())
    }

    /// Inverse frequencies (`head_dim / 2` of them, radians per position) and the factor that
    /// multiplies cos and sin. `max_position` is the model's `max_position_embeddings`.
    pub fn frequencies(&self, head_dim: usize, max_position: usize) -> (Vec<f64>, f64) {
        let exponents = (0..head_dim / 2).map(|i| (2 * i) as f64 / head_dim as f64);
        let plain: Vec<f64> = exponents.map(|e| self.theta.powf(e).recip()).collect();
        match &self.scaling {
            RopeScaling::None => (plain, 1.0),
            RopeScaling::Linear { factor } => (plain.iter().map(|f| f / factor).collect(), 1.0),
            RopeScaling::Llama3 { .. } => {
                (plain.iter().map(|f| f * self.scaling.llama3_ratio(*f)).collect(), 1.0)
            }
            RopeScaling::Yarn(yarn) => {
                let ramp = yarn.ramp(self.theta, head_dim, max_position);
                let mix = |(f, r): (&f64, f64)| f / yarn.factor * r + f * (1.0 - r);
                (plain.iter().zip(ramp).map(mix).collect(), yarn.cos_sin_factor())
            }
        }
    }
}

impl RopeScaling {
    fn from_keys(keys: Keys, name: &str) -> Result<Self, LoadError> {
        let kind = match keys.text("rope_type")? {
            Some(kind) => Some(kind),
            None => keys.text("type")?,
        };
        let kind = match kind {
            Some(kind) => kind,
            // `rope_parameters` may hold nothing but theta; a `rope_scaling` must say what it is.
            None if name == "rope_parameters"
                || keys.0.as_object().is_none_or(|o| o.is_empty()) =>
            {
                "default"
            }
            None => return Err(LoadError::config(name, "has no rope_type")),
        };
        match kind {
            "default" => Ok(Self::None),
            "linear" => Ok(Self::Linear { factor: keys.positive("factor")? }),
            "llama3" => Self::llama3(keys),
            "yarn" => Ok(Self::Yarn(Yarn::from_keys(keys)?)),
            other => {
                Err(LoadError::unsupported("rope type", other, "default, linear, llama3, yarn"))
            }
        }
    }

    fn llama3(keys: Keys) -> Result<Self, LoadError> {
        let low_freq_factor = keys.positive("low_freq_factor")?;
        let high_freq_factor = keys.positive("high_freq_factor")?;
        if high_freq_factor <= low_freq_factor {
            return Err(LoadError::config("high_freq_factor", "must be above low_freq_factor"));
        }
        Ok(Self::Llama3 {
            factor: keys.positive("factor")?,
            low_freq_factor,
            high_freq_factor,
            original_max_position: keys.count("original_max_position_embeddings")?,
        })
    }

    /// What llama3 scaling multiplies the plain inverse frequency by; 1 for the other kinds.
    pub(in crate::model) fn llama3_ratio(&self, inverse_frequency: f64) -> f64 {
        let Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } =
            self
        else {
            return 1.0;
        };
        let turns = *original_max_position as f64 * inverse_frequency / (2.0 * PI);
        let span = high_freq_factor - low_freq_factor;
        let smooth = ((turns - low_freq_factor) / span).clamp(0.0, 1.0);
        (1.0 - smooth) / factor + smooth
    }

    fn to_hf(&self) -> Value {
        match self {
            Self::None => Value::Null,
            Self::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                json!({
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low_freq_factor,
                    "high_freq_factor": high_freq_factor,
                    "original_max_position_embeddings": original_max_position,
                })
            }
            Self::Yarn(yarn) => yarn.to_hf(),
        }
    }
}

impl Yarn {
    fn from_keys(keys: Keys) -> Result<Self, LoadError> {
        Ok(Self {
            factor: keys.positive("factor")?,
            original_max_position: keys.optional_count("original_max_position_embeddings")?,
            beta_fast: keys.optional_nonzero("beta_fast")?.unwrap_or(32.0),
            beta_slow: keys.optional_nonzero("beta_slow")?.unwrap_or(1.0),
            attention_factor: keys.optional_positive("attention_factor")?,
            mscale: keys.optional_nonzero("mscale")?,
            mscale_all_dim: keys.optional_nonzero("mscale_all_dim")?,
            truncate: keys.flag("truncate")?.unwrap_or(true),
        })
    }

    fn to_hf(&self) -> Value {
        let mut keys = json!({
            "rope_type": "yarn",
            "factor": self.factor,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "truncate": self.truncate,
        });
        let optional = [
            ("original_max_position_embeddings", self.original_max_position.map(|n| json!(n))),
            ("attention_factor", self.attention_factor.map(|x| json!(x))),
            ("mscale", self.mscale.map(|x| json!(x))),
            ("mscale_all_dim", self.mscale_all_dim.map(|x| json!(x))),
        ];
        for (key, value) in optional {
            if let Some(value) = value {
                keys[key] = value;
            }
        }
        keys
    }

    /// For each pair of dimensions, how much of its frequency is interpolated: 0 none, 1 all.
    fn ramp(&self, theta: f64, head_dim: usize, max_position: usize) -> Vec<f64> {
        let length = self.original_max_position.unwrap_or(max_position) as f64;
        let dimension =
            |turns: f64| head_dim as f64 * (length / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (dimension(self.beta_fast), dimension(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        (0..head_dim / 2).map(|i| ((i as f64 - low) / (high - low)).clamp(0.0, 1.0)).collect()
    }

    fn cos_sin_factor(&self) -> f64 {
        let scale = |mscale: f64| {
            if self.factor <= 1.0 { 1.0 } else { 0.1 * mscale * self.factor.ln() + 1.0 }
        };
        match (self.attention_factor, self.mscale, self.mscale_all_dim) {
            (Some(given), _, _) => given,
            (None, Some(above), Some(below)) => scale(above) / scale(below),
            _ => scale(1.0),
        }
    }
}
