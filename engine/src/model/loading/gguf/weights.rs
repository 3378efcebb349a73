//! Tensors of a GGUF file: dequantised to f32, q and k brought into Hugging Face's order.

use super::super::{LoadError, tensors};
use super::{
    header::{Header, TensorInfo},
    names,
};
use crate::{
    device::Placement,
    model::config::{Architecture, ModelConfig},
};
use candle_core::{
    CpuStorage, Device, Storage,
    quantized::{GgmlDType, ggml_file::qtensor_from_ggml},
};
use std::{fs::File, os::unix::fs::FileExt, path::Path};
use tch::{Kind, Tensor};

/// Factors on rotary frequencies; read with the configuration.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// An open file and its head.
pub(super) struct Weights<'a> {
    pub path: &'a Path,
    pub file: &'a File,
    pub header: &'a Header,
}

impl Weights<'_> {
    /// Every tensor of `config`.
    pub fn load(
        &self,
        config: &ModelConfig,
        placement: Placement,
    ) -> Result<Vec<(String, Tensor)>, LoadError> {
        let own = self.header.tensors.keys().filter(|name| *name != ROPE_FACTORS);
        let present: Vec<String> =
            own.map(|name| names::from_gguf(name).unwrap_or_else(|| name.clone())).collect();
        tensors::check_names(config, present.iter().map(String::as_str))?;
        tensors::read_all(config, placement, &|name, shape| self.read(config, name, shape))
    }

    /// One tensor under Hugging Face's name.
    fn read(&self, config: &ModelConfig, name: &str, shape: &[i64]) -> Result<Tensor, LoadError> {
        let own = names::to_gguf(name);
        let info = own.and_then(|own| self.header.tensors.get(&own));
        let info = info.ok_or_else(|| LoadError::tensor(name, "is missing from the GGUF file"))?;
        tensors::check_shape(name, &info.shape, shape)?;
        let tensor = self.dequantise(name, info)?;
        match rotary_heads(config, name) {
            Some(heads) => halves_apart(&tensor, heads).map_err(tensors::torch_error(name)),
            None => Ok(tensor),
        }
    }

    /// A whole tensor in f32.
    pub fn dequantise(&self, name: &str, info: &TensorInfo) -> Result<Tensor, LoadError> {
        let shape: Vec<i64> = info.shape.iter().map(|&n| n as i64).collect();
        tensors::assemble(name, (&shape, Kind::Float), &|start, count| {
            let values = self.dequantise_chunk(info, start, count)?;
            to_torch(&values).map_err(tensors::torch_error(name))
        })
    }

    /// `count` elements from element `start` on, both of them whole blocks.
    fn dequantise_chunk(
        &self,
        info: &TensorInfo,
        start: usize,
        count: usize,
    ) -> Result<candle_core::Tensor, LoadError> {
        let corrupt = |error: candle_core::Error| LoadError::corrupt(self.path, error.to_string());
        let (block, size) = (info.dtype.block_size(), info.dtype.type_size());
        let mut bytes = vec![0; count / block * size];
        let offset = info.offset + (start / block * size) as u64;
        self.file.read_exact_at(&mut bytes, offset).map_err(LoadError::io(self.path))?;
        let cpu = Device::Cpu;
        let quantised =
            qtensor_from_ggml(info.dtype, &bytes, vec![count], &cpu).map_err(corrupt)?;
        quantised.dequantize(&cpu).map_err(corrupt)
    }
}

/// candle's values as torch's.
fn to_torch(values: &candle_core::Tensor) -> Result<Tensor, tch::TchError> {
    let (storage, _) = values.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => Tensor::f_from_slice(values),
        _ => Err(tch::TchError::Kind("dequantised to something other than f32".to_string())),
    }
}

/// The number of heads of a tensor whose rows GGUF keeps in another order than Hugging Face does:
/// q and k of the Llama architecture.
fn rotary_heads(config: &ModelConfig, name: &str) -> Option<usize> {
    if config.architecture != Architecture::Llama {
        None
    } else if name.contains(".self_attn.q_proj.") {
        Some(config.num_heads)
    } else if name.contains(".self_attn.k_proj.") {
        Some(config.num_kv_heads)
    } else {
        None
    }
}

/// Brings rows of `[heads * head_dim, ...]` from pairs side by side (GGUF's rotary order) to first
/// halves, then second halves (Hugging Face's).
fn halves_apart(tensor: &Tensor, heads: usize) -> Result<Tensor, tch::TchError> {
    let pairs = tensor.size()[0] / heads as i64 / 2;
    let split = tensor.f_view([heads as i64, pairs, 2, -1])?;
    split.f_transpose(1, 2)?.f_contiguous()?.f_view(tensor.size().as_slice())
}

/// The factors on rotary frequencies, if the file has them.
pub(super) fn rope_factors(weights: &Weights) -> Result<Option<Vec<f64>>, LoadError> {
    let Some(info) = weights.header.tensors.get(ROPE_FACTORS) else { return Ok(None) };
    if info.dtype != GgmlDType::F32 {
        return Err(LoadError::tensor(ROPE_FACTORS, "must be f32"));
    }
    let tensor = weights.dequantise(ROPE_FACTORS, info)?;
    let values: Result<Vec<f32>, _> = tensor.f_view([-1]).and_then(|flat| flat.try_into());
    let values = values.map_err(tensors::torch_error(ROPE_FACTORS))?;
    Ok(Some(values.into_iter().map(f64::from).collect()))
}
