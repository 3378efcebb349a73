//! Device and type of a model's tensors.

use crate::cuda;
use serde::{Deserialize, Serialize};
use std::fmt;
use tch::{Device, Kind, Tensor};

/// Where a configuration wants the tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceName {
    /// In main memory.
    #[default]
    Cpu,
    /// On the first CUDA device.
    Cuda,
    /// On a CUDA device if there is one, else in main memory.
    Auto,
}

/// The type of a model's tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// Four bytes.
    F32,
    /// The upper half of f32.
    Bf16,
    /// IEEE 754 binary16; its numbers end at 65504, so it is for serving alone.
    F16,
}

impl Dtype {
    /// As libtorch names it.
    pub fn kind(self) -> Kind {
        match self {
            Self::F32 => Kind::Float,
            Self::Bf16 => Kind::BFloat16,
            Self::F16 => Kind::Half,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(kind_name(self.kind()))
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Auto => "auto",
        })
    }
}

/// There is no such device here; the message says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PlacementError(pub String);

/// Device and type of a model's tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// The device.
    pub device: Device,
    /// The type.
    pub kind: Kind,
}

impl Placement {
    /// f32 on the CPU, what the kernels of this crate compute with.
    pub const NATIVE: Self = Self { device: Device::Cpu, kind: Kind::Float };

    /// The placement that a configuration asks for. Without a type it is bf16 on a CUDA device and
    /// f32 on the CPU, the fast type of each.
    ///
    /// # Errors
    /// `cuda` where there is no device.
    pub fn resolve(device: DeviceName, dtype: Option<Dtype>) -> Result<Self, PlacementError> {
        let device = match device {
            DeviceName::Cpu => Device::Cpu,
            DeviceName::Cuda => cuda()?,
            DeviceName::Auto => cuda().unwrap_or(Device::Cpu),
        };
        let usual = if device == Device::Cpu { Dtype::F32 } else { Dtype::Bf16 };
        Ok(Self { device, kind: dtype.unwrap_or(usual).kind() })
    }

    /// That of a tensor.
    pub fn of(tensor: &Tensor) -> Self {
        Self { device: tensor.device(), kind: tensor.kind() }
    }

    /// Whether the kernels of this crate compute with such tensors.
    pub fn is_native(self) -> bool {
        self == Self::NATIVE
    }

    /// Bytes of one number.
    pub fn element_bytes(self) -> usize {
        self.kind.elt_size_in_bytes()
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let device = if self.device == Device::Cpu { "cpu" } else { "cuda" };
        write!(f, "{device}, {}", kind_name(self.kind))
    }
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Float => "f32",
        Kind::BFloat16 => "bf16",
        Kind::Half => "f16",
        Kind::Double => "f64",
        _ => "another type",
    }
}

/// The first CUDA device.
fn cuda() -> Result<Device, PlacementError> {
    let refusal = |error| {
        PlacementError(format!(
            "model.device = \"cuda\": {error}. It takes an NVIDIA driver, and the libraries of torch \
             2.11.0+cu130: put the directory torch/lib of that installation into LD_LIBRARY_PATH. Or \
             set \"cpu\", or \"auto\" to take what there is"
        ))
    };
    cuda::load().map(|()| Device::Cuda(0)).map_err(refusal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_follow_the_device() {
        let on_cpu = |dtype| Placement::resolve(DeviceName::Cpu, dtype).unwrap();
        assert_eq!(on_cpu(None), Placement::NATIVE);
        assert_eq!(on_cpu(Some(Dtype::Bf16)).to_string(), "cpu, bf16");
        assert!(!on_cpu(Some(Dtype::F16)).is_native());
        assert_eq!(on_cpu(Some(Dtype::F16)).element_bytes(), 2);
    }

    #[test]
    fn cuda_is_refused_where_there_is_none() {
        if cuda::is_available() {
            return;
        }
        let error = Placement::resolve(DeviceName::Cuda, None).unwrap_err().to_string();
        assert!(error.contains("LD_LIBRARY_PATH") && error.contains("\"auto\""), "{error}");
        assert_eq!(Placement::resolve(DeviceName::Auto, None), Ok(Placement::NATIVE));
    }
}
