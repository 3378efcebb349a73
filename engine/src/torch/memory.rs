//! How the process deals with memory that libtorch frees.

use super::op_keep_freed_memory;

/// From now on freed memory stays with the process. A training step frees and takes gigabytes, and
/// the system zeroes every page that it hands out anew, which took half of a step's time on a
/// virtual machine. False where the C library has no such setting.
pub fn keep_freed() -> bool {
    // SAFETY: sets options of the allocator, which may be done at any time.
    unsafe { op_keep_freed_memory() }
}
