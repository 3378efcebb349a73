//! Golden checkpoints and values, shared by the tests.
#![allow(dead_code)] // each test binary uses its part

use onpolicy_engine::{
    device::Placement,
    engine::{EngineConfig, EngineHandle, Model},
    model::loading::{Checkpoint, load, load_to},
    weights::Weights,
};
use serde_json::Value;
use std::path::{Path, PathBuf};
use tch::{Device, Kind};

/// The tiny checkpoints.
pub const TINY: [&str; 6] =
    ["llama-tied", "llama3-rope", "mistral-window", "qwen2", "qwen2-tied", "qwen3"];

pub fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(path)
}

pub fn json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path);
    let text = text.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).expect("golden files are JSON")
}

pub fn tiny(name: &str) -> Checkpoint {
    load(golden("tiny").join(name).to_str().expect("UTF-8 path"))
        .expect("a golden checkpoint loads")
}

/// A tiny checkpoint whose tensors are of this type.
pub fn tiny_in(name: &str, kind: Kind) -> Checkpoint {
    let placement = Placement { device: Device::Cpu, kind };
    let path = golden("tiny").join(name);
    load_to(path.to_str().expect("UTF-8 path"), placement).expect("a golden checkpoint loads")
}

/// The real model; `scripts/setup` fetches it.
pub fn smollm2() -> Checkpoint {
    let cache = std::env::var("ONPOLICY_CACHE").map(PathBuf::from).unwrap_or_else(|_| {
        Path::new(&std::env::var("HOME").expect("HOME is set")).join(".cache/onpolicy")
    });
    let path = cache.join("models/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is missing: run scripts/setup", path.display());
    load(path.to_str().expect("UTF-8 path")).expect("the real model loads")
}

/// An engine over a checkpoint's tensors.
pub fn engine(checkpoint: &Checkpoint, config: EngineConfig) -> EngineHandle {
    let weights = checkpoint.tensors.iter().map(|(n, t)| (n.clone(), t.shallow_clone()));
    let model = Model {
        name: checkpoint.name.clone(),
        config: checkpoint.config.clone(),
        weights: Weights::new(weights.collect()),
        tokenizer: Some(checkpoint.tokenizer.clone()),
    };
    EngineHandle::start(model, config).expect("the engine starts")
}

pub fn floats(value: &Value) -> Vec<f32> {
    let list = value.as_array().expect("a list");
    list.iter().map(|x| x.as_f64().expect("a number") as f32).collect()
}

pub fn ids(value: &Value) -> Vec<u32> {
    let list = value.as_array().expect("a list");
    list.iter().map(|x| x.as_u64().expect("an id") as u32).collect()
}

#[track_caller]
pub fn assert_close(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= tolerance, "{what}[{index}]: {got}, not {want}");
    }
}
