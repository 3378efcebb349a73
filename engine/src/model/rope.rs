//! Rotary position embedding.

use super::config::ModelConfig;
use crate::ops::{rms_norm::rms_norm, rope::rotate};
use tch::{Device, Kind, Tensor};

/// Inverse frequencies and the attention factor of a model.
pub struct Rope {
    /// `[head_dim / 2]`, f32, on the model's device.
    inverse_frequencies: Tensor,
    factor: f64,
}

/// Cosines and sines of one batch, `[N, head_dim / 2]` each, to be used by every layer.
pub struct Rotation {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// The embedding that `config` describes, for tensors on `device`.
    pub fn new(config: &ModelConfig, device: Device) -> Self {
        let (frequencies, factor) =
            config.rope.frequencies(config.head_dim, config.max_position_embeddings);
        let frequencies: Vec<f32> = frequencies.iter().map(|&f| f as f32).collect();
        Self { inverse_frequencies: Tensor::from_slice(&frequencies).to_device(device), factor }
    }

    /// The rotation for rows at `positions` (`[N]`, i64), which may lie anywhere.
    pub fn at(&self, positions: &Tensor) -> Rotation {
        let positions = positions.to_device(self.inverse_frequencies.device());
        let angles = positions.to_kind(Kind::Float).unsqueeze(1) * &self.inverse_frequencies;
        Rotation { cos: angles.cos() * self.factor, sin: angles.sin() * self.factor }
    }
}

impl Rotation {
    /// By these cosines and sines, `[N, head_dim / 2]` each.
    pub fn new(cos: Tensor, sin: Tensor) -> Self {
        Self { cos, sin }
    }

    /// Cosines and sines, `[N, head_dim / 2]` each.
    pub fn angles(&self) -> [&Tensor; 2] {
        [&self.cos, &self.sin]
    }

    /// Rotates `x`, `[N, heads, head_dim]`, halves against each other.
    pub fn apply(&self, x: &Tensor) -> Tensor {
        rotate(x, &self.cos, &self.sin)
    }
}

/// Norms of each head of q and k: weights `[head_dim]` each.
#[derive(Clone, Copy)]
pub struct HeadNorms<'a> {
    /// Of q and of k.
    pub weights: [&'a Tensor; 2],
    /// Is added to the mean of squares.
    pub eps: f64,
}

/// What becomes of q and k before they meet: a norm of each head, where a model has them, and rotation.
#[derive(Clone, Copy)]
pub struct Turn<'a> {
    /// The norms.
    pub norms: Option<HeadNorms<'a>>,
    /// The rotation.
    pub rotation: &'a Rotation,
}

impl Turn<'_> {
    /// q and k, `[N, heads, head_dim]` each, after the norms.
    pub fn normed(&self, qk: [&Tensor; 2]) -> [Tensor; 2] {
        let Some(HeadNorms { weights: [q, k], eps }) = self.norms else {
            return qk.map(Tensor::shallow_clone);
        };
        [rms_norm(qk[0], q, eps), rms_norm(qk[1], k, eps)]
    }

    /// q and k after both.
    pub fn apply(&self, qk: [&Tensor; 2]) -> [Tensor; 2] {
        self.normed(qk).map(|x| self.rotation.apply(&x))
    }
}
