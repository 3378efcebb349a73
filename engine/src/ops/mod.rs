//! The decoder's operations: kernels of our own behind tensors, with gradients where they are
//! recorded.

pub mod embedding;
pub mod linear;

use tch::Tensor;

/// True if a function of these inputs may need a graph. (Where recording is switched off, libtorch
/// itself makes none.)
fn may_record(inputs: &[&Tensor]) -> bool {
    inputs.iter().any(|input| input.requires_grad())
}
