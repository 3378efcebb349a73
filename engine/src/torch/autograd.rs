//! Backward passes that tch does not bind.

use super::{TorchError, check, op_backward, op_recording, op_set_grad, pointers};
use tch::Tensor;

/// Runs `body`, none of whose operations is recorded for a backward pass; whether others are is as before
/// afterwards, after a panic, too.
pub fn no_grad<T>(body: impl FnOnce() -> T) -> T {
    let _guard = tch::no_grad_guard();
    body()
}

/// Whether operations on this thread are recorded for a backward pass: not inside [`no_grad`].
pub fn recording() -> bool {
    // SAFETY: reads a flag of the thread.
    unsafe { op_recording() }
}

/// Adds the gradient of `sum(output * gradient)` to the `grad` of every leaf that `output` was
/// computed from.
///
/// # Errors
/// Shapes that differ, or an output without a graph.
pub fn backward(output: &Tensor, gradient: &Tensor) -> Result<(), TorchError> {
    let (outputs, gradients) = (pointers([output]), pointers([gradient]));
    // SAFETY: both arrays hold one valid tensor for the length of the call.
    check(unsafe { op_backward(outputs.as_ptr(), gradients.as_ptr(), 1) })
}

/// Makes `gradient` the accumulated gradient of the leaf `tensor`, replacing any that it has. It may
/// be f32 where the tensor is narrower: backward passes add to it in place then, in f32.
///
/// # Errors
/// What libtorch refuses.
pub fn set_grad(tensor: &Tensor, gradient: &Tensor) -> Result<(), TorchError> {
    // SAFETY: both are valid tensors; only the gradient slot of the first is written.
    check(unsafe { op_set_grad(tensor.as_ptr(), gradient.as_ptr()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_given_gradient_flows_back() {
        let x = Tensor::from_slice(&[1f32, 2.0, 3.0]).set_requires_grad(true);
        backward(&(&x * &x), &Tensor::from_slice(&[1f32, 10.0, 100.0])).unwrap();
        assert_eq!(Vec::<f32>::try_from(x.grad()).unwrap(), [2.0, 40.0, 600.0]);
        set_grad(&x, &Tensor::from_slice(&[7f32, 8.0, 9.0])).unwrap();
        assert_eq!(Vec::<f32>::try_from(x.grad()).unwrap(), [7.0, 8.0, 9.0]);
    }

    #[test]
    fn nothing_is_recorded_inside_no_grad() {
        assert!(recording());
        assert!(!no_grad(recording));
        assert!(recording());
        let failed = std::panic::catch_unwind(|| no_grad(|| panic!("no memory")));
        assert!(failed.is_err() && recording(), "a panic leaves it as it was");
    }

    #[test]
    fn gradients_of_a_narrow_leaf_add_up_in_f32() {
        let kinds = (tch::Kind::BFloat16, tch::Kind::Float);
        let x = Tensor::from_slice(&[2f32]).to_kind(kinds.0).set_requires_grad(true);
        set_grad(&x, &Tensor::from_slice(&[1f32])).unwrap();
        let address = x.grad().data_ptr();
        // 1 + 3 * 2^-9 has no bf16, and 1 + 2^-9 would be rounded down to 1 each time.
        for _ in 0..3 {
            let gradient = Tensor::from_slice(&[2f32.powi(-10)]).to_kind(kinds.0);
            backward(&(&x * 2.0), &gradient).unwrap();
        }
        assert_eq!(x.grad().kind(), kinds.1);
        assert_eq!(Vec::<f32>::try_from(x.grad()).unwrap(), [1.0 + 3.0 * 2f32.powi(-9)]);
        assert_eq!(x.grad().data_ptr(), address);
    }

    #[test]
    fn an_error_is_returned_not_thrown() {
        let x = Tensor::from_slice(&[1f32, 2.0]);
        let error = backward(&x, &x).unwrap_err();
        assert!(error.0.contains("does not require grad"), "{error}");
    }
}
