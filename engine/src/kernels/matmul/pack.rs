//! Operands rearranged as tiles read them.

use std::ops::Range;

use super::blocks::{load_block, load_part};
use super::product::Operand;
use super::tile::widest;
use crate::kernels::simd::{LANES, Line, Simd};

/// Some vectors of lanes that go through tiles together.
#[derive(Clone, Copy)]
pub(super) struct Panel {
    /// The first vector, counted from the start of the block.
    pub(super) first: usize,
    /// Vectors.
    pub(super) width: usize,
}

/// A block of lanes cut into panels of about equal width.
pub(super) fn panels<S: Simd>(lanes: usize) -> impl Iterator<Item = Panel> {
    let vectors = lanes.div_ceil(LANES);
    let count = vectors.div_ceil(widest::<S>());
    (0..count).map(move |i| {
        let first = vectors * i / count;
        Panel { first, width: vectors * (i + 1) / count - first }
    })
}

/// Packs a block: its panels one after the other, each `[depth][width]` vectors. Lanes beyond
/// the last are 0.
#[inline(always)]
pub(super) fn pack_lanes<S: Simd>(
    s: S,
    operand: &Operand,
    [lanes, depth]: [Range<usize>; 2],
    packed: &mut [Line],
) {
    for panel in panels::<S>(lanes.len()) {
        let start = lanes.start + panel.first * LANES;
        let lanes = start..lanes.end.min(start + panel.width * LANES);
        let packed = &mut packed[panel.first * depth.len()..][..panel.width * depth.len()];
        if operand.depth_inner {
            turn_panel(s, operand, [lanes, depth.clone()], packed);
        } else {
            copy_panel(s, operand, [lanes, depth.clone()], packed);
        }
    }
}

#[inline(always)]
fn turn_panel<S: Simd>(
    s: S,
    operand: &Operand,
    [lanes, depth]: [Range<usize>; 2],
    packed: &mut [Line],
) {
    let width = lanes.len().div_ceil(LANES);
    for (i, packed) in packed.chunks_mut(LANES * width).enumerate() {
        let k = depth.start + i * LANES;
        let steps = packed.len() / width;
        for w in 0..width {
            let lane = lanes.start + w * LANES;
            let from = &operand.data[lane * operand.stride + k..];
            let shape = [LANES.min(lanes.end - lane), LANES.min(steps)];
            let block = s.transpose(load_block(s, from, operand.stride, shape));
            for (step, v) in block.into_iter().enumerate().take(steps) {
                s.store(v, &mut packed[step * width + w].0);
            }
        }
    }
}

#[inline(always)]
fn copy_panel<S: Simd>(
    s: S,
    operand: &Operand,
    [lanes, depth]: [Range<usize>; 2],
    packed: &mut [Line],
) {
    let width = lanes.len().div_ceil(LANES);
    for (k, packed) in depth.zip(packed.chunks_exact_mut(width)) {
        let from = &operand.data[k * operand.stride..][lanes.clone()];
        for (line, from) in packed.iter_mut().zip(from.chunks(LANES)) {
            s.store(load_part(s, from), &mut line.0);
        }
    }
}

/// Lines that a packed row of some depth takes.
pub(super) fn row_lines(depth: usize) -> usize {
    depth.div_ceil(LANES) + 1
}

/// Packs rows whose numbers do not lie side by side: [`row_lines`] lines for each.
#[inline(always)]
pub(super) fn pack_rows<S: Simd>(
    s: S,
    operand: &Operand,
    [rows, depth]: [Range<usize>; 2],
    packed: &mut [Line],
) {
    let lines = row_lines(depth.len());
    for (line, k) in depth.clone().step_by(LANES).enumerate() {
        for row in rows.clone().step_by(LANES) {
            let from = &operand.data[k * operand.stride + row..];
            let count = LANES.min(rows.end - row);
            let shape = [LANES.min(depth.end - k), count];
            let block = s.transpose(load_block(s, from, operand.stride, shape));
            let packed = packed[(row - rows.start) * lines + line..].iter_mut().step_by(lines);
            for (packed, v) in packed.zip(block).take(count) {
                s.store(v, &mut packed.0);
            }
        }
    }
}
