//! How a model is loaded and served by mistral.rs.

use mistralrs::ModelDType;
use onpolicy_plugin_api::EngineError;
use serde::{Deserialize, Serialize};

/// The type that weights of a directory are served in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// f32 on a CPU; elsewhere bf16 or f16, whichever the device has.
    #[default]
    Auto,
    /// 32 bits.
    F32,
    /// 16 bits, as IEEE 754 has them.
    F16,
    /// 16 bits with the exponent of f32. mistral.rs has no matrix product of these on a CPU.
    Bf16,
}

/// How a model is loaded and served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Name that clients use; none is the last part of the model's path, or its hub id.
    pub name: Option<String>,
    /// In-situ quantisation of a directory's weights, as mistral.rs names it: `Q4K`, `Q8_0`, `4`.
    pub isq: Option<String>,
    /// The type that a directory's weights are served in.
    pub dtype: Dtype,
    /// Most samples that run at a time. On a CPU it can only be one: there mistral.rs 0.8.1 decodes
    /// a batch with the attention of its last sample for all of them.
    pub max_num_seqs: usize,
    /// Most requests that wait.
    pub max_waiting: usize,
    /// Most samples of one request.
    pub max_samples: usize,
    /// Longest sequence, in tokens; the model's own limit if none.
    pub max_model_len: Option<usize>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: None,
            isq: None,
            dtype: Dtype::Auto,
            max_num_seqs: 1,
            max_waiting: 1024,
            max_samples: 256,
            max_model_len: None,
        }
    }
}

impl Options {
    /// Checks ranges.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] naming the first option that makes no sense.
    pub fn validate(&self) -> Result<(), EngineError> {
        for (name, count) in [
            ("max_num_seqs", self.max_num_seqs),
            ("max_waiting", self.max_waiting),
            ("max_samples", self.max_samples),
        ] {
            if count == 0 {
                return Err(EngineError::invalid(name, "must be at least 1"));
            }
        }
        if self.max_num_seqs > 1 && self.on_cpu()? {
            let reason = "on a CPU, mistral.rs decodes a batch of samples wrongly; leave it at 1";
            return Err(EngineError::invalid("max_num_seqs", reason));
        }
        self.isq_type().map(|_| ())
    }

    fn on_cpu(&self) -> Result<bool, EngineError> {
        device().map(|device| device.is_cpu()).map_err(EngineError::Internal)
    }

    /// The quantisation, as mistral.rs has it.
    pub(super) fn isq_type(&self) -> Result<Option<mistralrs::IsqType>, EngineError> {
        let parse = |text: &String| mistralrs::parse_isq_value(text, Some(&device()?));
        let parsed = self.isq.as_ref().map(parse).transpose();
        parsed.map_err(|reason| EngineError::invalid("isq", reason))
    }

    /// The weights' type, as mistral.rs has it.
    pub(super) fn model_dtype(&self) -> Result<ModelDType, String> {
        Ok(match self.dtype {
            Dtype::Auto if device()?.is_cpu() => ModelDType::F32,
            Dtype::Auto => ModelDType::Auto,
            Dtype::F32 => ModelDType::F32,
            Dtype::F16 => ModelDType::F16,
            Dtype::Bf16 => ModelDType::BF16,
        })
    }
}

/// The device that mistral.rs takes: a GPU where its build has one, else the CPU.
fn device() -> Result<mistralrs::Device, String> {
    mistralrs::best_device(false).map_err(|error| error.to_string())
}
