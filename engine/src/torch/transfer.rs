//! Numbers on their way to a CUDA device, while the host goes on.

use super::{TorchError, check, op_copy_async, op_pinned};
use std::ptr::null_mut;
use tch::Tensor;

/// A copy of a tensor of the host in pinned memory, which a device reads by itself.
///
/// # Errors
/// If there is no device, or the system has no such memory to give.
pub fn pinned(tensor: &Tensor) -> Result<Tensor, TorchError> {
    let mut output = null_mut();
    // SAFETY: a valid tensor, and a place for the answer.
    check(unsafe { op_pinned(tensor.as_ptr(), &raw mut output) })?;
    // SAFETY: the shim gave a new tensor, which is ours.
    Ok(unsafe { Tensor::from_ptr(output) })
}

/// Overwrites `to` with `from`, of the same shape, once all is done that the device was given before; does
/// not wait for that. `from` may be dropped at once.
///
/// # Errors
/// Shapes that differ, or what the device refuses.
pub fn copy_async(from: &Tensor, to: &Tensor) -> Result<(), TorchError> {
    // SAFETY: valid tensors.
    check(unsafe { op_copy_async(from.as_ptr(), to.as_ptr()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_overwritten() {
        let whole = Tensor::from_slice(&[1i64, 2, 3, 4]);
        copy_async(&Tensor::from_slice(&[7i64, 8]), &whole.narrow(0, 1, 2)).unwrap();
        assert_eq!(Vec::<i64>::try_from(&whole).unwrap(), [1, 7, 8, 4]);
        assert!(copy_async(&whole, &Tensor::from_slice(&[0i64, 0, 0])).is_err());
    }

    #[test]
    fn without_cuda_nothing_is_pinned() {
        if crate::cuda::is_available() {
            return eprintln!("skipped: there is a device");
        }
        assert!(pinned(&Tensor::from_slice(&[1.0f32])).is_err());
    }
}
