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

/// As [`sum`], bit for bit, of the first `FEW` rows alone in a tile of one vector; their parts'
/// other lanes mean nothing. Chains lie side by side across the lanes, so that few are empty.
/// `FEW` is 4 or 8.
#[inline(always)]
pub(super) fn sum_few<S: Simd, const FEW: usize>(
    s: S,
    tile: &[Line; PART],
    inv_temperatures: &[f32],
) -> Part {
    let mut part = Part::EMPTY;
    let inv_temperature = repeat::<S, FEW>(s, inv_temperatures);
    let mut chains = [[[s.splat(0.0); CHAIN]; 2]; CELLS];
    let mut max = [f32::MIN; FEW];
    for (i, cell) in tile.as_chunks::<CELL>().0.iter().enumerate() {
        let mut largest = [f32::MIN; FEW];
        for (chains, rows) in chains[i].iter_mut().zip(cell.chunks_exact(CELL * CHAIN / FEW)) {
            *chains = std::array::from_fn(|step| side_by_side::<S, FEW>(s, &rows[step..]));
            let top = chains.iter().fold(s.splat(f32::MIN), |max, &x| s.max(x, max));
            for lanes in s.to_array(top).chunks_exact(FEW) {
                (0..FEW).for_each(|lane| largest[lane] = largest[lane].max(lanes[lane]));
            }
        }
        part.maxima[i].0[..FEW].copy_from_slice(&largest);
        (0..FEW).for_each(|lane| max[lane] = max[lane].max(largest[lane]));
    }
    let max = repeat::<S, FEW>(s, &max);
    let mut sums = [[0.0; FEW]; 3];
    for (chains, mass) in chains.iter().zip(&mut part.masses) {
        let mut cell_sums = [[0.0; FEW]; 4];
        for &chains in &chains[..FEW / CHAIN] {
            let moments = sum_chain(s, chains, max, inv_temperature);
            for (sum, moment) in cell_sums.iter_mut().zip(moments) {
                for lanes in s.to_array(moment).chunks_exact(FEW) {
                    (0..FEW).for_each(|lane| sum[lane] += lanes[lane]);
                }
            }
        }
        mass.0[..FEW].copy_from_slice(&cell_sums[0]);
        for (sum, cell_sum) in sums.iter_mut().zip(&cell_sums[1..]) {
            (0..FEW).for_each(|lane| sum[lane] += cell_sum[lane]);
        }
    }
    for (sum, line) in sums.iter().zip([&mut part.a1, &mut part.b, &mut part.c]) {
        line.0[..FEW].copy_from_slice(sum);
    }
    part
}

/// Up to `FEW` numbers again and again; 0 for those that lack.
#[inline(always)]
fn repeat<S: Simd, const FEW: usize>(s: S, few: &[f32]) -> S::V {
    let mut line = [0.0; LANES];
    for lanes in line.chunks_exact_mut(FEW) {
        lanes[..few.len()].copy_from_slice(few);
    }
    s.load(&line)
}

/// The first `FEW` lanes of every [`CHAIN`]-th row.
#[inline(always)]
fn side_by_side<S: Simd, const FEW: usize>(s: S, rows: &[Line]) -> S::V {
    let mut line = [0.0; LANES];
    for (lanes, row) in line.chunks_exact_mut(FEW).zip(rows.iter().step_by(CHAIN)) {
        lanes.copy_from_slice(&row.0[..FEW]);
    }
    s.load(&line)
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
