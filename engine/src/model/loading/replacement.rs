//! Weights alone, out of a Hugging Face directory, for a model that runs already.

use super::{LoadError, directory, safetensors};
use crate::model::config::ModelConfig;
use serde_json::Value;
use std::path::Path;
use tch::Tensor;

/// Relative distance within which two numbers of a configuration are the same: files keep them in
/// f32 or in decimal.
const CLOSE: f64 = 1e-5;

/// Reads the weights in `dir` that take the place of those of a running model of shape `model`: f32,
/// contiguous, on the CPU; exactly [`ModelConfig::tensor_shapes`], in that order. A `config.json`
/// there must describe the same model; a tokenizer is not read.
///
/// # Errors
/// The directory does not hold these weights, whole.
pub fn load_weights(dir: &Path, model: &ModelConfig) -> Result<Vec<(String, Tensor)>, LoadError> {
    if !dir.is_dir() {
        return Err(LoadError::NotFound {
            spec: dir.display().to_string(),
            hint: "there is no such directory".into(),
        });
    }
    if let Some(text) = directory::read_optional(dir, "config.json")? {
        let wrong =
            |e: serde_json::Error| LoadError::corrupt(&dir.join("config.json"), e.to_string());
        let config: Value = serde_json::from_str(&text).map_err(wrong)?;
        check_same(&ModelConfig::from_hf(&config, None)?, model)?;
    }
    safetensors::load_one_by_one(dir, model)
}

/// Refuses a configuration under which the same weights would be another model.
fn check_same(found: &ModelConfig, model: &ModelConfig) -> Result<(), LoadError> {
    let class = |config: &ModelConfig| config.architecture.class_name();
    if class(found) != class(model) {
        return Err(LoadError::unsupported("architecture", class(found), class(model)));
    }
    for (key, found, running) in sizes(found).into_iter().zip(sizes(model)).map(pair) {
        if found != running {
            let reason = format!("is {found}; the running model's is {running}");
            return Err(LoadError::config(key, reason));
        }
    }
    let different = |key| LoadError::config(key, "is not the running model's");
    if !close(found.rms_norm_eps, model.rms_norm_eps) {
        return Err(different("rms_norm_eps"));
    }
    if found.layer_window != model.layer_window {
        return Err(different("sliding_window"));
    }
    let rope = |config: &ModelConfig| {
        config.rope.frequencies(config.head_dim, config.max_position_embeddings)
    };
    let ((found, found_scale), (running, running_scale)) = (rope(found), rope(model));
    let same = found.iter().zip(&running).all(|(a, b)| close(*a, *b));
    if same && close(found_scale, running_scale) { Ok(()) } else { Err(different("rope")) }
}

type Size = (&'static str, usize);

fn pair(((key, found), (_, running)): (Size, Size)) -> (&'static str, usize, usize) {
    (key, found, running)
}

/// What the tensors' shapes, and what is computed with them, follow from.
fn sizes(config: &ModelConfig) -> [Size; 11] {
    [
        ("vocab_size", config.vocab_size),
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("num_hidden_layers", config.num_layers),
        ("num_attention_heads", config.num_heads),
        ("num_key_value_heads", config.num_kv_heads),
        ("head_dim", config.head_dim),
        ("tie_word_embeddings", config.tie_word_embeddings.into()),
        ("attention_bias", config.qkv_bias.into()),
        ("attention_bias", config.o_bias.into()),
        ("mlp_bias", config.mlp_bias.into()),
    ]
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= CLOSE * a.abs().max(b.abs())
}
