//! Activation checkpointing: of a training pass only the inputs of the layers are kept, and each
//! layer is run again when its gradient is due (arXiv 1604.06174).

use super::{
    attention::{Attention, Pack},
    decoder::Decoder,
    rope::Rotation,
};
use crate::torch::{TorchError, autograd::backward};
use tch::Tensor;

/// A forward pass whose layers have no graph.
pub struct Checkpoints<'a> {
    decoder: &'a Decoder,
    pack: &'a Pack,
    rotation: Rotation,
    /// Input of each layer, `[N, hidden]`.
    inputs: Vec<Tensor>,
    /// Output of the last layer; a leaf.
    output: Tensor,
}

impl<'a> Checkpoints<'a> {
    /// Runs the layers over embedded tokens `x` (`[N, hidden]`) of `pack`.
    pub fn run(decoder: &'a Decoder, x: Tensor, pack: &'a Pack) -> Self {
        let rotation = decoder.rotation(&pack.positions());
        let (mut inputs, mut x) = (Vec::with_capacity(decoder.num_layers()), x.detach());
        crate::torch::no_grad(|| {
            for layer in 0..decoder.num_layers() {
                let y = decoder.layer(layer, &x, &rotation, &mut Attention::Causal(pack));
                inputs.push(std::mem::replace(&mut x, y));
            }
        });
        Self { decoder, pack, rotation, inputs, output: x.set_requires_grad(true) }
    }

    /// Hidden states after the last norm, `[N, hidden]`, with a graph down to the last layer.
    pub fn hidden(&self) -> Tensor {
        self.decoder.last_norm(&self.output)
    }

    /// To be called after the backward pass through [`Checkpoints::hidden`]: goes on through the
    /// layers, adds to the gradients of their weights, and gives the gradient by `x`.
    ///
    /// # Errors
    /// What libtorch refuses; no backward pass before is one reason.
    pub fn backward(mut self) -> Result<Tensor, TorchError> {
        let mut gradient = self.output.grad();
        if !gradient.defined() {
            return Err(TorchError("no gradient has reached the last layer".into()));
        }
        for layer in (0..self.inputs.len()).rev() {
            let input = self.inputs.pop().expect("an input for every layer");
            let x = input.set_requires_grad(true);
            let mut attention = Attention::Causal(self.pack);
            let y = self.decoder.layer(layer, &x, &self.rotation, &mut attention);
            backward(&y, &gradient)?;
            gradient = x.grad();
        }
        Ok(gradient)
    }
}
