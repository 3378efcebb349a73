//! Products of f32 matrices, on all kernel threads.
//!
//! One operand of a product lies across the lanes of vectors, the other one is broadcast:
//! a tile is a few broadcast rows times up to four vectors of lanes, in registers. In the
//! forward product the lanes are the rows of the batch and the weights are broadcast straight
//! from where they lie: they are never packed, copied or transposed, and a batch of one row to
//! sixteen runs at the speed at which memory delivers the weights.
//!
//! Every result is summed over the depth in order, from first to last, by one chain of fused
//! multiply-adds, whatever the shape of its tile and however the work is split. So a row of the
//! forward product is bitwise the same whatever other rows are in the batch.
//!
//! # Layout
//! - `product`: the operands, and the run over all threads.
//! - `plan`: how a product is cut into pieces and blocks, and which thread takes what.
//! - `piece`: the loops over blocks that fit the caches.
//! - `pack`: operands rearranged as tiles read them.
//! - `tile`: the inner loop, on registers.
//! - `sums`: results from and to the output.
//! - [`narrow`]: weights kept in f16, bf16 or int8, and products with them.
//! - `blocks`: squares of sixteen by sixteen numbers, and lines that an edge cuts short.

mod blocks;
pub mod narrow;
mod pack;
mod piece;
mod plan;
mod product;
mod sums;
mod tile;

use super::disjoint::Shared;
use super::parts::{Part, parts_of};
use super::simd::{LANES, Level};
use product::{Operand, Output, Product, Start, Summary, run_each};

/// Rows of a forward product that take as long as one, which is bound by reading the weights:
/// those that fill one register.
pub fn free_rows() -> usize {
    Level::best().register()
}

/// `c[m, n] = a[m, k] * b[n, k]^T`, plus `bias[n]` in every row if there is one: the output of
/// a linear layer with the weight `b`. Row `i` of `c` depends on row `i` of `a` alone, bitwise.
///
/// # Panics
/// If a length does not fit.
pub fn nt(a: &[f32], b: &[f32], bias: Option<&[f32]>, c: &mut [f32], [m, n, k]: [usize; 3]) {
    nt_at(Level::best(), [a, b], bias, c, [m, n, k]);
}

/// A product of [`nt_each`]: weight `[n, k]`, bias `[n]`, output `[m, n]`.
pub struct Layer<'a> {
    /// The weight.
    pub weight: &'a [f32],
    /// Added to every row, if there is one.
    pub bias: Option<&'a [f32]>,
    /// Where the results go.
    pub output: &'a mut [f32],
}

/// As [`nt`] with the same `a`, `[m, k]`, for every layer, in one go.
///
/// # Panics
/// If a length does not fit.
pub fn nt_each(a: &[f32], layers: &mut [Layer], [m, k]: [usize; 2]) {
    nt_each_at(Level::best(), a, layers, [m, k]);
}

/// `c[m, n] = a[m, k] * b[k, n]`: the gradient by the input of a linear layer, with the
/// gradient `a` by its output and its weight `b`. Row `i` of `c` depends on row `i` of `a` alone.
///
/// # Panics
/// If a length does not fit.
pub fn nn(a: &[f32], b: &[f32], c: &mut [f32], [m, n, k]: [usize; 3]) {
    nn_at(Level::best(), [a, b], c, [m, n, k]);
}

/// `c[m, n] = a[k, m]^T * b[k, n]`, added to what `c` holds if `accumulate`: the gradient by the
/// weight of a linear layer, with the gradient `a` by its output and its input `b`.
///
/// # Panics
/// If a length does not fit.
pub fn tn(a: &[f32], b: &[f32], accumulate: bool, c: &mut [f32], [m, n, k]: [usize; 3]) {
    tn_at(Level::best(), [a, b], accumulate, c, [m, n, k]);
}

/// What [`nt_summed`] computes of the rows of `c`.
pub struct Summed<'a> {
    /// The first rows of `c` themselves, `[w, n]` for some `w`; they are not summed.
    pub written: &'a mut [f32],
    /// Factors of the rows of `c`, `[m]`; those of rows that are written are not used.
    pub inv_temperatures: &'a [f32],
    /// The parts of sixteen rows after those of the sixteen before, [`parts_of`]`(n)` each; none of
    /// sixteen that are all written.
    pub parts: &'a mut [Part],
}

/// `c[m, n]` of [`nt`], bit for bit, but summed up as it is made instead of written. The parts of
/// a row depend on this row alone, bitwise.
///
/// # Panics
/// If a length does not fit.
pub fn nt_summed(a: &[f32], b: &[f32], sums: Summed, [m, n, k]: [usize; 3]) {
    nt_summed_at(Level::best(), [a, b], sums, [m, n, k]);
}

pub(crate) fn nt_at(
    level: Level,
    [a, b]: [&[f32]; 2],
    bias: Option<&[f32]>,
    c: &mut [f32],
    [m, n, k]: [usize; 3],
) {
    forward([a, b], bias, c, [m, n, k]).run(level, c);
}

fn nt_each_at(level: Level, a: &[f32], layers: &mut [Layer], [m, k]: [usize; 2]) {
    let products = layers.iter().map(|Layer { weight, bias, output }| {
        forward([a, *weight], *bias, output, [m, output.len() / m.max(1), k])
    });
    let products: Vec<Product> = products.collect();
    let outputs = layers.iter_mut().map(|layer| &mut *layer.output);
    run_each(level, &mut products.iter().zip(outputs).collect::<Vec<_>>());
}

/// The product of a linear layer.
fn forward<'a>(
    [a, b]: [&'a [f32]; 2],
    bias: Option<&'a [f32]>,
    c: &[f32],
    [m, n, k]: [usize; 3],
) -> Product<'a> {
    check([a, b, c], [[m, k], [n, k], [m, n]]);
    assert!(bias.is_none_or(|bias| bias.len() == n), "the bias must be [{n}]");
    Product {
        lanes: Operand { data: a, stride: k, depth_inner: true },
        rows: Operand { data: b, stride: k, depth_inner: true },
        shape: [m, n, k],
        output: Output::LaneByRow,
        start: bias.map_or(Start::Zero, Start::Bias),
        summary: None,
    }
}

pub(crate) fn nt_summed_at(level: Level, [a, b]: [&[f32]; 2], sums: Summed, [m, n, k]: [usize; 3]) {
    let Summed { written, inv_temperatures, parts } = sums;
    let rows = written.len().checked_div(n).unwrap_or(0);
    check([a, b, written], [[m, k], [n, k], [rows, n]]);
    assert!(rows <= m && inv_temperatures.len() == m, "one inverse temperature for each of {m}");
    let vectors = m.div_ceil(LANES) - rows / LANES;
    assert_eq!(parts.len(), vectors * parts_of(n), "parts must be [{vectors}, {n} / 48]");
    Product {
        lanes: Operand { data: a, stride: k, depth_inner: true },
        rows: Operand { data: b, stride: k, depth_inner: true },
        shape: [m, n, k],
        output: Output::LaneByRow,
        start: Start::Zero,
        summary: Some(Summary { written: rows, inv_temperatures, parts: Shared::new(parts) }),
    }
    .run(level, written);
}

fn nn_at(level: Level, [a, b]: [&[f32]; 2], c: &mut [f32], [m, n, k]: [usize; 3]) {
    check([a, b, c], [[m, k], [k, n], [m, n]]);
    Product {
        lanes: Operand { data: b, stride: n, depth_inner: false },
        rows: Operand { data: a, stride: k, depth_inner: true },
        shape: [n, m, k],
        output: Output::RowByLane,
        start: Start::Zero,
        summary: None,
    }
    .run(level, c);
}

fn tn_at(
    level: Level,
    [a, b]: [&[f32]; 2],
    accumulate: bool,
    c: &mut [f32],
    [m, n, k]: [usize; 3],
) {
    check([a, b, c], [[k, m], [k, n], [m, n]]);
    Product {
        lanes: Operand { data: b, stride: n, depth_inner: false },
        rows: Operand { data: a, stride: m, depth_inner: false },
        shape: [n, m, k],
        output: Output::RowByLane,
        start: if accumulate { Start::Present } else { Start::Zero },
        summary: None,
    }
    .run(level, c);
}

fn check(matrices: [&[f32]; 3], shapes: [[usize; 2]; 3]) {
    for ((name, matrix), [rows, columns]) in ["a", "b", "c"].iter().zip(matrices).zip(shapes) {
        let len = rows.checked_mul(columns);
        assert_eq!(Some(matrix.len()), len, "{name} must be [{rows}, {columns}]");
    }
}

#[cfg(test)]
mod tests;
