//! The streams of a CUDA device that libtorch's operations run on.

use super::{
    TorchError, check, op_own_stream, op_restore_stream, op_side_stream, op_stream, op_synchronize,
};
use std::{ffi::c_void, ptr::null_mut};

/// The stream that this thread's operations on CUDA device `index` run on, as the driver knows it.
///
/// # Errors
/// If libtorch's CUDA half is not loaded, or has no such device.
pub fn current(index: usize) -> Result<*mut c_void, TorchError> {
    let mut handle = null_mut();
    // SAFETY: a place for the answer.
    check(unsafe { op_stream(index as i64, &raw mut handle) })?;
    Ok(handle)
}

/// Gives this thread a stream of CUDA device `index` for itself, of high priority: its operations do not
/// queue behind those of other threads. What these write it reads only after a [`synchronize`].
///
/// # Errors
/// As [`current`].
pub fn own(index: usize) -> Result<(), TorchError> {
    // SAFETY: any number may be asked for.
    check(unsafe { op_own_stream(index as i64) })
}

/// Waits until all that CUDA device `index` was given is done.
///
/// # Errors
/// As [`current`], or the error of an operation that ran before.
pub fn synchronize(index: usize) -> Result<(), TorchError> {
    // SAFETY: any number may be asked for.
    check(unsafe { op_synchronize(index as i64) })
}

/// A stream of libtorch's pool, the same for all, which is this thread's current one until it is dropped. All before
/// has been done when it begins, and all of it when it ends.
#[derive(Debug)]
pub struct SideStream {
    index: usize,
    before: i64,
}

impl SideStream {
    /// Takes a stream of CUDA device `index`.
    ///
    /// # Errors
    /// As [`synchronize`].
    pub fn enter(index: usize) -> Result<Self, TorchError> {
        let mut before = 0;
        // SAFETY: a place for the answer.
        check(unsafe { op_side_stream(index as i64, &raw mut before) })?;
        Ok(Self { index, before })
    }
}

impl Drop for SideStream {
    fn drop(&mut self) {
        // SAFETY: the stream that was current before.
        if let Err(error) = check(unsafe { op_restore_stream(self.index as i64, self.before) }) {
            tracing::error!("the stream before cannot be taken up again: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_cuda_there_is_no_stream() {
        if crate::cuda::is_available() {
            return eprintln!("skipped: there is a device");
        }
        for error in [
            current(0).unwrap_err(),
            synchronize(0).unwrap_err(),
            own(0).unwrap_err(),
            SideStream::enter(0).unwrap_err(),
        ] {
            assert!(error.0.contains("CUDA"), "{error}");
        }
    }
}
