//! Differentiable functions written in Rust, as nodes of libtorch's graph.

use super::{RawTensor, TorchError, check, op_apply, pointers};
use crate::panic::message;
use std::{
    ffi::c_void,
    panic::{AssertUnwindSafe, catch_unwind},
    ptr::null_mut,
};
use tch::Tensor;
use torch_sys::C_tensor;

/// A function of some tensors with a gradient of its own.
pub trait Function: Send + Sync + 'static {
    /// Bit `i` is set where `backward` reads input `i`. The others are not kept for it, and
    /// undefined there.
    const READS: u64 = u64::MAX;

    /// The output. Runs without a graph.
    fn forward(&self, inputs: &[Tensor]) -> Tensor;

    /// The gradient by each input, out of the gradient by the output; `None` where there is none,
    /// or where it has been added to the input's `grad` already.
    fn backward(&self, inputs: &[Tensor], gradient: &Tensor) -> Vec<Option<Tensor>>;
}

/// `function(inputs)`, differentiable where an input requires it and the graph is recorded.
///
/// # Errors
/// A panic of `forward`, or what libtorch refuses.
pub fn apply<F: Function>(function: F, inputs: &[&Tensor]) -> Result<Tensor, TorchError> {
    let raw = pointers(inputs.iter().copied());
    let state = Box::into_raw(Box::new(function)).cast();
    let callbacks = const { &Callbacks::of::<F>() };
    let mut output: *mut C_tensor = null_mut();
    // SAFETY: `raw` holds valid tensors; the shim drops `state` exactly once with the callbacks,
    // which are of its type and live for ever.
    check(unsafe {
        op_apply(
            std::ptr::from_ref(callbacks).cast(),
            state,
            raw.as_ptr(),
            raw.len() as i64,
            &raw mut output,
        )
    })?;
    // SAFETY: the shim made the tensor for us.
    Ok(unsafe { Tensor::from_ptr(output) })
}

/// As the shim has it: text up to a zero.
#[repr(C)]
struct Failure([u8; 1024]);

impl Failure {
    /// Writes down what a panic said, as much as there is room for.
    fn tell(&mut self, panic: &(dyn std::any::Any + Send)) {
        let text = message(panic).unwrap_or("a panic without a text");
        let len = text.floor_char_boundary(self.0.len() - 1);
        self.0[..len].copy_from_slice(&text.as_bytes()[..len]);
        self.0[len] = 0;
    }
}

/// As the shim has it.
#[repr(C)]
struct Callbacks {
    forward:
        unsafe extern "C" fn(*mut c_void, *const RawTensor, i64, *mut Failure) -> *mut C_tensor,
    backward: unsafe extern "C" fn(
        *mut c_void,
        *const RawTensor,
        i64,
        RawTensor,
        *mut *mut C_tensor,
        *mut Failure,
    ) -> bool,
    drop: unsafe extern "C" fn(*mut c_void),
    reads: u64,
}

impl Callbacks {
    const fn of<F: Function>() -> Self {
        Self { forward: forward::<F>, backward: backward::<F>, drop: drop::<F>, reads: F::READS }
    }
}

/// Handles of our own to tensors that libtorch lends.
unsafe fn borrow(raw: *const RawTensor, count: i64) -> Vec<Tensor> {
    let raw = unsafe { std::slice::from_raw_parts(raw, count as usize) };
    raw.iter().map(|&tensor| unsafe { Tensor::clone_from_ptr(tensor.cast_mut()) }).collect()
}

/// A handle that libtorch takes over.
fn give(tensor: &Tensor) -> *mut C_tensor {
    // SAFETY: a second handle to a valid tensor; the shim deletes it.
    unsafe { torch_sys::at_shallow_clone(tensor.as_ptr().cast_mut()) }
}

unsafe extern "C" fn forward<F: Function>(
    state: *mut c_void,
    inputs: *const RawTensor,
    count: i64,
    failure: *mut Failure,
) -> *mut C_tensor {
    // SAFETY: the shim hands back the state that `apply` made, lends the inputs, and has a place for
    // what went wrong.
    let (function, inputs, failure) =
        unsafe { (&*state.cast::<F>(), borrow(inputs, count), &mut *failure) };
    let made = catch_unwind(AssertUnwindSafe(|| give(&function.forward(&inputs))));
    made.unwrap_or_else(|panic| {
        failure.tell(&*panic);
        null_mut()
    })
}

unsafe extern "C" fn backward<F: Function>(
    state: *mut c_void,
    inputs: *const RawTensor,
    count: i64,
    gradient: RawTensor,
    gradients: *mut *mut C_tensor,
    failure: *mut Failure,
) -> bool {
    // SAFETY: as in `forward`; `gradients` has a place for each input.
    let (function, inputs, gradient, places) = unsafe {
        (
            &*state.cast::<F>(),
            borrow(inputs, count),
            Tensor::clone_from_ptr(gradient.cast_mut()),
            std::slice::from_raw_parts_mut(gradients, count as usize),
        )
    };
    let answer = catch_unwind(AssertUnwindSafe(|| {
        crate::torch::no_grad(|| function.backward(&inputs, &gradient))
    }));
    let answer = match answer {
        Ok(answer) => answer,
        Err(panic) => {
            // SAFETY: as in `forward`.
            unsafe { &mut *failure }.tell(&*panic);
            return false;
        }
    };
    for (place, tensor) in places.iter_mut().zip(&answer) {
        *place = tensor.as_ref().map_or(null_mut(), give);
    }
    true
}

unsafe extern "C" fn drop<F: Function>(state: *mut c_void) {
    // SAFETY: made by `Box::into_raw` in `apply`, and dropped once.
    std::mem::drop(unsafe { Box::from_raw(state.cast::<F>()) });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    /// `a^2 b`, and a count of how many of it are alive.
    struct SquareTimes(Arc<AtomicUsize>);

    impl SquareTimes {
        fn new(alive: &Arc<AtomicUsize>) -> Self {
            alive.fetch_add(1, Ordering::Relaxed);
            Self(alive.clone())
        }
    }

    impl Drop for SquareTimes {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }

    impl Function for SquareTimes {
        fn forward(&self, inputs: &[Tensor]) -> Tensor {
            &inputs[0] * &inputs[0] * &inputs[1]
        }

        fn backward(&self, inputs: &[Tensor], gradient: &Tensor) -> Vec<Option<Tensor>> {
            let by_a = gradient * &inputs[0] * &inputs[1] * 2.0;
            vec![Some(by_a), Some(gradient * &inputs[0] * &inputs[0])]
        }
    }

    #[test]
    fn gradients_flow_through_and_the_state_is_dropped() {
        let alive = Arc::default();
        let a = Tensor::from_slice(&[2f32, 3.0]).set_requires_grad(true);
        let b = Tensor::from_slice(&[5f32, 7.0]).set_requires_grad(true);
        let y = apply(SquareTimes::new(&alive), &[&a, &b]).unwrap();
        assert_eq!(Vec::<f32>::try_from(&y).unwrap(), [20.0, 63.0]);
        assert_eq!(alive.load(Ordering::Relaxed), 1, "the graph holds it");
        (y * Tensor::from_slice(&[1f32, 10.0])).sum(tch::Kind::Float).backward();
        assert_eq!(Vec::<f32>::try_from(a.grad()).unwrap(), [20.0, 420.0]);
        assert_eq!(Vec::<f32>::try_from(b.grad()).unwrap(), [4.0, 90.0]);
        assert_eq!(alive.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn without_a_graph_nothing_is_kept() {
        let alive = Arc::default();
        let a = Tensor::from_slice(&[2f32]).set_requires_grad(true);
        let y = crate::torch::no_grad(|| apply(SquareTimes::new(&alive), &[&a, &a]).unwrap());
        assert!(!y.requires_grad());
        assert_eq!(alive.load(Ordering::Relaxed), 0);
    }

    struct Scale;

    impl Function for Scale {
        const READS: u64 = 0b10;

        fn forward(&self, inputs: &[Tensor]) -> Tensor {
            &inputs[0] * &inputs[1]
        }

        fn backward(&self, inputs: &[Tensor], gradient: &Tensor) -> Vec<Option<Tensor>> {
            assert!(!inputs[0].defined());
            vec![Some(gradient * &inputs[1]), None]
        }
    }

    #[test]
    fn inputs_that_are_not_read_are_not_kept() {
        let x = Tensor::from_slice(&[2f32, 3.0]).set_requires_grad(true);
        let y = apply(Scale, &[&x, &Tensor::from_slice(&[5f32, 7.0])]).unwrap();
        assert_eq!(Vec::<f32>::try_from(&y).unwrap(), [10.0, 21.0]);
        y.sum(tch::Kind::Float).backward();
        assert_eq!(Vec::<f32>::try_from(x.grad()).unwrap(), [5.0, 7.0]);
    }

    struct Panics;

    impl Function for Panics {
        fn forward(&self, inputs: &[Tensor]) -> Tensor {
            assert!(inputs.len() == 1, "by design");
            inputs[0].copy()
        }

        fn backward(&self, _: &[Tensor], _: &Tensor) -> Vec<Option<Tensor>> {
            panic!("by design too")
        }
    }

    #[test]
    fn a_panic_becomes_an_error() {
        let x = Tensor::from(1f32).set_requires_grad(true);
        let error = apply(Panics, &[&x, &x]).unwrap_err();
        assert_eq!(error.0, "by design");
        let y = apply(Panics, &[&x]).unwrap();
        let error = crate::torch::autograd::backward(&y, &Tensor::from(1f32)).unwrap_err();
        assert_eq!(error.0, "by design too");
    }
}
