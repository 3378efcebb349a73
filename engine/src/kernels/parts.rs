//! Parts of the sums over rows of logits, made from tiles of a matrix product while they are in
//! the first-level cache.
//!
//! In such a tile sixteen rows of logits lie across the lanes, and the tokens follow each other:
//! so the sums of sixteen rows are made at once, and nothing is turned. A part covers
//! [`PART`] tokens, whatever the batch, the tiles and the threads are.

use super::rows::LOWEST;
use super::simd::{LANES, Line, Simd, exp};

/// Tokens of a cell, the least that a draw looks at.
pub const CELL: usize = 16;
/// Cells of a part.
pub const CELLS: usize = 3;
/// Tokens of a part.
pub const PART: usize = CELL * CELLS;

/// Tokens whose sums are one chain of additions in f32.
const CHAIN: usize = 4;

/// Sums over [`PART`] neighbouring tokens, for each of sixteen rows: one in each lane. With m the
/// largest of the row's logits here, `d = (x - m) * inv_temperature`. The row's last part may be
/// shorter; what it lacks counts as logits of minus infinity.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Part {
    /// Largest logit of each cell: NaN left out, `f32::MIN` if there is none above.
    pub maxima: [Line; CELLS],
    /// Sum of e^d of each cell.
    pub masses: [Line; CELLS],
    /// Sum of e^d d.
    pub a1: Line,
    /// Sum of e^2d.
    pub b: Line,
    /// Sum of e^2d d.
    pub c: Line,
}

impl Part {
    /// Room for a part.
    pub const EMPTY: Self = {
        let zero = Line([0.0; LANES]);
        Self { maxima: [zero; CELLS], masses: [zero; CELLS], a1: zero, b: zero, c: zero }
    };
}

/// Parts of a row of `vocab` logits.
pub fn parts_of(vocab: usize) -> usize {
    vocab.div_ceil(PART)
}

/// The part of the rows in vector `w` of a tile.
#[inline(always)]
pub(super) fn sum<S: Simd, const W: usize>(
    s: S,
    tile: &[[Line; W]; PART],
    w: usize,
    inv_temperature: S::V,
) -> Part {
    let mut part = Part::EMPTY;
    let cells = tile.as_chunks::<CELL>().0;
    let mut max = s.splat(f32::MIN);
    for (cell, line) in cells.iter().zip(&mut part.maxima) {
        let logits = cell.iter().map(|row| s.load(&row[w].0));
        let largest = logits.fold(s.splat(f32::MIN), |max, x| s.max(x, max));
        s.store(largest, &mut line.0);
        max = s.max(largest, max);
    }
    let mut sums = [s.splat(0.0); 3];
    for (cell, mass) in cells.iter().zip(&mut part.masses) {
        let mut cell_sums = [s.splat(0.0); 4];
        for chain in cell.as_chunks::<CHAIN>().0 {
            let logits = chain.map(|row| s.load(&row[w].0));
            let moments = sum_chain(s, logits, max, inv_temperature);
            for (sum, moment) in cell_sums.iter_mut().zip(moments) {
                *sum = s.add(*sum, moment);
            }
        }
        s.store(cell_sums[0], &mut mass.0);
        for (sum, cell_sum) in sums.iter_mut().zip(&cell_sums[1..]) {
            *sum = s.add(*sum, *cell_sum);
        }
    }
    for (sum, line) in sums.into_iter().zip([&mut part.a1, &mut part.b, &mut part.c]) {
        s.store(sum, &mut line.0);
    }
    part
}

/// Sums of e^d, e^d d, e^2d and e^2d d.
#[inline(always)]
fn sum_chain<S: Simd>(s: S, logits: [S::V; CHAIN], max: S::V, inv_temperature: S::V) -> [S::V; 4] {
    let mut sums = [s.splat(0.0); 4];
    for x in logits {
        // NaN stays NaN in this order.
        let d = s.max(s.splat(LOWEST), s.mul(s.sub(x, max), inv_temperature));
        let e = exp(s, d);
        let square = s.mul(e, e);
        sums[0] = s.add(sums[0], e);
        sums[1] = s.mul_add(e, d, sums[1]);
        sums[2] = s.add(sums[2], square);
        sums[3] = s.mul_add(square, d, sums[3]);
    }
    sums
}
