//! What tch does not bind, and the thread pool shared with libtorch.

pub mod parallel;
