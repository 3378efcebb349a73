//! Checkpoints: a Hugging Face directory, and beside it what a run needs to go on exactly.
//!
//! `checkpoint-000012/` holds `model.safetensors`, `config.json` and the tokenizer's files, and in
//! `trainer/` the optimizer's moments, `state.json`, and `rollouts.json` with what is drawn and not
//! yet trained on. It is written under another name and
//! renamed when whole, so a killed run never leaves half a checkpoint.

use crate::{error::TrainError, optimizer::Optimizer, queue::Drawn};
use onpolicy_engine::{
    device::{self, Placement},
    model::loading::Source,
    torch::slices::bytes,
    weights::Weights,
};
use safetensors::{Dtype, View};
use serde::{Deserialize, Serialize};
use std::{
    borrow::Cow,
    collections::{HashMap, VecDeque},
    fs::{self, File},
    path::{Path, PathBuf},
};
use tch::{Kind, Tensor};

const PREFIX: &str = "checkpoint-";
const ROLLOUTS: &str = "rollouts.json";

/// Where a run stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Steps done.
    pub step: u64,
    /// Version of the weights.
    pub weight_version: u64,
    /// Steps of the optimizer.
    pub optimizer_steps: u64,
    /// Seconds of training so far.
    pub seconds: f64,
}

/// What a checkpoint is made from.
pub struct Snapshot<'a> {
    /// The files of the model that training started from.
    pub source: &'a Source,
    /// The policy.
    pub weights: &'a Weights,
    /// Its moments.
    pub optimizer: &'a Optimizer,
    /// Rollouts of the next steps that are drawn already.
    pub drawn: &'a VecDeque<Drawn>,
    /// Where the run stands.
    pub state: TrainState,
}

impl Snapshot<'_> {
    /// Writes the checkpoint of this step under `run` and returns its directory.
    ///
    /// # Errors
    /// What the file system refuses; an older checkpoint is never damaged.
    pub fn save(&self, run: &Path) -> Result<PathBuf, TrainError> {
        let name = format!("{PREFIX}{:06}", self.state.step);
        let (dir, partial) = (run.join(&name), run.join(format!(".{name}.partial")));
        if partial.exists() {
            fs::remove_dir_all(&partial).map_err(|e| TrainError::file(&partial, e))?;
        }
        let trainer = partial.join("trainer");
        fs::create_dir_all(&trainer).map_err(|e| TrainError::file(&trainer, e))?;
        save_weights(self.weights, &partial.join("model.safetensors"))?;
        save_source(self.source, self.weights, &partial)?;
        self.optimizer.save(&trainer.join("optimizer.safetensors"))?;
        let state = serde_json::to_vec_pretty(&self.state);
        let state = state.map_err(|e| TrainError::file(&trainer, e))?;
        write(&trainer.join("state.json"), &state)?;
        let drawn = serde_json::to_vec(self.drawn).map_err(|e| TrainError::file(&trainer, e))?;
        write(&trainer.join(ROLLOUTS), &drawn)?;
        if dir.exists() {
            fs::remove_dir_all(&dir).map_err(|e| TrainError::file(&dir, e))?;
        }
        sync(&trainer.join("optimizer.safetensors"))?;
        sync(&partial.join("model.safetensors"))?;
        fs::rename(&partial, &dir).map_err(|e| TrainError::file(&dir, e))?;
        sync(run)?;
        Ok(dir)
    }
}

/// The newest checkpoint under `run`, if there is one.
pub fn latest(run: &Path) -> Option<PathBuf> {
    all(run).pop()
}

/// Removes all but the newest `keep` checkpoints under `run`.
///
/// # Errors
/// What the file system refuses.
pub fn prune(run: &Path, keep: usize) -> Result<(), TrainError> {
    let all = all(run);
    let old = &all[..all.len().saturating_sub(keep)];
    old.iter().try_for_each(|dir| fs::remove_dir_all(dir).map_err(|e| TrainError::file(dir, e)))
}

/// The state in a checkpoint's directory.
///
/// # Errors
/// A directory that is no checkpoint of a run.
pub fn state(dir: &Path) -> Result<TrainState, TrainError> {
    let path = dir.join("trainer/state.json");
    let text = fs::read(&path).map_err(|e| TrainError::file(&path, e))?;
    serde_json::from_slice(&text).map_err(|e| TrainError::file(&path, e))
}

/// Rollouts in a checkpoint's directory that are not trained on yet, oldest first.
///
/// # Errors
/// A file that is missing or damaged.
pub fn drawn(dir: &Path) -> Result<VecDeque<Drawn>, TrainError> {
    let path = dir.join("trainer").join(ROLLOUTS);
    let text = fs::read(&path).map_err(|e| TrainError::file(&path, e))?;
    serde_json::from_slice(&text).map_err(|e| TrainError::file(&path, e))
}

/// The optimizer's file in a checkpoint's directory.
pub fn optimizer_file(dir: &Path) -> PathBuf {
    dir.join("trainer/optimizer.safetensors")
}

/// Checkpoints under `run`, oldest first.
fn all(run: &Path) -> Vec<PathBuf> {
    let step = |path: &Path| -> Option<u64> {
        path.file_name()?.to_str()?.strip_prefix(PREFIX)?.parse().ok()
    };
    let entries = fs::read_dir(run).into_iter().flatten().flatten();
    let mut found: Vec<(u64, PathBuf)> = entries
        .filter_map(|entry| Some((step(&entry.path())?, entry.path())))
        .filter(|(_, path)| path.join("trainer/state.json").is_file())
        .collect();
    found.sort();
    found.into_iter().map(|(_, path)| path).collect()
}

/// A tensor as safetensors wants to see it, in its own type.
struct Stored<'a> {
    tensor: &'a Tensor,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl<'a> Stored<'a> {
    fn new(tensor: &'a Tensor) -> Self {
        let shape = tensor.size().iter().map(|&axis| axis as usize).collect();
        Self { tensor, dtype: stored_type(tensor.kind()).0, shape }
    }
}

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        if Placement::of(self.tensor).is_native() {
            return bytes(self.tensor).into();
        }
        // One tensor at a time comes from its device.
        device::bytes(self.tensor).into()
    }

    fn data_len(&self) -> usize {
        self.tensor.numel() * self.tensor.kind().elt_size_in_bytes()
    }
}

/// A type of tensors in safetensors, and in a model's `config.json`.
fn stored_type(kind: Kind) -> (Dtype, &'static str) {
    match kind {
        Kind::Float => (Dtype::F32, "float32"),
        Kind::BFloat16 => (Dtype::BF16, "bfloat16"),
        Kind::Half => (Dtype::F16, "float16"),
        Kind::Double => (Dtype::F64, "float64"),
        other => unreachable!("weights are of a floating type, not {other:?}"),
    }
}

/// Writes the weights to a safetensors file, in their own type.
///
/// # Errors
/// What the file system refuses.
pub fn save_weights(weights: &Weights, path: &Path) -> Result<(), TrainError> {
    let stored = weights.iter().map(|(name, tensor)| (name, Stored::new(tensor)));
    // transformers asks for the format; it names who wrote the names and layouts.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize_to_file(stored, Some(metadata), path)
        .map_err(|e| TrainError::file(path, e))
}

/// Writes the files beside `weights`: configuration, tokenizer, chat template.
///
/// # Errors
/// What the file system refuses.
pub fn save_source(source: &Source, weights: &Weights, dir: &Path) -> Result<(), TrainError> {
    let kind = weights.iter().next().map_or(Kind::Float, |(_, tensor)| tensor.kind());
    let dtype = stored_type(kind).1;
    for (file, text) in source.files() {
        let path = dir.join(file);
        match file {
            "config.json" => {
                let text = with_type(text, dtype).map_err(|e| TrainError::file(&path, e))?;
                write(&path, &text)?;
            }
            _ => write(&path, text.as_bytes())?,
        }
    }
    Ok(())
}

/// A model's `config.json` that says what type the weights are stored in here.
fn with_type(config: &str, dtype: &str) -> Result<Vec<u8>, serde_json::Error> {
    let mut config: serde_json::Map<String, serde_json::Value> = serde_json::from_str(config)?;
    let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    config.insert(key.into(), dtype.into());
    serde_json::to_vec_pretty(&config)
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    fs::write(path, bytes).map_err(|e| TrainError::file(path, e))?;
    sync(path)
}

fn sync(path: &Path) -> Result<(), TrainError> {
    let file = File::open(path).map_err(|e| TrainError::file(path, e))?;
    file.sync_all().map_err(|e| TrainError::file(path, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use onpolicy_engine::model::loading::load_to;

    #[test]
    fn narrow_weights_are_stored_as_they_are() {
        let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/tiny/llama-tied");
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("model.safetensors");
        for (kind, dtype, name) in
            [(Kind::BFloat16, Dtype::BF16, "bfloat16"), (Kind::Half, Dtype::F16, "float16")]
        {
            let placement = Placement { kind, ..Placement::NATIVE };
            let model = load_to(tiny, placement).expect("a golden checkpoint");
            let weights = Weights::new(model.tensors);
            save_weights(&weights, &file).expect("saved");
            save_source(&model.source, &weights, dir.path()).expect("saved");
            let bytes = fs::read(&file).expect("the file");
            let stored = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
            assert!(stored.tensors().iter().all(|(_, view)| view.dtype() == dtype));
            let config = fs::read_to_string(dir.path().join("config.json")).expect("the file");
            let config: serde_json::Value = serde_json::from_str(&config).expect("JSON");
            assert!(config["torch_dtype"] == name || config["dtype"] == name, "{config}");
            let again = load_to(&dir.path().to_string_lossy(), placement).expect("it loads");
            for ((name, saved), (_, loaded)) in weights.iter().zip(&again.tensors) {
                assert!(saved.equal(loaded), "{name}");
            }
        }
    }
}
