//! A model that is loaded, served by an engine, and ready to be trained: one storage, two handles.

use crate::{config::Config, error::TrainError};
use onpolicy_engine::{
    chat::ChatTokenizer,
    engine::{EngineConfig, EngineHandle, Model},
    model::{
        config::ModelConfig,
        decoder::Decoder,
        loading::{Checkpoint, Source, load},
    },
    torch::memory::keep_freed,
    weights::{ServeDtype, Weights},
};
use onpolicy_plugin_api::EngineError;

/// A served model with trainable handles to its weights.
pub struct Served {
    /// The engine.
    pub engine: EngineHandle,
    /// The model's tokenizer and chat template.
    pub tokenizer: ChatTokenizer,
    /// Files that a checkpoint of it needs.
    pub source: Source,
    /// Handles that collect gradients, over the served storage.
    pub weights: Weights,
    config: ModelConfig,
    serve_dtype: ServeDtype,
}

impl Served {
    /// Loads the model at `path` and starts an engine over it.
    ///
    /// # Errors
    /// A model that cannot be loaded, or an engine that does not fit.
    pub fn start(path: &str, config: &Config) -> Result<Self, TrainError> {
        Self::over(load(path)?, config)
    }

    /// Starts an engine over a model that is loaded already.
    ///
    /// # Errors
    /// An engine that does not fit.
    pub fn over(checkpoint: Checkpoint, config: &Config) -> Result<Self, TrainError> {
        let Checkpoint { name, config: model, tensors, tokenizer, source } = checkpoint;
        let policy = Weights::new(tensors);
        let weights = policy.share_trainable();
        let name = config.model.name.clone().unwrap_or(name);
        let tokenizer_too = Some(tokenizer.clone());
        let served =
            Model { name, config: model.clone(), weights: policy, tokenizer: tokenizer_too };
        let engine = EngineHandle::start(served, engine_config(config))?;
        // Not before, so that what loading has left is gone.
        keep_freed();
        let serve_dtype = config.engine.serve_dtype;
        Ok(Self { engine, tokenizer, source, weights, config: model, serve_dtype })
    }

    /// What is served in a narrow type, and the memory that it takes; none where f32 is served.
    ///
    /// # Errors
    /// The engine has stopped.
    pub fn copies(&self) -> Result<Option<String>, EngineError> {
        let (copied, all) = (self.engine.stats()?.copied_bytes >> 20, self.weights.bytes() >> 20);
        let dtype = self.serve_dtype;
        let text = || {
            format!(
                "linear layers and head served as {dtype}: {copied} MiB beside {all} MiB of f32"
            )
        };
        Ok((dtype != ServeDtype::F32).then(text))
    }

    /// The model's shape.
    pub fn model(&self) -> &ModelConfig {
        &self.config
    }

    /// A decoder for the trainer, over the trainable handles.
    pub fn decoder(&self) -> Decoder {
        Decoder::new(&self.config, &self.weights)
    }
}

fn engine_config(config: &Config) -> EngineConfig {
    let engine = &config.engine;
    EngineConfig {
        kv_memory: engine.kv_memory_mb << 20,
        max_num_seqs: engine.max_num_seqs,
        max_batched_tokens: engine.max_batched_tokens,
        max_model_len: engine.max_model_len,
        max_waiting: engine.max_waiting,
        prefix_cache: engine.prefix_cache,
        on_update: engine.on_update,
        profile: engine.profile,
        serve_dtype: engine.serve_dtype,
    }
}
