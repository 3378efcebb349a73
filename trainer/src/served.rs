//! A model that is served by an engine, and one that is loaded and ready to be trained beside it.
//! With the native engine that is one storage with two handles.

use crate::{
    config::{Config, EngineKind},
    device_room,
    engines::{self, Vocabulary},
    error::TrainError,
    memory_plan::HOST_KV,
};
use onpolicy_engine::{
    chat::ChatTokenizer,
    device::Placement,
    engine::{EngineConfig, EngineHandle, Model},
    model::{
        config::ModelConfig,
        decoder::Decoder,
        loading::{Checkpoint, Source, describe, load_to},
    },
    torch::memory::keep_freed,
    weights::{ServeDtype, Weights},
};
use onpolicy_plugin_api::{Engine, EngineError};
use std::sync::Arc;
use tch::Tensor;

/// A model that is served, by whatever engine.
pub struct Serving {
    /// The engine.
    pub engine: Arc<dyn Engine>,
    /// The model's tokenizer and chat template.
    pub tokenizer: ChatTokenizer,
    native: Option<EngineHandle>,
    copies: Option<String>,
}

impl Serving {
    /// Starts the engine that `config` names over the model at `path`. Weights are only loaded if
    /// that is the native engine. `plugin` is the engine that a plug-in made, if it is one's.
    ///
    /// # Errors
    /// A model that cannot be loaded, or an engine that cannot be started.
    pub fn start(
        path: &str,
        config: &Config,
        plugin: Option<Arc<dyn Engine>>,
    ) -> Result<Self, TrainError> {
        if config.engine.kind() == EngineKind::Native {
            let served = Served::start(path, config)?;
            let copies = served.copies()?;
            let Served { engine, native, tokenizer, .. } = served;
            return Ok(Self { engine, tokenizer, native, copies });
        }
        let model = describe(path)?;
        let engine = engines::start(config, &Vocabulary::from(&model), plugin)?;
        Ok(Self { engine, tokenizer: model.tokenizer, native: None, copies: None })
    }

    /// The engine, if it is the native one.
    pub fn native(&self) -> Option<&EngineHandle> {
        self.native.as_ref()
    }

    /// What is served in a narrow type, and the memory that it takes; none where nothing is.
    pub fn copies(&self) -> Option<&str> {
        self.copies.as_deref()
    }

    /// Ends the engine; blocks until it has ended.
    pub fn shutdown(self) {
        if let Some(native) = &self.native {
            native.shutdown();
        }
    }
}

/// A served model with trainable handles to its weights.
pub struct Served {
    /// The engine.
    pub engine: Arc<dyn Engine>,
    native: Option<EngineHandle>,
    /// The model's tokenizer and chat template.
    pub tokenizer: ChatTokenizer,
    /// Files that a checkpoint of it needs.
    pub source: Source,
    /// Handles that collect gradients: over the served storage, if the engine shares its weights.
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
        let checkpoint = load_to(path, config.model.placement()?)?;
        let config = device_room::fit_serving(config, &checkpoint)?;
        Self::over(checkpoint, &config, None)
    }

    /// Starts an engine over, or beside, a model that is loaded already. `plugin` is the engine
    /// that a plug-in made, if `config` names one.
    ///
    /// # Errors
    /// An engine that does not fit or cannot be started.
    pub fn over(
        checkpoint: Checkpoint,
        config: &Config,
        plugin: Option<Arc<dyn Engine>>,
    ) -> Result<Self, TrainError> {
        check_placement(&checkpoint, config)?;
        if config.engine.kind() != EngineKind::Native {
            return Self::beside(checkpoint, config, plugin);
        }
        let Checkpoint { name, config: model, tensors, tokenizer, source } = checkpoint;
        let policy = Weights::new(tensors);
        let weights = policy.share_trainable();
        let name = config.model.name.clone().unwrap_or(name);
        let tokenizer_too = Some(tokenizer.clone());
        let served =
            Model { name, config: model.clone(), weights: policy, tokenizer: tokenizer_too };
        let native = EngineHandle::start(served, engine_config(config))?;
        // Not before, so that what loading has left is gone.
        keep_freed();
        let serve_dtype = config.engine.serve_dtype;
        let (engine, native) = (Arc::new(native.clone()), Some(native));
        Ok(Self { engine, native, tokenizer, source, weights, config: model, serve_dtype })
    }

    /// Starts an engine that has weights of its own.
    fn beside(
        checkpoint: Checkpoint,
        config: &Config,
        plugin: Option<Arc<dyn Engine>>,
    ) -> Result<Self, TrainError> {
        let Checkpoint { config: model, tensors, tokenizer, source, .. } = checkpoint;
        let engine = engines::start(config, &Vocabulary::from(&model), plugin)?;
        let weights = Weights::new(tensors).share_trainable();
        keep_freed();
        let (native, serve_dtype) = (None, ServeDtype::F32);
        Ok(Self { engine, native, tokenizer, source, weights, config: model, serve_dtype })
    }

    /// The engine, if it is the native one.
    pub fn native(&self) -> Option<&EngineHandle> {
        self.native.as_ref()
    }

    /// Ends a native engine; blocks until it has ended. Others end with their last handle.
    pub fn shutdown(&self) {
        if let Some(native) = &self.native {
            native.shutdown();
        }
    }

    /// What is served in a narrow type, and the memory that it takes; none where f32 is served.
    ///
    /// # Errors
    /// The engine has stopped.
    pub fn copies(&self) -> Result<Option<String>, EngineError> {
        let Some(native) = &self.native else { return Ok(None) };
        let (copied, all) = (native.stats()?.copied_bytes >> 20, self.weights.bytes() >> 20);
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

    /// Where the tensors live.
    pub fn placement(&self) -> Placement {
        self.weights.iter().next().map_or(Placement::NATIVE, |(_, tensor)| Placement::of(tensor))
    }

    /// A decoder for the trainer, over the trainable handles.
    pub fn decoder(&self) -> Decoder {
        Decoder::new(&self.config, &self.weights)
    }
}

/// Refuses a model that lies elsewhere than the configuration says.
fn check_placement(checkpoint: &Checkpoint, config: &Config) -> Result<(), TrainError> {
    let wanted = config.model.placement()?;
    let differs = |(_, tensor): &&(String, Tensor)| Placement::of(tensor) != wanted;
    match checkpoint.tensors.iter().find(differs) {
        None => Ok(()),
        Some((name, tensor)) => Err(TrainError::Refused(format!(
            "'{name}' was loaded as {}, and model.device and model.dtype ask for {wanted}",
            Placement::of(tensor)
        ))),
    }
}

fn engine_config(config: &Config) -> EngineConfig {
    let engine = &config.engine;
    EngineConfig {
        kv_memory: engine.kv_memory_mb.map_or(HOST_KV, |mb| mb << 20),
        max_num_seqs: engine.max_num_seqs,
        max_batched_tokens: engine.max_batched_tokens,
        max_model_len: engine.max_model_len,
        max_waiting: engine.max_waiting,
        prefix_cache: engine.prefix_cache,
        on_update: engine.on_update,
        profile: engine.profile,
        serve_dtype: engine.serve_dtype,
        num_speculative_tokens: engine.num_speculative_tokens,
        enforce_eager: engine.enforce_eager,
        async_scheduling: engine.async_scheduling,
    }
}
