//! The shared policy: the tensors that the engine serves and the trainer updates.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};
use tch::Tensor;

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
        tch::no_grad(|| {
            let mut handle = trained.shallow_clone();
            let _ = handle.g_add_scalar_(1.0);
        });
        let served = served.get("w").unwrap();
        assert_eq!(Vec::<f32>::try_from(served).unwrap(), [2.0, 3.0]);
        assert_eq!(served.data_ptr(), trained.data_ptr());
        assert!(trained.requires_grad() && !served.requires_grad());
        assert_eq!((policy.bytes(), policy.parameters()), (8, 2));
    }
}
