//! A piece of a product: its loops over blocks that fit the caches.

use std::ops::Range;

use super::pack::{Panel, pack_lanes, pack_rows, panels, row_lines};
use super::plan::{GROUP, Plan, ranges};
use super::product::Product;
use super::tile::{Filled, Rows, multiply, widest};
use crate::kernels::disjoint::Shared;
use crate::kernels::simd::{Kernel, LANES, Line, Simd};

/// Some lanes and rows of a product.
pub(super) struct Piece<'a> {
    pub(super) product: &'a Product<'a>,
    pub(super) plan: &'a Plan,
    pub(super) output: &'a Shared<'a, f32>,
    pub(super) lanes: Range<usize>,
    pub(super) rows: Range<usize>,
    pub(super) scratch: &'a mut Scratch,
}

/// A thread's memory, kept from product to product.
pub(super) struct Scratch {
    /// Blocks of lanes, packed.
    lanes: Vec<Line>,
    /// Where those blocks start in the product: lane and depth.
    packed: Vec<[usize; 2]>,
    /// A group of rows, packed.
    rows: Vec<Line>,
    /// Sums of a group of rows and a panel: `[row][vector]`.
    pub(super) sums: Vec<Line>,
}

impl Scratch {
    pub(super) const EMPTY: Self =
        Self { lanes: Vec::new(), packed: Vec::new(), rows: Vec::new(), sums: Vec::new() };

    /// Forgets what was packed: another product begins.
    pub(super) fn forget(&mut self) {
        self.packed.clear();
    }
}

/// Makes room for so many lines; never gives any back.
fn grow(lines: &mut Vec<Line>, len: usize) -> &mut [Line] {
    if lines.len() < len {
        lines.resize(len, Line([0.0; LANES]));
    }
    &mut lines[..len]
}

impl Kernel for Piece<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        grow(&mut self.scratch.sums, GROUP * widest::<S>());
        for depth in self.plan.depths() {
            let packed = self.pack_lanes(s, &depth);
            for rows in ranges(self.rows.clone(), GROUP) {
                self.pack_rows(s, [&rows, &depth]);
                for panel in panels::<S>(self.lanes.len()) {
                    self.start(s, panel, &rows, depth.start);
                    self.multiply(s, panel, packed, [&rows, &depth]);
                    self.finish(s, panel, &rows);
                }
            }
        }
    }
}

impl Piece<'_> {
    /// Packs the lanes for a block of the depth, unless they still are; says where they lie.
    #[inline(always)]
    fn pack_lanes<S: Simd>(&mut self, s: S, depth: &Range<usize>) -> usize {
        let vectors = self.lanes.len().div_ceil(LANES);
        let whole = self.plan.whole;
        let at = if whole { depth.start * vectors } else { 0 };
        let Scratch { lanes, packed, .. } = &mut *self.scratch;
        let block = [self.lanes.start, depth.start];
        if !packed.contains(&block) {
            packed.retain(|other| whole && other[0] == block[0]);
            packed.push(block);
            let lines = &mut grow(lanes, at + vectors * depth.len())[at..];
            pack_lanes(s, &self.product.lanes, [self.lanes.clone(), depth.clone()], lines);
        }
        at
    }

    /// Packs a group of rows, if tiles cannot read them where they are.
    #[inline(always)]
    fn pack_rows<S: Simd>(&mut self, s: S, [rows, depth]: [&Range<usize>; 2]) {
        let operand = &self.product.rows;
        if !operand.depth_inner {
            let packed = grow(&mut self.scratch.rows, GROUP * row_lines(depth.len()));
            pack_rows(s, operand, [rows.clone(), depth.clone()], packed);
        }
    }

    /// Adds the products of a group of rows and a panel, of lanes packed at `packed`.
    #[inline(always)]
    fn multiply<S: Simd>(
        &mut self,
        s: S,
        panel: Panel,
        packed: usize,
        [rows, depth]: [&Range<usize>; 2],
    ) {
        let operand = &self.product.rows;
        let source = if operand.depth_inner {
            let data = &operand.data[rows.start * operand.stride + depth.start..];
            Rows { data, stride: operand.stride }
        } else {
            let data = Line::flatten(&self.scratch.rows);
            Rows { data, stride: row_lines(depth.len()) * LANES }
        };
        let lines = &self.scratch.lanes[packed + panel.first * depth.len()..];
        let lines = &lines[..panel.width * depth.len()];
        let sums = &mut self.scratch.sums[..panel.width * rows.len()];
        let filled = if self.lanes.len() <= LANES / 2 { Filled::Half } else { Filled::All };
        multiply(s, (panel.width, filled), lines, source, sums);
    }

    /// Lanes of a panel.
    pub(super) fn lanes_of(&self, panel: Panel) -> Range<usize> {
        let start = self.lanes.start + panel.first * LANES;
        start..self.lanes.end.min(start + panel.width * LANES)
    }
}
