//! What tch does not bind: the fused optimizer, backward with given gradients, flash attention,
//! memory of a tensor that goes and comes, tensors as slices, and a CUDA device's streams, events,
//! graphs and memory.

pub mod autograd;
pub mod device_memory;
pub mod event;
pub mod flash;
pub mod function;
pub mod graph;
pub mod memory;
pub mod optim;
pub mod random;
pub mod slices;
pub mod storage;
pub mod stream;
pub mod transfer;

pub use autograd::no_grad;

use std::ffi::{CStr, c_char, c_void};

/// A failure inside libtorch.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("libtorch: {0}")]
pub struct TorchError(pub String);

impl From<tch::TchError> for TorchError {
    /// What went wrong, without where in libtorch's sources.
    fn from(error: tch::TchError) -> Self {
        Self(without_trace(&error.to_string()).to_string())
    }
}

/// The first part of what libtorch says of an error, before the functions that it happened in.
pub fn without_trace(text: &str) -> &str {
    // Inside of a quoted text the lines' ends are written as two characters.
    let traces = ["\nException raised from", "\\nException raised from", "\nframe #", "\\nframe #"];
    let ends = traces.iter().filter_map(|trace| text.find(trace));
    &text[..ends.min().unwrap_or(text.len())]
}

/// Whether this is how an allocation fails: in libtorch's allocators (CPU, CUDA), in libraries that
/// it calls, or in the driver.
pub fn is_out_of_memory(text: &str) -> bool {
    let text = text.to_ascii_lowercase().replace('_', " ");
    ["out of memory", "can't allocate memory", "alloc failed"]
        .iter()
        .any(|sign| text.contains(sign))
}

/// Keeps cuDNN out of libtorch's `scaled_dot_product_attention` from now on.
pub(crate) fn without_cudnn_attention() -> Result<(), TorchError> {
    // SAFETY: sets a flag of libtorch's.
    check(unsafe { op_without_cudnn_attention() })
}

/// A pointer to a C++ `at::Tensor`, as tch holds it.
type RawTensor = *const torch_sys::C_tensor;

unsafe extern "C" {
    fn op_free(text: *mut c_char);
    fn op_keep_freed_memory() -> bool;
    fn op_backward(
        outputs: *const RawTensor,
        gradients: *const RawTensor,
        count: i64,
    ) -> *mut c_char;
    fn op_apply(
        callbacks: *const c_void,
        state: *mut c_void,
        inputs: *const RawTensor,
        count: i64,
        output: *mut *mut torch_sys::C_tensor,
    ) -> *mut c_char;
    fn op_recording() -> bool;
    fn op_flash_attention(
        inputs: *const RawTensor,
        longest: *const i64,
        window_left: i64,
        output: *mut *mut torch_sys::C_tensor,
    ) -> *mut c_char;
    fn op_give_back(tensor: RawTensor) -> *mut c_char;
    fn op_take(tensor: RawTensor) -> *mut c_char;
    fn op_copy_async(from: RawTensor, to: RawTensor) -> *mut c_char;
    fn op_pinned(tensor: RawTensor, output: *mut *mut torch_sys::C_tensor) -> *mut c_char;
    fn op_empty_cache() -> *mut c_char;
    fn op_set_grad(tensor: RawTensor, gradient: RawTensor) -> *mut c_char;
    fn op_total_norm(tensors: *const RawTensor, count: i64, norm: *mut f64) -> *mut c_char;
    fn op_copy_each(to: *const RawTensor, from: *const RawTensor, count: i64) -> *mut c_char;
    fn op_adamw(
        params: *const RawTensor,
        grads: *const RawTensor,
        first: *const RawTensor,
        second: *const RawTensor,
        steps: *const RawTensor,
        count: i64,
        lr: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
        weight_decay: f64,
        grad_scale: f64,
    ) -> *mut c_char;
}

// CUDA, see cuda_shim.cpp.
unsafe extern "C" {
    fn op_without_cudnn_attention() -> *mut c_char;
    fn op_stream(index: i64, handle: *mut *mut c_void) -> *mut c_char;
    fn op_own_stream(index: i64) -> *mut c_char;
    fn op_side_stream(index: i64, before: *mut i64) -> *mut c_char;
    fn op_restore_stream(index: i64, before: i64) -> *mut c_char;
    fn op_synchronize(index: i64) -> *mut c_char;
    fn op_event_record(index: i64, event: *mut *mut c_void) -> *mut c_char;
    fn op_event_wait(event: *mut c_void) -> *mut c_char;
    fn op_event_free(event: *mut c_void) -> *mut c_char;
    fn op_device_memory(index: i64, bytes: *mut i64) -> *mut c_char;
    fn op_reset_peak(index: i64) -> *mut c_char;
    fn op_graph_new(graph: *mut *mut c_void) -> *mut c_char;
    fn op_graph_begin(graph: *mut c_void, first: u64, second: u64) -> *mut c_char;
    fn op_graph_end(graph: *mut c_void) -> *mut c_char;
    fn op_graph_pool(graph: *mut c_void, pool: *mut u64) -> *mut c_char;
    fn op_graph_replay(graph: *mut c_void) -> *mut c_char;
    fn op_graph_free(graph: *mut c_void) -> *mut c_char;
}

/// Turns the shim's answer into a result.
fn check(answer: *mut c_char) -> Result<(), TorchError> {
    if answer.is_null() {
        return Ok(());
    }
    // SAFETY: a non-null answer is a NUL-terminated string that the shim allocated for us.
    let text = unsafe {
        let text = CStr::from_ptr(answer).to_string_lossy().into_owned();
        op_free(answer);
        text
    };
    Err(TorchError(text))
}

fn pointers<'a>(tensors: impl IntoIterator<Item = &'a tch::Tensor>) -> Vec<RawTensor> {
    tensors.into_iter().map(tch::Tensor::as_ptr).collect()
}
