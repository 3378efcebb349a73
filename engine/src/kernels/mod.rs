//! Matrix products, attention over pages, element-wise operations and passes over logits, on the
//! CPU.
//!
//! # Layout
//! - [`matmul`]: matrix products of f32, forward and backward.
//! - [`attention`]: every query row over the pages of its sequence.
//! - [`packed`]: attention within packed groups, forward and backward.
//! - [`pages`]: the pages' layout; writing and copying them.
//! - [`elementwise`]: norm, gate and rotary embedding, forward and backward.
//! - [`rows`]: passes over one row of logits.
//! - [`parts`]: sums over rows of logits, made while a product computes these.
//! - `tiles`: the inner loops of attention, on registers.
//! - [`simd`]: sixteen lanes of f32 on AVX-512, AVX2 or anything, chosen at run time.
//! - [`disjoint`]: parallel loops over parts of a slice. [`parallel`]: the threads that they run on.

pub mod attention;
pub mod disjoint;
pub mod elementwise;
pub mod matmul;
pub mod packed;
pub mod pages;
pub mod parallel;
pub mod parts;
pub mod rows;
pub mod simd;
mod tiles;
