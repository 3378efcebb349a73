//! Weights kept in f16, bf16 or int8, and products with them.
//!
//! A batch of a few rows is bound by the memory that the weights are read from, so half the bytes
//! are twice the speed. Weights are packed once: their rows across the lanes of vectors, in
//! panels that are read from first to last. Products widen them to f32 in registers and sum in f32;
//! for many rows a block of a panel stays in the first-level cache while all of them pass over it.
//!
//! As in the products of f32, every result is summed over the depth in order, by one chain of
//! fused multiply-adds: it is bitwise what [`nt`](super::nt) makes of the rounded weights, and a
//! row does not depend on the others of its batch. Scale and bias follow in one more step.
//!
//! # Layout
//! - `format`: sixteen weights in f16, bf16 or int8.
//! - `packed`: a whole weight, packed.
//! - `product`: a batch of rows times a packed weight.

mod format;
mod packed;
mod product;

use crate::kernels::simd::Level;
use format::{Bf16, F16, Int8};
use packed::Packed;
use product::Product;

/// Rows of a product that take as long as one, which is bound by reading the weights.
pub const FREE_ROWS: usize = 4;

/// How weights are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// IEEE 754 binary16; weights must stay below 65520.
    F16,
    /// The upper half of f32.
    Bf16,
    /// Integers between -127 and 127, and a scale in f32 for each row, so that the largest
    /// magnitude of the row is 127.
    Int8,
}

/// A weight `[n, k]` in a narrow format, packed for products.
pub struct Narrow(Kept);

enum Kept {
    F16(Packed<F16>),
    Bf16(Packed<Bf16>),
    Int8(Packed<Int8>),
}

/// The same for every format.
macro_rules! each {
    ($kept:expr, $packed:ident => $value:expr) => {
        match $kept {
            Kept::F16($packed) => $value,
            Kept::Bf16($packed) => $value,
            Kept::Int8($packed) => $value,
        }
    };
}

impl Narrow {
    /// Room for a weight `[n, k]`, all 0.
    pub fn new(format: Format, shape: [usize; 2]) -> Self {
        Self::new_at(Level::best(), format, shape)
    }

    fn new_at(level: Level, format: Format, shape: [usize; 2]) -> Self {
        Self(match format {
            Format::F16 => Kept::F16(Packed::new(level, shape)),
            Format::Bf16 => Kept::Bf16(Packed::new(level, shape)),
            Format::Int8 => Kept::Int8(Packed::new(level, shape)),
        })
    }

    /// Rounds and packs `weights`, `[n, k]`, on all kernel threads.
    ///
    /// # Panics
    /// If the length does not fit.
    pub fn pack(&mut self, weights: &[f32]) {
        let [n, k] = self.shape();
        assert_eq!(weights.len(), n * k, "the weight must be [{n}, {k}]");
        each!(&mut self.0, packed => packed.pack(weights));
    }

    /// Gives its memory back to the system until it is packed again; false if the system does not
    /// take it. It is all 0 meanwhile, or worth nothing.
    pub fn give_back(&mut self) -> bool {
        each!(&mut self.0, packed => packed.give_back())
    }

    /// `[n, k]`.
    pub fn shape(&self) -> [usize; 2] {
        each!(&self.0, packed => packed.shape)
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        each!(&self.0, packed => packed.bytes())
    }

    /// `y[m, n] = x[m, k] * weight^T`, plus `bias[n]` in every row if there is one, on libtorch's
    /// threads. Row `i` of `y` depends on row `i` of `x` alone, bitwise.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn multiply(&self, x: &[f32], bias: Option<&[f32]>, y: &mut [f32]) {
        let [n, k] = self.shape();
        assert!(bias.is_none_or(|bias| bias.len() == n), "the bias must be [{n}]");
        let fits = y.len() * k == x.len() * n && (n == 0 || y.len().is_multiple_of(n));
        assert!(fits, "x and y must be [m, {k}] and [m, {n}]");
        each!(&self.0, weight => Product { weight, x, bias }.run(y));
    }
}

#[cfg(test)]
mod tests;
