//! How the process deals with memory that libtorch frees, and memory that is handed out as it is
//! used.

use super::op_keep_freed_memory;
use std::{
    ffi::{c_int, c_long, c_void},
    ops::{Deref, DerefMut},
    ptr::{NonNull, null_mut},
};

// The C library's, which the standard library links anyway; values as on Linux and, for the last
// one, on the BSDs.
const READ: c_int = 1;
const WRITE: c_int = 2;
const PRIVATE: c_int = 2;
const ANONYMOUS: c_int = if cfg!(target_os = "linux") { 0x20 } else { 0x1000 };
#[cfg(target_os = "linux")]
const DONT_NEED: c_int = 4;
#[cfg(target_os = "linux")]
const PAGE_SIZE: c_int = 30;

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
    #[cfg(target_os = "linux")]
    fn madvise(start: *mut c_void, bytes: usize, advice: c_int) -> c_int;
    #[cfg(target_os = "linux")]
    fn sysconf(name: c_int) -> c_long;
    #[cfg(target_env = "gnu")]
    fn malloc_trim(pad: usize) -> c_int;
}

/// What the allocator holds free goes back to the system.
pub fn trim() {
    // SAFETY: gives free memory back, which may be done at any time.
    #[cfg(target_env = "gnu")]
    unsafe {
        malloc_trim(0)
    };
}

/// Gives the whole pages that the floats lie in back to the system. They read as 0 from now on, and
/// the system hands pages out again as they are written; floats beside those pages stay. False if
/// the system does not take them.
pub fn give_back(floats: &mut [f32]) -> bool {
    // SAFETY: 0 bits are the float 0.
    unsafe { give_back_raw(floats) }
}

/// As [`give_back`], for other plain values.
///
/// # Safety
/// A value whose bits are all 0, in any of its bytes, is a valid `T`.
pub unsafe fn give_back_raw<T: Copy>(values: &mut [T]) -> bool {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: asks for a number.
        let page = usize::try_from(unsafe { sysconf(PAGE_SIZE) }).unwrap_or(1 << 16);
        let start = values.as_mut_ptr().cast::<u8>();
        let skipped = start.align_offset(page);
        let bytes = size_of_val(values).saturating_sub(skipped) / page * page;
        // SAFETY: whole pages inside of memory that is borrowed exclusively; memory of the
        // allocator and of `Zeroed` is private and anonymous, so they read as 0 afterwards.
        bytes == 0 || unsafe { madvise(start.add(skipped).cast(), bytes, DONT_NEED) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = values;
        false
    }
}

/// What is free now goes back to the system; from now on freed memory stays with the process. A
/// training step frees and takes gigabytes, and the system zeroes every page that it hands out
/// anew, which took half of a step's time on a virtual machine. False where the C library has no such setting.
pub fn keep_freed() -> bool {
    trim();
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

    #[test]
    #[cfg(target_os = "linux")]
    fn what_is_given_back_reads_as_zero_and_can_be_written() {
        let mut floats = vec![1.5f32; 100_000];
        assert!(give_back(&mut floats));
        let zeros = floats.iter().filter(|&&x| x == 0.0).count();
        // At most a page at each end is not whole.
        assert!(zeros > 100_000 - 2 * 16_384 && zeros.is_multiple_of(1024), "{zeros}");
        assert_eq!(floats.iter().filter(|&&x| x == 1.5).count(), 100_000 - zeros);
        floats.fill(2.5);
        assert!(floats.iter().all(|&x| x == 2.5));
        assert!(give_back(&mut floats[..100]), "less than a page is left alone");
        assert_eq!(floats[50], 2.5);
    }
}
