//! The shape of a model: what `config.json` says, checked and completed.

mod keys;
mod rope;

pub use rope::{RopeConfig, RopeScaling, Yarn};

use crate::model::loading::LoadError;
use keys::Keys;
use serde_json::{Map, Value, json};

/// Many more layers than any model has.
const MAX_LAYERS: usize = 4096;

/// The decoder families that this engine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama and what is built like it.
    Llama,
    /// Qwen2 and Qwen2.5: bias on q, k and v.
    Qwen2,
    /// Qwen3: norm on q and k.
    Qwen3,
    /// Mistral: sliding window.
    Mistral,
}

impl Architecture {
    const ALL: [Self; 4] = [Self::Llama, Self::Qwen2, Self::Qwen3, Self::Mistral];

    /// The class name in `architectures`.
    pub fn class_name(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
            Self::Mistral => "MistralForCausalLM",
        }
    }

    /// The value of `model_type`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Mistral => "mistral",
        }
    }

    fn from_keys(keys: Keys) -> Result<Self, LoadError> {
        let find = |what: &str, found: &str, name: fn(Self) -> &'static str| {
            let known = Self::ALL.iter().copied();
            let supported = || known.clone().map(name).collect::<Vec<_>>().join(", ");
            let error = || LoadError::unsupported(what, found, supported());
            known.clone().find(|a| name(*a) == found).ok_or_else(error)
        };
        let class = keys.get("architectures").and_then(|list| list.get(0));
        match (class.and_then(Value::as_str), keys.text("model_type")?) {
            (Some(class), _) => find("architecture", class, Self::class_name),
            (None, Some(model_type)) => find("model_type", model_type, Self::model_type),
            (None, None) => {
                Err(LoadError::config("architectures", "is missing, and so is model_type"))
            }
        }
    }
}

/// Everything the decoder needs to know before it sees a tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Epsilon of every RMS norm.
    pub rms_norm_eps: f64,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// Bias on the q, k and v projections.
    pub qkv_bias: bool,
    /// Bias on the output projection of attention.
    pub o_bias: bool,
    /// Bias on the feed-forward projections.
    pub mlp_bias: bool,
    /// RMS norm on each head of q and k.
    pub qk_norm: bool,
    /// Width of the sliding window, if any layer has one: position p sees p - w + 1 ..= p.
    pub sliding_window: Option<usize>,
    /// The window of each layer.
    pub layer_window: Vec<Option<usize>>,
    /// Longest sequence, in tokens.
    pub max_position_embeddings: usize,
    /// Token that begins a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end one; all below `vocab_size`.
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Reads a `config.json`; end tokens come from `generation_config.json` where it has them.
    ///
    /// # Errors
    /// The model needs something that this engine does not do, or a key is missing or wrong.
    pub fn from_hf(config: &Value, generation: Option<&Value>) -> Result<Self, LoadError> {
        let keys = Keys(config);
        let architecture = Architecture::from_keys(keys)?;
        refuse_unsupported(keys)?;
        let num_layers = layer_count("num_hidden_layers", keys.count("num_hidden_layers")?)?;
        let layer_window = windows(architecture, keys, num_layers)?;
        let bias = keys.flag("attention_bias")?.unwrap_or(false)
            && matches!(architecture, Architecture::Llama | Architecture::Qwen3);
        let hidden_size = keys.count("hidden_size")?;
        let num_heads = keys.count("num_attention_heads")?;
        let built = Self {
            architecture,
            vocab_size: keys.count("vocab_size")?,
            hidden_size,
            intermediate_size: keys.count("intermediate_size")?,
            num_layers,
            num_heads,
            num_kv_heads: kv_heads(architecture, keys, num_heads)?,
            head_dim: head_dim(keys, hidden_size, num_heads)?,
            rms_norm_eps: keys.positive("rms_norm_eps")?,
            rope: RopeConfig::from_keys(keys)?,
            tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: bias || architecture == Architecture::Qwen2,
            o_bias: bias,
            mlp_bias: architecture == Architecture::Llama
                && keys.flag("mlp_bias")?.unwrap_or(false),
            qk_norm: architecture == Architecture::Qwen3,
            sliding_window: layer_window.iter().copied().flatten().next(),
            layer_window,
            max_position_embeddings: keys.count("max_position_embeddings")?,
            bos_token_id: keys.token_ids("bos_token_id")?.and_then(|ids| ids.first().copied()),
            eos_token_ids: eos_tokens(keys, generation)?,
        };
        built.checked()
    }

    /// Checks how the numbers fit together, and drops end tokens that the model cannot produce.
    pub(in crate::model) fn checked(mut self) -> Result<Self, LoadError> {
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            let reason = format!("must divide num_attention_heads, which is {}", self.num_heads);
            return Err(LoadError::config("num_key_value_heads", reason));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            return Err(LoadError::config("head_dim", "must be even, and not 0"));
        }
        let vocab_size = self.vocab_size;
        self.eos_token_ids.retain(|&id| {
            let known = (id as usize) < vocab_size;
            if !known {
                tracing::warn!(id, vocab_size, "end token is not in the vocabulary; left out");
            }
            known
        });
        Ok(self)
    }

    /// A `config.json` that transformers loads (weights in f32).
    pub fn to_hf(&self) -> Value {
        let (rope_theta, rope_scaling) = self.rope.to_hf();
        let eos = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            several => json!(several),
        };
        let mut config = json!({
            "architectures": [self.architecture.class_name()],
            "model_type": self.architecture.model_type(),
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": rope_theta,
            "rope_scaling": rope_scaling,
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": self.max_position_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "torch_dtype": "float32",
        });
        if let Some(keys) = config.as_object_mut() {
            self.add_family_keys(keys);
        }
        config
    }

    fn add_family_keys(&self, keys: &mut Map<String, Value>) {
        let mut add = |key: &str, value: Value| keys.insert(key.into(), value);
        match self.architecture {
            Architecture::Llama => {
                add("attention_bias", json!(self.qkv_bias));
                add("mlp_bias", json!(self.mlp_bias));
            }
            Architecture::Mistral => {
                add("sliding_window", json!(self.sliding_window));
            }
            Architecture::Qwen2 | Architecture::Qwen3 => {
                let kind = |window: &Option<usize>| match window {
                    Some(_) => "sliding_attention",
                    None => "full_attention",
                };
                let layers: Vec<&str> = self.layer_window.iter().map(kind).collect();
                let full = self.layer_window.iter().take_while(|window| window.is_none()).count();
                add("use_sliding_window", json!(self.sliding_window.is_some()));
                add("sliding_window", json!(self.sliding_window));
                add("max_window_layers", json!(full));
                add("layer_types", json!(layers));
                if self.architecture == Architecture::Qwen3 {
                    add("attention_bias", json!(self.o_bias));
                }
            }
        }
    }

    /// Name and shape of every tensor of the decoder, with Hugging Face's names, in the order in
    /// which a token meets them. `lm_head.weight` is there only if it is not the embedding.
    pub fn tensor_shapes(&self) -> Vec<(String, Vec<i64>)> {
        let embedding = vec![self.vocab_size as i64, self.hidden_size as i64];
        let mut shapes = vec![("model.embed_tokens.weight".to_string(), embedding.clone())];
        let layer = self.layer_shapes();
        for i in 0..self.num_layers {
            let named = |(name, shape): &(String, Vec<i64>)| {
                (format!("model.layers.{i}.{name}"), shape.clone())
            };
            shapes.extend(layer.iter().map(named));
        }
        shapes.push(("model.norm.weight".to_string(), vec![self.hidden_size as i64]));
        if !self.tie_word_embeddings {
            shapes.push(("lm_head.weight".to_string(), embedding));
        }
        shapes
    }

    /// Name (below `model.layers.N.`) and shape of the tensors of one layer.
    fn layer_shapes(&self) -> Vec<(String, Vec<i64>)> {
        let hidden = self.hidden_size as i64;
        let inner = self.intermediate_size as i64;
        let head = self.head_dim as i64;
        let (q, kv) = (self.num_heads as i64 * head, self.num_kv_heads as i64 * head);
        let norm = |name: &str, width: i64| (format!("{name}.weight"), vec![width]);
        let linear = |name: &str, bias: bool, rows: i64, columns: i64| {
            let bias = bias.then(|| (format!("{name}.bias"), vec![rows]));
            std::iter::once((format!("{name}.weight"), vec![rows, columns])).chain(bias)
        };
        let mut shapes = vec![norm("input_layernorm", hidden)];
        shapes.extend(linear("self_attn.q_proj", self.qkv_bias, q, hidden));
        shapes.extend(linear("self_attn.k_proj", self.qkv_bias, kv, hidden));
        shapes.extend(linear("self_attn.v_proj", self.qkv_bias, kv, hidden));
        if self.qk_norm {
            shapes.extend([norm("self_attn.q_norm", head), norm("self_attn.k_norm", head)]);
        }
        shapes.extend(linear("self_attn.o_proj", self.o_bias, hidden, q));
        shapes.push(norm("post_attention_layernorm", hidden));
        shapes.extend(linear("mlp.gate_proj", self.mlp_bias, inner, hidden));
        shapes.extend(linear("mlp.up_proj", self.mlp_bias, inner, hidden));
        shapes.extend(linear("mlp.down_proj", self.mlp_bias, hidden, inner));
        shapes
    }

    /// Number of weights; a tied head counts once.
    pub fn parameter_count(&self) -> usize {
        let elements = |shape: &[i64]| shape.iter().product::<i64>() as usize;
        self.tensor_shapes().iter().map(|(_, shape)| elements(shape)).sum()
    }
}

/// Refuses a number of layers that no model has, before lists of that length are made.
pub(in crate::model) fn layer_count(key: &str, layers: usize) -> Result<usize, LoadError> {
    let fits = layers <= MAX_LAYERS;
    fits.then_some(layers).ok_or_else(|| LoadError::config(key, "must be at most 4096"))
}

/// Refuses what would change the computation and is not computed here.
fn refuse_unsupported(keys: Keys) -> Result<(), LoadError> {
    match keys.text("hidden_act")? {
        None | Some("silu" | "swish") => {}
        Some(other) => return Err(LoadError::unsupported("hidden_act", other, "silu")),
    }
    if let Some(quantisation) = keys.get("quantization_config") {
        let method = quantisation.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
        return Err(LoadError::unsupported(
            "quantised checkpoint of method",
            method,
            "safetensors in bf16, f16 or f32, and GGUF",
        ));
    }
    Ok(())
}

fn kv_heads(family: Architecture, keys: Keys, num_heads: usize) -> Result<usize, LoadError> {
    // Only Llama's default is the number of heads; the others' is a number that fits one size.
    if family == Architecture::Llama || keys.has("num_key_value_heads") {
        Ok(keys.optional_count("num_key_value_heads")?.unwrap_or(num_heads))
    } else {
        keys.count("num_key_value_heads")
    }
}

fn head_dim(keys: Keys, hidden_size: usize, num_heads: usize) -> Result<usize, LoadError> {
    match keys.optional_count("head_dim")? {
        Some(given) => Ok(given),
        None if hidden_size.is_multiple_of(num_heads) => Ok(hidden_size / num_heads),
        None => {
            let reason = format!("is not given, and {num_heads} heads do not divide {hidden_size}");
            Err(LoadError::config("head_dim", reason))
        }
    }
}

/// The sliding window of each layer, with transformers' defaults.
fn windows(
    family: Architecture,
    keys: Keys,
    num_layers: usize,
) -> Result<Vec<Option<usize>>, LoadError> {
    let width = match keys.has("sliding_window") {
        true => keys.optional_count("sliding_window")?,
        false => Some(4096),
    };
    match family {
        Architecture::Llama => Ok(vec![None; num_layers]),
        Architecture::Mistral => Ok(vec![width; num_layers]),
        Architecture::Qwen2 | Architecture::Qwen3 => {
            let width = width.filter(|_| keys.0["use_sliding_window"] == true);
            let sliding = sliding_layers(keys, num_layers)?;
            Ok(sliding.into_iter().map(|slides| width.filter(|_| slides)).collect())
        }
    }
}

/// Which layers slide in a model that has a window: `layer_types`, or from `max_window_layers` on.
fn sliding_layers(keys: Keys, num_layers: usize) -> Result<Vec<bool>, LoadError> {
    let Some(types) = keys.get("layer_types") else {
        let full = keys.get("max_window_layers").and_then(Value::as_u64).unwrap_or(28) as usize;
        return Ok((0..num_layers).map(|layer| layer >= full).collect());
    };
    let types = types.as_array().map(Vec::as_slice).unwrap_or_default();
    if types.len() != num_layers {
        return Err(LoadError::config("layer_types", format!("must list {num_layers} layers")));
    }
    let slides = |kind: &Value| match kind.as_str() {
        Some("sliding_attention") => Ok(true),
        Some("full_attention") => Ok(false),
        _ => Err(LoadError::unsupported(
            "layer type",
            kind.to_string(),
            "full_attention, sliding_attention",
        )),
    };
    types.iter().map(slides).collect()
}

fn eos_tokens(keys: Keys, generation: Option<&Value>) -> Result<Vec<u32>, LoadError> {
    let chosen = match generation {
        Some(generation) => Keys(generation).token_ids("eos_token_id")?,
        None => None,
    };
    match chosen {
        Some(ids) => Ok(ids),
        None => Ok(keys.token_ids("eos_token_id")?.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests;
