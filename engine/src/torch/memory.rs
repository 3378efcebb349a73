//! How the process deals with memory that libtorch frees, and memory that is handed out as it is
//! used.

use super::op_keep_freed_memory;
use std::{
    ffi::{c_int, c_void},
    ops::{Deref, DerefMut},
    ptr::{NonNull, null_mut},
};

// The C library's, which the standard library links anyway; values as on Linux and, for the last
// one, on the BSDs.
const READ: c_int = 1;
const WRITE: c_int = 2;
const PRIVATE: c_int = 2;
const ANONYMOUS: c_int = if cfg!(target_os = "linux") { 0x20 } else { 0x1000 };

unsafe extern "C" {
    fn mmap(
        at: *mut c_void,
        bytes: usize,
        access: c_int,
        kind: c_int,
        file: c_int,
        offset: i64,
    ) -> *mut c_void;
    fn munmap(start: *mut c_void, bytes: usize) -> c_int;
    #[cfg(target_env = "gnu")]
    fn malloc_trim(pad: usize) -> c_int;
}

/// What is free now goes back to the system; from now on freed memory stays with the process. A
/// training step frees and takes gigabytes, and the system zeroes every page that it hands out
/// anew, which took half of a step's time on a virtual machine. False where the C library has no such setting.
pub fn keep_freed() -> bool {
    // SAFETY: gives free memory back, which may be done at any time.
    #[cfg(target_env = "gnu")]
    unsafe {
        malloc_trim(0)
    };
    // SAFETY: sets options of the allocator, which may be done at any time.
    unsafe { op_keep_freed_memory() }
}

/// Zeroed floats straight from the system, which hands out each page when it is first written. The
/// allocator would write zeros over memory that it has kept, and so take all of it at once.
pub struct Zeroed {
    start: NonNull<f32>,
    len: usize,
}

// SAFETY: it owns its memory, as a `Vec` does.
unsafe impl Send for Zeroed {}
// SAFETY: as above; shared handles only read.
unsafe impl Sync for Zeroed {}

impl Zeroed {
    /// `len` zeros; at least one.
    ///
    /// # Panics
    /// If the system refuses.
    pub fn new(len: usize) -> Self {
        assert!(len > 0, "at least one float");
        let bytes = len * size_of::<f32>();
        let (access, kind) = (READ | WRITE, PRIVATE | ANONYMOUS);
        // SAFETY: a new mapping at an address that the system picks.
        let start = unsafe { mmap(null_mut(), bytes, access, kind, -1, 0) };
        assert!(start.addr() != usize::MAX, "the system refuses {bytes} bytes of memory");
        Self { start: NonNull::new(start.cast()).expect("no mapping at 0"), len }
    }
}

impl Deref for Zeroed {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: the mapping holds `len` floats, page-aligned, until it is dropped.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Zeroed {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `deref`, and `&mut` makes it the only handle.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Zeroed {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made, whole, and nothing borrows it any more.
        unsafe { munmap(self.start.as_ptr().cast(), self.len * size_of::<f32>()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroed_floats_can_be_written() {
        let mut floats = Zeroed::new(10_000);
        assert!(floats.iter().all(|&x| x == 0.0));
        floats[9_999] = 1.5;
        assert_eq!((floats.len(), floats[9_999], floats[0]), (10_000, 1.5, 0.0));
    }
}
