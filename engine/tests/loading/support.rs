//! Directories to load from, and what must hold of everything loaded.

use onpolicy_engine::model::loading::{Checkpoint, load};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};
use tch::{Kind, Tensor};
use tempfile::TempDir;

pub fn golden_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden")
}

pub fn golden(name: &str) -> PathBuf {
    golden_root().join("tiny").join(name)
}

/// The quick-start model.
pub fn smollm2() -> PathBuf {
    let cache = std::env::var_os("ONPOLICY_CACHE").map(PathBuf::from);
    let home = || Path::new(&std::env::var_os("HOME").unwrap_or_default()).join(".cache/onpolicy");
    let dir = cache.unwrap_or_else(home).join("models/SmolLM2-135M-Instruct");
    let path = dir.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is not there; run scripts/setup", path.display());
    path
}

pub fn spec(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn load_dir(path: &Path) -> Checkpoint {
    load(spec(path)).unwrap()
}

pub fn refusal(path: &Path) -> String {
    load(spec(path)).unwrap_err().to_string()
}

pub fn ids(list: &Value) -> Vec<u32> {
    list.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// A copy of a checkpoint, to be damaged.
pub fn copy(from: &Path) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    dir
}

/// Writes a checkpoint in Hugging Face's form.
pub fn save(checkpoint: &Checkpoint, dir: &Path) {
    for (name, text) in checkpoint.source.files() {
        fs::write(dir.join(name), text).unwrap();
    }
    Tensor::write_safetensors(&checkpoint.tensors, dir.join("model.safetensors")).unwrap();
}

/// Splits the weights of `dir` into two files and an index; returns them.
pub fn shard(dir: &Path) -> Vec<(String, Tensor)> {
    let single = dir.join("model.safetensors");
    let whole = Tensor::read_safetensors(&single).unwrap();
    fs::remove_file(single).unwrap();
    let mut map = BTreeMap::new();
    for (number, part) in whole.chunks(whole.len() / 2 + 1).enumerate() {
        let file = format!("model-{}.safetensors", number + 1);
        Tensor::write_safetensors(part, dir.join(&file)).unwrap();
        map.extend(part.iter().map(|(name, _)| (name.clone(), file.clone())));
    }
    assert!(dir.join("model-2.safetensors").exists());
    let index = json!({ "metadata": {}, "weight_map": map });
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    whole
}

pub fn remove(dir: &Path, file: &str) {
    fs::remove_file(dir.join(file)).unwrap();
}

pub fn write(dir: &Path, file: &str, bytes: &[u8]) {
    fs::write(dir.join(file), bytes).unwrap();
}

pub fn truncate(dir: &Path, file: &str, length: u64) {
    let file = fs::OpenOptions::new().write(true).open(dir.join(file)).unwrap();
    file.set_len(length).unwrap();
}

/// Sets one key of `config.json`.
pub fn set(dir: &Path, key: &str, value: Value) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config[key] = value;
    fs::write(path, config.to_string()).unwrap();
}

/// Names, order, shapes, type and layout are what the configuration asks for.
pub fn assert_well_formed(loaded: &Checkpoint) {
    let found: Vec<(String, Vec<i64>)> =
        loaded.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.size())).collect();
    assert_eq!(found, loaded.config.tensor_shapes());
    for (name, tensor) in &loaded.tensors {
        assert_eq!(tensor.kind(), Kind::Float, "{name}");
        assert!(tensor.is_contiguous() && tensor.device() == tch::Device::Cpu, "{name}");
        assert_eq!(i32::try_from(tensor.isfinite().all()).unwrap(), 1, "{name}");
    }
}

/// The same tensors, bit for bit, in whatever order.
pub fn assert_same(found: &[(String, Tensor)], expected: &[(String, Tensor)]) {
    assert_eq!(found.len(), expected.len());
    let expected: BTreeMap<&str, &Tensor> = expected.iter().map(|(n, t)| (n.as_str(), t)).collect();
    for (name, tensor) in found {
        assert!(tensor.equal(expected[name.as_str()]), "{name} differs");
    }
}
