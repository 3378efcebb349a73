//! Weight directories, whole and damaged.

use crate::common::tiny;
use onpolicy_engine::model::loading::{Checkpoint, load};
use serde_json::{Value, json};
use std::{collections::BTreeMap, fs, path::Path};
use tch::{Kind, Tensor};
use tempfile::TempDir;

pub type Tensors = Vec<(String, Tensor)>;

/// The checkpoint with all weights multiplied by `factor`.
pub fn scaled(name: &str, factor: f64) -> Checkpoint {
    let checkpoint = tiny(name);
    for (_, tensor) in &checkpoint.tensors {
        let _ = tensor.shallow_clone().g_mul_scalar_(factor);
    }
    checkpoint
}

/// A directory with `tensors` and the other files of `like`.
pub fn directory(like: &Checkpoint, tensors: &Tensors) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (file, text) in like.source.files() {
        fs::write(dir.path().join(file), text).unwrap();
    }
    Tensor::write_safetensors(tensors, dir.path().join("model.safetensors")).unwrap();
    dir
}

pub fn saved(checkpoint: &Checkpoint, kind: Kind) -> TempDir {
    directory(checkpoint, &converted(checkpoint, kind))
}

pub fn converted(checkpoint: &Checkpoint, kind: Kind) -> Tensors {
    checkpoint.tensors.iter().map(|(name, t)| (name.clone(), t.to_kind(kind))).collect()
}

/// Splits the weights into two files and an index.
pub fn shard(dir: &Path) {
    let single = dir.join("model.safetensors");
    let whole = Tensor::read_safetensors(&single).unwrap();
    fs::remove_file(single).unwrap();
    let mut map = BTreeMap::new();
    for (number, part) in whole.chunks(whole.len() / 2 + 1).enumerate() {
        let file = format!("model-{number}.safetensors");
        Tensor::write_safetensors(part, dir.join(&file)).unwrap();
        map.extend(part.iter().map(|(name, _)| (name.clone(), file.clone())));
    }
    let index = json!({ "metadata": {}, "weight_map": map });
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// Sets one key of `config.json`.
pub fn set(dir: &Path, key: &str, value: Value) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config[key] = value;
    fs::write(path, config.to_string()).unwrap();
}

pub fn reload(dir: &Path) -> Checkpoint {
    load(dir.to_str().unwrap()).unwrap()
}
