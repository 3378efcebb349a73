//! GGUF metadata to [`ModelConfig`].

use super::super::LoadError;
use super::{
    header::Header,
    names,
    values::{Metadata, missing},
    weights::{self, Weights},
};
use crate::model::config::{Architecture, ModelConfig, RopeConfig, RopeScaling, Yarn, layer_count};

/// The keys below one architecture's name.
struct Keys<'a> {
    metadata: &'a Metadata,
    architecture: &'a str,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn count(&self, key: &str) -> Result<usize, LoadError> {
        self.metadata.count(&self.name(key))
    }

    fn optional_count(&self, key: &str) -> Result<Option<usize>, LoadError> {
        self.metadata.optional_count(&self.name(key))
    }

    fn positive(&self, key: &str) -> Result<Option<f64>, LoadError> {
        self.metadata.positive(&self.name(key))
    }

    /// Refuses a key that is there with a value other than `only`.
    fn expect(&self, key: &str, only: usize) -> Result<(), LoadError> {
        match self.optional_count(key)? {
            Some(n) if n != only => {
                Err(LoadError::unsupported(self.name(key), n.to_string(), only.to_string()))
            }
            _ => Ok(()),
        }
    }
}

/// The configuration of the model in the file.
pub(super) fn model_config(header: &Header, weights: &Weights) -> Result<ModelConfig, LoadError> {
    let metadata = &header.metadata;
    let name = metadata.text("general.architecture")?;
    let name = name.ok_or_else(|| missing("general.architecture"))?;
    let architecture = match name {
        "llama" => Architecture::Llama,
        "qwen2" => Architecture::Qwen2,
        "qwen3" => Architecture::Qwen3,
        other => {
            return Err(LoadError::unsupported("GGUF architecture", other, "llama, qwen2, qwen3"));
        }
    };
    let keys = Keys { metadata, architecture: name };
    keys.expect("expert_count", 0)?;
    keys.expect("attention.sliding_window", 0)?;
    let hidden_size = keys.count("embedding_length")?;
    let num_heads = keys.count("attention.head_count")?;
    let head_dim = keys.optional_count("attention.key_length")?.unwrap_or(hidden_size / num_heads);
    keys.expect("attention.value_length", head_dim)?;
    keys.expect("rope.dimension_count", head_dim)?;
    let num_layers = layer_count(&keys.name("block_count"), keys.count("block_count")?)?;
    let has = |tensor: &str| {
        names::to_gguf(tensor).is_some_and(|name| header.tensors.contains_key(&name))
    };
    let epsilon = "attention.layer_norm_rms_epsilon";
    let config = ModelConfig {
        architecture,
        vocab_size: vocab_size(header)?,
        hidden_size,
        intermediate_size: keys.count("feed_forward_length")?,
        num_layers,
        num_heads,
        num_kv_heads: keys.optional_count("attention.head_count_kv")?.unwrap_or(num_heads).max(1),
        head_dim,
        rms_norm_eps: keys.positive(epsilon)?.ok_or_else(|| missing(&keys.name(epsilon)))?,
        rope: rope(&keys, weights, head_dim)?,
        tie_word_embeddings: !has("lm_head.weight"),
        qkv_bias: has("model.layers.0.self_attn.q_proj.bias"),
        o_bias: has("model.layers.0.self_attn.o_proj.bias"),
        mlp_bias: has("model.layers.0.mlp.gate_proj.bias"),
        qk_norm: architecture == Architecture::Qwen3,
        sliding_window: None,
        layer_window: vec![None; num_layers],
        max_position_embeddings: keys.count("context_length")?,
        bos_token_id: metadata.token_id("tokenizer.ggml.bos_token_id")?,
        eos_token_ids: end_tokens(metadata)?,
    };
    check_biases(&config)?;
    config.checked()
}

/// Biases come in the combinations that a `config.json` can say.
fn check_biases(config: &ModelConfig) -> Result<(), LoadError> {
    let (qkv, o, mlp) = (config.qkv_bias, config.o_bias, config.mlp_bias);
    let fits = match config.architecture {
        Architecture::Llama => qkv == o,
        Architecture::Qwen2 => qkv && !o && !mlp,
        Architecture::Qwen3 => qkv == o && !mlp,
        Architecture::Mistral => !qkv && !o && !mlp,
    };
    if fits {
        return Ok(());
    }
    let family = config.architecture.class_name();
    let found = format!("q/k/v {qkv}, output {o}, feed-forward {mlp}");
    Err(LoadError::unsupported("set of biases", found, format!("what {family} has")))
}

pub(super) fn vocab_size(header: &Header) -> Result<usize, LoadError> {
    let embedding = header.tensors.get("token_embd.weight");
    let rows = embedding.and_then(|info| info.shape.first().copied()).filter(|rows| *rows > 0);
    rows.ok_or_else(|| LoadError::tensor("token_embd.weight", "is missing from the GGUF file"))
}

/// The end of a text and the end of a turn.
pub(super) fn end_tokens(metadata: &Metadata) -> Result<Vec<u32>, LoadError> {
    let mut ids = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        ids.extend(metadata.token_id(key)?.filter(|id| !ids.contains(id)));
    }
    Ok(ids)
}

fn rope(keys: &Keys, weights: &Weights, head_dim: usize) -> Result<RopeConfig, LoadError> {
    let theta = keys.positive("rope.freq_base")?.unwrap_or(10_000.0);
    let factors = weights::rope_factors(weights)?;
    let kind = keys.metadata.text(&keys.name("rope.scaling.type"))?.unwrap_or("none");
    let factor_key = "rope.scaling.factor";
    // Before there was a type, a factor alone meant linear scaling.
    let old = keys.positive("rope.scale_linear")?.filter(|factor| *factor != 1.0);
    let scaling = match (kind, factors) {
        ("none", Some(factors)) => llama3(&factors, theta, head_dim)?,
        ("none", None) => old.map_or(RopeScaling::None, |factor| RopeScaling::Linear { factor }),
        (other, Some(_)) => {
            let what = format!("{} beside rope scaling", weights::ROPE_FACTORS);
            return Err(LoadError::unsupported(what, other, "none"));
        }
        (kind, None) => {
            let factor = keys.positive(factor_key)?;
            let factor = factor.ok_or_else(|| missing(&keys.name(factor_key)))?;
            match kind {
                "linear" => RopeScaling::Linear { factor },
                "yarn" => RopeScaling::Yarn(yarn(keys, factor)?),
                other => {
                    let supported = "none, linear, yarn";
                    return Err(LoadError::unsupported("rope scaling", other, supported));
                }
            }
        }
    };
    Ok(RopeConfig { theta, scaling })
}

fn yarn(keys: &Keys, factor: f64) -> Result<Yarn, LoadError> {
    for key in ["attn_factor", "yarn_ext_factor", "yarn_attn_factor", "yarn_log_multiplier"] {
        let key = format!("rope.scaling.{key}");
        if let Some(value) = keys.positive(&key)?.filter(|value| *value != 1.0) {
            return Err(LoadError::unsupported(keys.name(&key), value.to_string(), "1"));
        }
    }
    Ok(Yarn {
        factor,
        original_max_position: keys.optional_count("rope.scaling.original_context_length")?,
        beta_fast: keys.positive("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
        beta_slow: keys.positive("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
        attention_factor: None,
        mscale: None,
        mscale_all_dim: None,
        truncate: true,
    })
}

/// Finds Llama 3's scaling again in the factors that the converter made of it. Of its four
/// parameters all released models share three; the fourth is the factor of the longest wavelength.
fn llama3(factors: &[f64], theta: f64, head_dim: usize) -> Result<RopeScaling, LoadError> {
    let scaling = RopeScaling::Llama3 {
        factor: factors.last().copied().unwrap_or(1.0),
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position: 8192,
    };
    let plain = RopeConfig { theta, scaling: RopeScaling::None };
    let (plain, _) = plain.frequencies(head_dim, 0);
    let agrees = |(frequency, factor): (&f64, &f64)| {
        (scaling.llama3_ratio(*frequency) * factor - 1.0).abs() < 1e-3
    };
    if plain.len() == factors.len() && plain.iter().zip(factors).all(agrees) {
        return Ok(scaling);
    }
    Err(LoadError::unsupported(
        "set of rotary factors",
        weights::ROPE_FACTORS,
        "those of Llama 3.1 and later (low 1, high 4, original length 8192)",
    ))
}
