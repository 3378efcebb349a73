//! Directories of Hugging Face's form.

use super::support::*;
use onpolicy_engine::model::{
    config::{Architecture, RopeScaling},
    loading::{LoadError, load},
};
use serde_json::{Value, json};
use std::{fs, path::Path};
use tch::{Kind, Tensor};

#[test]
fn golden_checkpoints_load() {
    let expected = [
        ("llama-tied", Architecture::Llama, 74_832),
        ("llama3-rope", Architecture::Llama, 82_512),
        ("mistral-window", Architecture::Mistral, 82_512),
        ("qwen2", Architecture::Qwen2, 82_752),
        ("qwen2-tied", Architecture::Qwen2, 75_072),
        ("qwen3", Architecture::Qwen3, 93_360),
    ];
    for (name, architecture, parameters) in expected {
        let loaded = load_dir(&golden(name));
        assert_eq!(loaded.name, name);
        assert_eq!(loaded.config.architecture, architecture);
        assert_eq!(loaded.config.parameter_count(), parameters, "{name}");
        assert_eq!(loaded.config.eos_token_ids, [2]);
        assert_eq!(loaded.config.bos_token_id, Some(1));
        assert_well_formed(&loaded);
        let file = Tensor::read_safetensors(golden(name).join("model.safetensors")).unwrap();
        assert_same(&loaded.tensors, &file);
        assert_eq!(loaded.tokenizer.encode("<s> t5 t159").unwrap(), [1, 5, 159]);
        let config: Value = serde_json::from_str(&loaded.source.config).unwrap();
        assert_eq!(config["architectures"][0], architecture.class_name());
    }
    let windows = load_dir(&golden("mistral-window")).config.layer_window;
    assert_eq!(windows, [Some(16); 3]);
    let scaling = load_dir(&golden("llama3-rope")).config.rope.scaling;
    let expected = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position: 64,
    };
    assert_eq!(scaling, expected);
}

/// Writes the weights of `dir` again, each passed through `change`; returns them.
fn rewrite(dir: &Path, change: impl Fn(Tensor) -> Tensor) -> Vec<(String, Tensor)> {
    let file = dir.join("model.safetensors");
    let tensors = Tensor::read_safetensors(&file).unwrap();
    let changed: Vec<(String, Tensor)> =
        tensors.into_iter().map(|(name, tensor)| (name, change(tensor))).collect();
    Tensor::write_safetensors(&changed, &file).unwrap();
    changed
}

#[test]
fn half_precision_is_widened() {
    for kind in [Kind::BFloat16, Kind::Half] {
        let dir = copy(&golden("qwen3"));
        let narrow = rewrite(dir.path(), |tensor| tensor.to_kind(kind));
        let widened: Vec<(String, Tensor)> =
            narrow.into_iter().map(|(name, tensor)| (name, tensor.to_kind(Kind::Float))).collect();
        let loaded = load_dir(dir.path());
        assert_well_formed(&loaded);
        assert_same(&loaded.tensors, &widened);
    }
}

#[test]
fn shards_are_joined() {
    let dir = copy(&golden("qwen2"));
    let whole = shard(dir.path());
    assert_same(&load_dir(dir.path()).tensors, &whole);

    fs::remove_file(dir.path().join("model-2.safetensors")).unwrap();
    assert!(matches!(load(spec(dir.path())), Err(LoadError::Io { .. })));
    let index = json!({ "weight_map": { "x": "../elsewhere" } }).to_string();
    write(dir.path(), "model.safetensors.index.json", index.as_bytes());
    assert!(refusal(dir.path()).contains("weight_map"), "no path leads out of the directory");
}

#[test]
fn known_extras_are_ignored_and_others_refused() {
    let dir = copy(&golden("llama-tied"));
    let file = dir.path().join("model.safetensors");
    let mut tensors = Tensor::read_safetensors(&file).unwrap();
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, tch::Device::Cpu));
    tensors.push(("lm_head.weight".to_string(), zeros(&[160, 48])));
    tensors.push(("model.layers.0.self_attn.rotary_emb.inv_freq".to_string(), zeros(&[4])));
    Tensor::write_safetensors(&tensors, &file).unwrap();
    assert_well_formed(&load_dir(dir.path()));
    tensors.push(("model.layers.0.self_attn.q_proj.bias".to_string(), zeros(&[48])));
    Tensor::write_safetensors(&tensors, &file).unwrap();
    let message = refusal(dir.path());
    assert!(message.contains("q_proj.bias") && message.contains("no such tensor"), "{message}");
}

/// Damages a copied directory.
type Damage = fn(&Path);

#[test]
fn damaged_directories_are_refused() {
    let weights = "model.safetensors";
    let cases: [(Damage, &str); 13] = [
        (|d| remove(d, "model.safetensors"), "neither model.safetensors nor"),
        (|d| remove(d, "tokenizer.json"), "has no tokenizer.json"),
        (|d| remove(d, "config.json"), "neither config.json nor a .gguf"),
        (|d| write(d, "config.json", b"{"), "config.json: EOF"),
        (|d| write(d, "generation_config.json", b"["), "generation_config.json: EOF"),
        (|d| write(d, "tokenizer.json", b"{}"), "tokenizer: "),
        (|d| truncate(d, "model.safetensors", 100_000), "may be cut off"),
        (|d| truncate(d, "model.safetensors", 100), "cut off in its header"),
        (|d| truncate(d, "model.safetensors", 3), "too short"),
        (|d| write(d, "model.safetensors", &[0xFF; 64]), "cut off in its header"),
        (|d| write(d, "model.safetensors", b"\x02\0\0\0\0\0\0\0{]"), "no valid safetensors header"),
        (|d| set(d, "num_hidden_layers", json!(4)), "(and so are 8 others)"),
        (|d| set(d, "intermediate_size", json!(96)), "[112, 48], but the configuration asks for"),
    ];
    for (damage, expected) in cases {
        let dir = copy(&golden("llama-tied"));
        damage(dir.path());
        let message = refusal(dir.path());
        assert!(message.contains(expected), "{message:?} lacks {expected:?}");
    }
    let dir = copy(&golden("llama-tied"));
    remove(dir.path(), weights);
    write(dir.path(), "pytorch_model.bin", b"");
    assert!(refusal(dir.path()).contains("save_pretrained"));
}

#[test]
fn unsupported_models_are_refused() {
    let cases: [(&str, Value, &str); 3] = [
        ("architectures", json!(["GPT2LMHeadModel"]), "architecture 'GPT2LMHeadModel' is not"),
        ("rope_scaling", json!({ "rope_type": "dynamic", "factor": 2.0 }), "rope type 'dynamic'"),
        ("hidden_act", json!("relu"), "hidden_act 'relu'"),
    ];
    for (key, value, expected) in cases {
        let dir = copy(&golden("llama-tied"));
        set(dir.path(), key, value);
        let message = refusal(dir.path());
        assert!(message.contains(expected), "{message:?} lacks {expected:?}");
    }
    let dir = copy(&golden("llama-tied"));
    rewrite(dir.path(), |tensor| tensor.to_kind(Kind::Int8));
    let message = refusal(dir.path());
    assert!(message.contains("'I8' is not supported; supported: F32, F16, BF16"), "{message}");
}

#[test]
fn names_that_are_nothing_are_refused() {
    for spec in ["/no/such/model", "nothing", "a/b/c", "../x", ""] {
        let error = load(spec).unwrap_err();
        assert!(matches!(error, LoadError::NotFound { .. }), "{spec}: {error}");
    }
    let message = refusal(&golden("qwen2").join("model.safetensors"));
    assert!(message.contains("the directory that holds config.json"), "{message}");
}
