//! Squares of sixteen by sixteen numbers, and lines that an edge cuts short.

use crate::kernels::simd::{LANES, Simd};

/// Sixteen vectors: `rows` rows of `from`, `stride` apart, `columns` numbers each; the rest is 0.
#[inline(always)]
pub(super) fn load_block<S: Simd>(
    s: S,
    from: &[f32],
    stride: usize,
    [rows, columns]: [usize; 2],
) -> [S::V; LANES] {
    let mut block = [s.splat(0.0); LANES];
    if columns >= LANES {
        for (i, v) in block.iter_mut().enumerate().take(rows) {
            *v = s.load(from[i * stride..].first_chunk().expect("a whole line"));
        }
    } else {
        for (i, v) in block.iter_mut().enumerate().take(rows) {
            *v = load_part(s, &from[i * stride..][..columns]);
        }
    }
    block
}

/// A vector out of up to sixteen numbers; the other lanes are 0.
#[inline(always)]
pub(super) fn load_part<S: Simd>(s: S, from: &[f32]) -> S::V {
    if let Some(line) = from.first_chunk() {
        return s.load(line);
    }
    let mut line = [0.0; LANES];
    line[..from.len()].copy_from_slice(from);
    s.load(&line)
}

/// Writes the lanes that fit.
#[inline(always)]
pub(super) fn store_part<S: Simd>(s: S, v: S::V, to: &mut [f32]) {
    if let Some(line) = to.first_chunk_mut() {
        return s.store(v, line);
    }
    let line = s.to_array(v);
    to.copy_from_slice(&line[..to.len()]);
}
