//! Tensors of a directory, in one safetensors file or many.

use super::{LoadError, tensors};
use crate::{device::Placement, model::config::ModelConfig};
use ::safetensors::tensor::{Dtype, Metadata};
use serde_json::Value;
use std::{
    collections::{BTreeSet, HashMap},
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};
use tch::{Kind, Tensor};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Longest header that is read, in bytes (the format's own limit).
const MAX_HEADER: u64 = 100_000_000;

/// One open file.
struct Shard {
    path: PathBuf,
    file: File,
    /// Where the tensors begin.
    data: u64,
    /// Its offsets were checked against its shapes when it was parsed.
    header: Metadata,
}

/// The open files of a directory whose names are those of a configuration.
struct Files {
    shards: Vec<Shard>,
    shard_of: HashMap<String, usize>,
}

impl Files {
    fn open(dir: &Path, config: &ModelConfig) -> Result<Self, LoadError> {
        let shards: Vec<Shard> =
            shard_paths(dir)?.into_iter().map(Shard::open).collect::<Result<_, _>>()?;
        let names =
            |i: usize| shards[i].header.offset_keys().into_iter().map(move |name| (name, i));
        let shard_of: HashMap<String, usize> = (0..shards.len()).flat_map(names).collect();
        tensors::check_names(config, shard_of.keys().map(String::as_str))?;
        Ok(Self { shards, shard_of })
    }

    fn read(&self, name: &str, shape: (&[i64], Kind)) -> Result<Tensor, LoadError> {
        self.shards[self.shard_of[name]].read(name, shape)
    }
}

/// Reads the tensors of `config` from the safetensors in `dir`.
pub(super) fn load(
    dir: &Path,
    config: &ModelConfig,
    placement: Placement,
) -> Result<Vec<(String, Tensor)>, LoadError> {
    let files = Files::open(dir, config)?;
    tensors::read_all(config, placement, &|name, shape| files.read(name, (shape, placement.kind)))
}

/// As [`load`], in f32, on the calling thread alone: an engine goes on with the kernels' threads. All
/// shapes are checked before anything is read.
pub(super) fn load_one_by_one(
    dir: &Path,
    config: &ModelConfig,
) -> Result<Vec<(String, Tensor)>, LoadError> {
    let files = Files::open(dir, config)?;
    let wanted = config.tensor_shapes();
    for (name, shape) in &wanted {
        let info = files.shards[files.shard_of[name]].header.info(name);
        info.map_or(Ok(()), |info| tensors::check_shape(name, &info.shape, shape))?;
    }
    let read = |(name, shape): (String, Vec<i64>)| {
        let tensor = files.read(&name, (&shape, Kind::Float))?;
        Ok((name, tensor))
    };
    wanted.into_iter().map(read).collect()
}

/// The files that hold the tensors.
fn shard_paths(dir: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let index = dir.join(INDEX);
    if !index.exists() {
        let single = dir.join(SINGLE);
        return if single.exists() { Ok(vec![single]) } else { Err(no_weights(dir)) };
    }
    let text = std::fs::read_to_string(&index).map_err(LoadError::io(&index))?;
    let parsed: Value =
        serde_json::from_str(&text).map_err(|e| LoadError::corrupt(&index, e.to_string()))?;
    let files = parsed["weight_map"].as_object().map(|map| map.values().map(Value::as_str));
    let files: Option<BTreeSet<&str>> = files.and_then(Iterator::collect);
    let malformed = || LoadError::corrupt(&index, "weight_map must name a file for each tensor");
    let files = files.filter(|files| !files.is_empty()).ok_or_else(malformed)?;
    // A file of this directory, never a path that leads out of it.
    let is_plain = |name: &&str| Path::new(name).file_name().is_some_and(|part| part == *name);
    if !files.iter().all(is_plain) {
        return Err(malformed());
    }
    Ok(files.into_iter().map(|name| dir.join(name)).collect())
}

fn no_weights(dir: &Path) -> LoadError {
    let has_pickle =
        dir.join("pytorch_model.bin").exists() || dir.join("pytorch_model.bin.index.json").exists();
    let hint = if has_pickle {
        "it has pytorch_model.bin, which is not read; convert it with transformers' \
         save_pretrained(safe_serialization=True)"
    } else {
        "it has config.json, but neither model.safetensors nor model.safetensors.index.json"
    };
    LoadError::NotFound { spec: dir.display().to_string(), hint: hint.to_string() }
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self, LoadError> {
        let file = File::open(&path).map_err(LoadError::io(&path))?;
        let length = file.metadata().map_err(LoadError::io(&path))?.len();
        let corrupt = |reason: &str| LoadError::corrupt(&path, reason);
        let mut size = [0; 8];
        file.read_exact_at(&mut size, 0)
            .map_err(|_| corrupt("is too short for a safetensors file"))?;
        let size = u64::from_le_bytes(size);
        if size > MAX_HEADER || size + 8 > length {
            return Err(corrupt("is cut off in its header, or is no safetensors file"));
        }
        let mut header = vec![0; size as usize];
        file.read_exact_at(&mut header, 8).map_err(LoadError::io(&path))?;
        let header: Metadata = serde_json::from_slice(&header)
            .map_err(|e| corrupt(&format!("has no valid safetensors header: {e}")))?;
        let data = size + 8;
        let expected = data.saturating_add(header.data_len() as u64);
        if expected != length {
            let reason = format!(
                "has {length} bytes where its header asks for {expected}; it may be cut off: fetch \
                 it again"
            );
            return Err(corrupt(&reason));
        }
        Ok(Self { path, file, data, header })
    }

    /// One tensor of this shape, in this type.
    fn read(&self, name: &str, (shape, wanted): (&[i64], Kind)) -> Result<Tensor, LoadError> {
        let missing = || LoadError::tensor(name, "is missing from the checkpoint");
        let info = self.header.info(name).ok_or_else(missing)?;
        tensors::check_shape(name, &info.shape, shape)?;
        let kind = match info.dtype {
            Dtype::F32 => Kind::Float,
            Dtype::F16 => Kind::Half,
            Dtype::BF16 => Kind::BFloat16,
            other => {
                let what = format!("type of tensor {name}");
                return Err(LoadError::unsupported(what, format!("{other:?}"), "F32, F16, BF16"));
            }
        };
        let size = kind.elt_size_in_bytes();
        let begin = self.data + info.data_offsets.0 as u64;
        tensors::assemble(name, (shape, wanted), &|start, count| {
            let mut bytes = vec![0; count * size];
            self.file
                .read_exact_at(&mut bytes, begin + (start * size) as u64)
                .map_err(LoadError::io(&self.path))?;
            Tensor::f_from_data_size(&bytes, &[count as i64], kind)
                .map_err(tensors::torch_error(name))
        })
    }
}
