//! A point in what a CUDA device was given to do, to wait for without waiting for what came later.

use super::{TorchError, check, op_event_free, op_event_record, op_event_wait};
use std::{
    ffi::c_void,
    ptr::{NonNull, null_mut},
};

/// A point in a stream.
#[derive(Debug)]
pub struct Event(NonNull<c_void>);

impl Event {
    /// The end of all that this thread's current stream of CUDA device `index` was given by now.
    ///
    /// # Errors
    /// If libtorch's CUDA half is not loaded, or has no such device.
    pub fn record(index: usize) -> Result<Self, TorchError> {
        let mut raw = null_mut();
        // SAFETY: a place for the answer.
        check(unsafe { op_event_record(index as i64, &raw mut raw) })?;
        Ok(Self(NonNull::new(raw).expect("an event that was recorded")))
    }

    /// Waits until the device has come there.
    ///
    /// # Errors
    /// That of an operation that ran before.
    pub fn wait(&self) -> Result<(), TorchError> {
        // SAFETY: an event that was recorded.
        check(unsafe { op_event_wait(self.0.as_ptr()) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: it is not used any more.
        if let Err(error) = check(unsafe { op_event_free(self.0.as_ptr()) }) {
            tracing::error!("an event cannot be freed: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_cuda_there_is_no_event() {
        if crate::cuda::is_available() {
            return eprintln!("skipped: there is a device");
        }
        let error = Event::record(0).unwrap_err();
        assert!(error.0.contains("CUDA"), "{error}");
    }
}
