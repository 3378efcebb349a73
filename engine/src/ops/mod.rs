//! The decoder's operations, with gradients where they are recorded: kernels of our own behind
//! tensors of f32 on the CPU, libtorch's operations for all others ([`crate::device`]).

pub mod embedding;
pub mod linear;
pub mod packed_attention;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
#[cfg(test)]
mod testing;

use crate::torch::autograd::recording;
use tch::Tensor;

/// True if a function of these inputs needs a graph.
fn may_record(inputs: &[&Tensor]) -> bool {
    recording() && inputs.iter().any(|input| input.requires_grad())
}
