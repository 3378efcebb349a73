//! Writes GGUF files, from the golden checkpoints or piece by piece.

use super::support::*;
use candle_core::{
    Device,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value},
    },
};
use onpolicy_engine::model::{
    config::ModelConfig,
    loading::{Checkpoint, load},
};
use std::{collections::BTreeMap, fs};
use tch::Tensor;

/// A GGUF file in the making.
pub struct File {
    pub values: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, QTensor>,
}

impl File {
    pub fn set(&mut self, key: &str, value: Value) -> &mut Self {
        self.values.insert(key.to_string(), value);
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let values: Vec<(&str, &Value)> =
            self.values.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let tensors: Vec<(&str, &QTensor)> =
            self.tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let mut out = std::io::Cursor::new(Vec::new());
        gguf_file::write(&mut out, &values, &tensors).unwrap();
        out.into_inner()
    }

    pub fn load(&self) -> Result<Checkpoint, String> {
        load_bytes(&self.bytes())
    }
}

pub fn load_bytes(bytes: &[u8]) -> Result<Checkpoint, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    fs::write(&path, bytes).unwrap();
    load(spec(&path)).map_err(|error| error.to_string())
}

pub fn texts<'a>(items: impl IntoIterator<Item = &'a str>) -> Value {
    Value::Array(items.into_iter().map(|text| Value::String(text.to_string())).collect())
}

/// As many tokens as the golden checkpoints have: three special ones, letters, two merges.
fn vocabulary(file: &mut File) {
    let letters = (0x21..0x7F).chain(0xA1..0xAD).chain(0xAE..0x100).filter_map(char::from_u32);
    let letters: Vec<String> = letters.map(String::from).collect();
    let fixed = ["<unk>", "<s>", "</s>", "Ġ", "ab", "Ġab"];
    let tokens = fixed.into_iter().chain(letters.iter().map(String::as_str)).take(160);
    let types = (0..160).map(|id| Value::I32(if id < 3 { 3 } else { 1 })).collect();
    file.set("tokenizer.ggml.model", Value::String("gpt2".into()))
        .set("tokenizer.ggml.pre", Value::String("gpt-2".into()))
        .set("tokenizer.ggml.tokens", texts(tokens))
        .set("tokenizer.ggml.token_type", Value::Array(types))
        .set("tokenizer.ggml.merges", texts(["a b", "Ġ ab"]))
        .set("tokenizer.ggml.bos_token_id", Value::U32(1))
        .set("tokenizer.ggml.eos_token_id", Value::U32(2));
}

/// A golden checkpoint as llama.cpp's converter would write it.
pub fn converted(name: &str) -> (File, Checkpoint) {
    let loaded = load_dir(&golden(name));
    let config = &loaded.config;
    let family = config.architecture.model_type();
    let mut file = File { values: BTreeMap::new(), tensors: BTreeMap::new() };
    file.set("general.architecture", Value::String(family.into()));
    let numbers = [
        ("block_count", config.num_layers),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_heads),
        ("attention.head_count_kv", config.num_kv_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
    ];
    for (key, number) in numbers {
        file.set(&format!("{family}.{key}"), Value::U32(number as u32));
    }
    file.set(&format!("{family}.rope.freq_base"), Value::F32(config.rope.theta as f32));
    let epsilon = Value::F32(config.rms_norm_eps as f32);
    file.set(&format!("{family}.attention.layer_norm_rms_epsilon"), epsilon);
    vocabulary(&mut file);
    for (name, tensor) in &loaded.tensors {
        let stored = interleaved(config, name, tensor);
        file.tensors.insert(gguf_name(name), quantise(&stored, GgmlDType::F32));
    }
    (file, loaded)
}

/// llama.cpp keeps the two rotary halves of each head side by side, for Llama only.
pub fn interleaved(config: &ModelConfig, name: &str, tensor: &Tensor) -> Tensor {
    let heads = match name {
        _ if config.architecture.model_type() != "llama" => return tensor.copy(),
        name if name.contains("q_proj") => config.num_heads,
        name if name.contains("k_proj") => config.num_kv_heads,
        _ => return tensor.copy(),
    };
    let half = config.head_dim as i64 / 2;
    let split = tensor.view([heads as i64, 2, half, -1]).transpose(1, 2);
    split.contiguous().view(tensor.size().as_slice())
}

pub fn quantise(tensor: &Tensor, dtype: GgmlDType) -> QTensor {
    let shape: Vec<usize> = tensor.size().iter().map(|&n| n as usize).collect();
    let values: Vec<f32> = tensor.reshape([-1]).try_into().unwrap();
    let values = candle_core::Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
    QTensor::quantize(&values, dtype).unwrap()
}

pub fn gguf_name(name: &str) -> String {
    let parts = [
        ("model.layers.", "blk."),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    parts.iter().fold(name.to_string(), |name, (theirs, ours)| name.replace(theirs, ours))
}
