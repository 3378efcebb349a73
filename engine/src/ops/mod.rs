//! The decoder's operations, with gradients where they are recorded: kernels of our own behind
//! tensors of f32 on the CPU, and where nothing is recorded on a CUDA device ([`crate::cuda`]);
//! libtorch's operations for all others ([`crate::device`]).

pub mod embedding;
pub mod linear;
pub mod packed_attention;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
#[cfg(test)]
mod testing;

use crate::{
    cuda::{CudaError, takes},
    torch::autograd::recording,
};
use tch::Tensor;

/// True if a function of these inputs needs a graph.
fn may_record(inputs: &[&Tensor]) -> bool {
    recording() && inputs.iter().any(|input| input.requires_grad())
}

/// What a kernel of our own makes of these inputs; none if they are not on a CUDA device, need a graph,
/// or are not for the kernel.
///
/// # Panics
/// If the kernel cannot be launched.
fn on_cuda<T>(inputs: &[&Tensor], kernel: impl FnOnce() -> Result<T, CudaError>) -> Option<T> {
    if !takes(inputs[0].device()) || may_record(inputs) {
        return None;
    }
    made(kernel())
}

/// What a kernel has made; none if it is not for these inputs.
///
/// # Panics
/// If it cannot be launched.
fn made<T>(result: Result<T, CudaError>) -> Option<T> {
    match result {
        Ok(made) => Some(made),
        Err(CudaError::Unsupported(_)) => None,
        Err(error) => panic!("{error}"),
    }
}
