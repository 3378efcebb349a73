//! The shared policy: the tensors that the engine serves and the trainer updates.

use crate::{device::Placement, kernels::matmul::narrow::Format};
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use tch::{Kind, Tensor};

/// The type that linear layers and the head are served in. With any but f32 the engine keeps a
/// copy of their weights beside the f32 ones and makes it anew in every update; the embedding's
/// rows, norms and biases stay f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServeDtype {
    /// The tensors that the trainer updates, without any copy.
    #[default]
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of f32.
    Bf16,
    /// Integers between -127 and 127 with an f32 scale for each row; inputs stay f32.
    Int8,
}

impl ServeDtype {
    /// The format of the copies; none for f32.
    pub fn format(self) -> Option<Format> {
        match self {
            Self::F32 => None,
            Self::F16 => Some(Format::F16),
            Self::Bf16 => Some(Format::Bf16),
            Self::Int8 => Some(Format::Int8),
        }
    }

    /// Whether these weights can be kept in this type.
    ///
    /// # Errors
    /// Names the first matrix with a number that f16 cannot hold, or that is not finite.
    pub fn check(self, weights: &Weights) -> Result<(), String> {
        let largest = match self {
            Self::F32 => return Ok(()),
            Self::F16 => 65_504.0,
            Self::Bf16 | Self::Int8 => f64::from(f32::MAX),
        };
        for (name, tensor) in weights.iter().filter(|(_, tensor)| tensor.dim() == 2) {
            let (least, most) = tensor.aminmax(None, false);
            for extreme in [least, most].map(|extreme| extreme.double_value(&[])) {
                if extreme.is_nan() || extreme.abs() > largest {
                    return Err(format!(
                        "'{name}' holds {extreme}, beyond {largest:e}, the largest number that \
                         {self} copies can be made of; serve f32 or bf16"
                    ));
                }
            }
        }
        Ok(())
    }
}

impl fmt::Display for ServeDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        })
    }
}

/// The version counter of a policy, readable from any thread.
#[derive(Debug, Clone, Default)]
pub struct Version(Arc<AtomicU64>);

impl Version {
    /// The version of the weights that the next step uses.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// Sets the version. Only the engine's thread does so, between two steps.
    pub(crate) fn set(&self, version: u64) {
        self.0.store(version, Ordering::Release);
    }
}

/// Named weights. Cloning handles never copies storage: every handle made from a policy reads and
/// writes the same memory.
#[derive(Debug)]
pub struct Weights {
    tensors: Vec<(String, Tensor)>,
}

impl Weights {
    /// Takes the tensors of a checkpoint, in its order.
    pub fn new(tensors: Vec<(String, Tensor)>) -> Self {
        Self { tensors }
    }

    /// More handles to the same storage, for the engine.
    pub fn share(&self) -> Self {
        let handles = self.tensors.iter().map(|(name, t)| (name.clone(), t.shallow_clone()));
        Self { tensors: handles.collect() }
    }

    /// Handles to the same storage that collect gradients, for the trainer.
    pub fn share_trainable(&self) -> Self {
        let handle = |t: &Tensor| t.detach().set_requires_grad(true);
        Self { tensors: self.tensors.iter().map(|(name, t)| (name.clone(), handle(t))).collect() }
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|(known, _)| known == name).map(|(_, tensor)| tensor)
    }

    /// Names and tensors, in the checkpoint's order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Whether every number is one.
    ///
    /// # Errors
    /// Names the first tensor with a number that is not finite.
    pub fn check_finite(&self) -> Result<(), String> {
        let finite = |tensor: &Tensor| {
            let (least, most) = tensor.aminmax(None, false);
            [least, most].iter().all(|extreme| extreme.double_value(&[]).is_finite())
        };
        match self.tensors.iter().find(|(_, tensor)| !finite(tensor)) {
            None => Ok(()),
            Some((name, _)) => Err(format!("'{name}' holds a number that is not finite")),
        }
    }

    /// The tensors, in the checkpoint's order.
    pub fn into_tensors(self) -> Vec<(String, Tensor)> {
        self.tensors
    }

    /// Device and type of the tensors, which are the same for all.
    ///
    /// # Panics
    /// If there is none.
    pub fn placement(&self) -> Placement {
        Placement::of(&self.tensors.first().expect("a model has weights").1)
    }

    /// Whether weights of type `kind` can be made of these.
    ///
    /// # Errors
    /// Names the first tensor with a number beyond those of f16, if that is the type.
    pub fn check_fits(&self, kind: Kind) -> Result<(), String> {
        let largest = 65_504.0;
        let beyond = |tensor: &Tensor| tensor.abs().max().double_value(&[]) > largest;
        match self.tensors.iter().find(|(_, tensor)| kind == Kind::Half && beyond(tensor)) {
            None => Ok(()),
            Some((name, _)) => {
                Err(format!("'{name}' holds a number beyond {largest}, and f16 none"))
            }
        }
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> usize {
        self.tensors.iter().map(|(_, t)| t.numel() * t.kind().elt_size_in_bytes()).sum()
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        self.tensors.iter().map(|(_, t)| t.numel()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_handles_share_one_storage() {
        let policy = Weights::new(vec![("w".into(), Tensor::from_slice(&[1f32, 2.0]))]);
        let (served, trained) = (policy.share(), policy.share_trainable());
        let trained = trained.get("w").unwrap();
        crate::torch::no_grad(|| {
            let mut handle = trained.shallow_clone();
            let _ = handle.g_add_scalar_(1.0);
        });
        let served = served.get("w").unwrap();
        assert_eq!(Vec::<f32>::try_from(served).unwrap(), [2.0, 3.0]);
        assert_eq!(served.data_ptr(), trained.data_ptr());
        assert!(trained.requires_grad() && !served.requires_grad());
        assert_eq!((policy.bytes(), policy.parameters()), (8, 2));
    }

    #[test]
    fn placement_and_what_fits() {
        let weights = Weights::new(vec![("w".into(), Tensor::from_slice(&[1f32, -7e4]))]);
        assert_eq!(weights.placement(), Placement::NATIVE);
        assert_eq!(weights.check_fits(Kind::BFloat16), Ok(()));
        assert!(weights.check_fits(Kind::Half).unwrap_err().starts_with("'w' holds"));
    }

    #[test]
    fn weights_beyond_a_type_are_refused_by_name() {
        let with = |x: f32| {
            let matrix = Tensor::from_slice(&[1.0, x, 2.0, -3.0]).view([2, 2]);
            Weights::new(vec![("norm".into(), Tensor::from(1e9f32)), ("w".into(), matrix)])
        };
        let narrow = [ServeDtype::F16, ServeDtype::Bf16, ServeDtype::Int8];
        for dtype in narrow {
            assert_eq!(dtype.check(&with(-65_504.0)), Ok(()));
            for bad in [f32::NAN, f32::NEG_INFINITY] {
                let error = dtype.check(&with(bad)).unwrap_err();
                assert!(error.contains("'w'"), "{error}");
            }
        }
        let error = ServeDtype::F16.check(&with(-7e4)).unwrap_err();
        assert!(error.contains("'w' holds -70000"), "{error}");
        assert_eq!(ServeDtype::Bf16.check(&with(-7e4)), Ok(()));
        assert_eq!(ServeDtype::F32.check(&with(f32::NAN)), Ok(()));
    }
}
