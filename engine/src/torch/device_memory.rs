//! The memory of a CUDA device, and what libtorch's allocator holds of it.

use super::{TorchError, check, op_device_memory, op_empty_device_cache, op_reset_peak};

/// Bytes of a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Free, as the driver sees it; what the allocator holds is not.
    pub free: usize,
    /// All.
    pub total: usize,
    /// In tensors now.
    pub allocated: usize,
    /// In tensors at most, since the process began or [`reset_peak`].
    pub peak_allocated: usize,
    /// Held by the allocator now, tensors included.
    pub reserved: usize,
    /// Held by the allocator at most.
    pub peak_reserved: usize,
}

impl DeviceMemory {
    /// Of CUDA device `index`.
    ///
    /// # Errors
    /// If libtorch's CUDA half is not loaded, or no tensor has been on a CUDA device yet.
    pub fn of(index: usize) -> Result<Self, TorchError> {
        let mut bytes = [0; 6];
        // SAFETY: six places for the answer.
        check(unsafe { op_device_memory(index as i64, bytes.as_mut_ptr()) })?;
        let [free, total, allocated, peak_allocated, reserved, peak_reserved] =
            bytes.map(|bytes| usize::try_from(bytes).unwrap_or(0));
        Ok(Self { free, total, allocated, peak_allocated, reserved, peak_reserved })
    }

    /// Bytes that tensors can still take: what is free, and what the allocator holds unused.
    pub fn available(&self) -> usize {
        self.free + self.reserved.saturating_sub(self.allocated)
    }
}

/// Peaks are counted from here on.
///
/// # Errors
/// As [`DeviceMemory::of`].
pub fn reset_peak(index: usize) -> Result<(), TorchError> {
    // SAFETY: any number may be asked for.
    check(unsafe { op_reset_peak(index as i64) })
}

/// Gives what the allocator holds unused back to the driver, of all devices. Waits for them.
///
/// # Errors
/// As [`DeviceMemory::of`].
pub fn empty_cache() -> Result<(), TorchError> {
    // SAFETY: unused memory alone is given back.
    check(unsafe { op_empty_device_cache() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_cuda_there_is_no_memory() {
        if crate::cuda::is_available() {
            return eprintln!("skipped: there is a device");
        }
        let errors = [
            DeviceMemory::of(0).unwrap_err(),
            reset_peak(0).unwrap_err(),
            empty_cache().unwrap_err(),
        ];
        for error in errors {
            assert!(error.0.contains("CUDA"), "{error}");
        }
    }

    #[test]
    fn what_the_allocator_holds_unused_is_available() {
        let memory = DeviceMemory {
            free: 10,
            total: 100,
            allocated: 50,
            peak_allocated: 60,
            reserved: 70,
            peak_reserved: 75,
        };
        assert_eq!(memory.available(), 30);
    }
}
