//! The loops over blocks that fit the caches.

use std::cell::RefCell;
use std::ops::Range;

use super::blocks::{load_block, load_part, store_part};
use super::pack::{Panel, pack_lanes, pack_rows, panels, row_lines};
use super::plan::{GROUP, Plan, Shares, ranges};
use super::tile::{Rows, multiply, widest};
use crate::kernels::disjoint::Shared;
use crate::kernels::simd::{Kernel, LANES, Level, Line, Simd};

/// One side of a product.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    pub(super) data: &'a [f32],
    /// Numbers from one line of memory to the next.
    pub(super) stride: usize,
    /// Whether the depth runs along a line; otherwise from line to line.
    pub(super) depth_inner: bool,
}

/// The order of the results in memory.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Output {
    LaneByRow,
    RowByLane,
}

/// What the products are added to.
#[derive(Clone, Copy)]
pub(super) enum Start<'a> {
    Zero,
    /// A number for each row.
    Bias(&'a [f32]),
    /// What is there.
    Present,
}

/// `output[lane, row] = start + sum over k of lanes[lane, k] * rows[row, k]`.
pub(super) struct Product<'a> {
    pub(super) lanes: Operand<'a>,
    pub(super) rows: Operand<'a>,
    /// `[lanes, rows, depth]`.
    pub(super) shape: [usize; 3],
    pub(super) output: Output,
    pub(super) start: Start<'a>,
}

impl Product<'_> {
    pub(super) fn run(&self, level: Level, output: &mut [f32]) {
        let plan = Plan::new(self.shape, tch::get_num_threads().max(1) as usize);
        let shares = Shares::new(&plan);
        let output = Shared::new(output);
        shares.run(&|worker| {
            SCRATCH.with_borrow_mut(|scratch| {
                scratch.packed = None;
                while let Some([lanes, rows]) = shares.take(worker) {
                    let scratch = &mut *scratch;
                    let (product, plan, output) = (self, &plan, &output);
                    level.run(Piece { product, plan, output, lanes, rows, scratch });
                }
            });
        });
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const {
        RefCell::new(Scratch { lanes: Vec::new(), packed: None, rows: Vec::new(), sums: Vec::new() })
    };
}

/// A thread's memory, kept from product to product.
struct Scratch {
    /// A block of lanes, packed.
    lanes: Vec<Line>,
    /// Where that block starts: lane and depth.
    packed: Option<[usize; 2]>,
    /// A group of rows, packed.
    rows: Vec<Line>,
    /// Results of a group of rows and a panel.
    sums: Vec<Line>,
}

/// Makes room for so many lines; never gives any back.
fn grow(lines: &mut Vec<Line>, len: usize) -> &mut [Line] {
    if lines.len() < len {
        lines.resize(len, Line([0.0; LANES]));
    }
    &mut lines[..len]
}

/// Some lanes and rows of a product.
struct Piece<'a> {
    product: &'a Product<'a>,
    plan: &'a Plan,
    output: &'a Shared<'a, f32>,
    lanes: Range<usize>,
    rows: Range<usize>,
    scratch: &'a mut Scratch,
}

impl Kernel for Piece<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        if self.plan.depths().next().is_none() {
            self.fill(s);
        }
        for depth in self.plan.depths() {
            self.pack_lanes(s, &depth);
            for rows in ranges(self.rows.clone(), GROUP) {
                self.group(s, &depth, rows);
            }
        }
    }
}

impl Piece<'_> {
    /// The results of a product without any depth.
    #[inline(always)]
    fn fill<S: Simd>(&mut self, s: S) {
        for rows in ranges(self.rows.clone(), GROUP) {
            for panel in panels::<S>(self.lanes.len()) {
                self.start(s, panel, rows.clone(), 0);
                self.finish(s, panel, rows.clone());
            }
        }
    }

    #[inline(always)]
    fn pack_lanes<S: Simd>(&mut self, s: S, depth: &Range<usize>) {
        let block = Some([self.lanes.start, depth.start]);
        if self.scratch.packed == block {
            return;
        }
        let lines = self.lanes.len().div_ceil(LANES) * depth.len();
        let packed = grow(&mut self.scratch.lanes, lines);
        pack_lanes(s, &self.product.lanes, [self.lanes.clone(), depth.clone()], packed);
        self.scratch.packed = block;
    }

    /// A group of rows, for all panels of lanes.
    #[inline(always)]
    fn group<S: Simd>(&mut self, s: S, depth: &Range<usize>, rows: Range<usize>) {
        let operand = &self.product.rows;
        if !operand.depth_inner {
            let packed = grow(&mut self.scratch.rows, GROUP * row_lines(depth.len()));
            pack_rows(s, operand, [rows.clone(), depth.clone()], packed);
        }
        for panel in panels::<S>(self.lanes.len()) {
            self.start(s, panel, rows.clone(), depth.start);
            match (const { widest::<S>() }, panel.width) {
                (4, 4) => self.multiply::<S, 4, 6>(s, panel, [&rows, depth]),
                (4, 3) => self.multiply::<S, 3, 8>(s, panel, [&rows, depth]),
                (4, 2) => self.multiply::<S, 2, 12>(s, panel, [&rows, depth]),
                (4, _) => self.multiply::<S, 1, 12>(s, panel, [&rows, depth]),
                _ => self.multiply::<S, 1, 6>(s, panel, [&rows, depth]),
            }
            self.finish(s, panel, rows.clone());
        }
    }

    #[inline(always)]
    fn multiply<S: Simd, const W: usize, const R: usize>(
        &mut self,
        s: S,
        panel: Panel,
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
        let lines = &self.scratch.lanes[panel.first * depth.len()..][..W * depth.len()];
        let sums = &mut self.scratch.sums[..W * rows.len()];
        multiply::<S, W, R>(s, lines.as_chunks().0, source, sums.as_chunks_mut().0);
    }

    /// Lanes of a panel.
    fn lanes_of(&self, panel: Panel) -> Range<usize> {
        let start = self.lanes.start + panel.first * LANES;
        start..self.lanes.end.min(start + panel.width * LANES)
    }

    /// Sets the sums of some rows, `[row][vector]`, to what the products are added to.
    #[inline(always)]
    fn start<S: Simd>(&mut self, s: S, panel: Panel, rows: Range<usize>, depth: usize) {
        let sums = grow(&mut self.scratch.sums, GROUP * widest::<S>());
        match self.product.start {
            _ if depth > 0 => self.load(s, panel, rows),
            Start::Present => self.load(s, panel, rows),
            Start::Zero => sums.fill(Line([0.0; LANES])),
            Start::Bias(bias) => {
                for (sums, &bias) in sums.chunks_exact_mut(panel.width).zip(&bias[rows]) {
                    sums.fill(Line([bias; LANES]));
                }
            }
        }
    }

    /// Reads the sums of some rows from the output.
    #[inline(always)]
    fn load<S: Simd>(&mut self, s: S, panel: Panel, rows: Range<usize>) {
        let [all_lanes, all_rows, _] = self.product.shape;
        let lanes = self.lanes_of(panel);
        let sums = &mut self.scratch.sums;
        if self.product.output == Output::RowByLane {
            for (row, sums) in rows.zip(sums.chunks_exact_mut(panel.width)) {
                // SAFETY: this piece alone touches these rows and lanes.
                let from = unsafe { self.output.part(row * all_lanes + lanes.start, lanes.len()) };
                for (from, sum) in from.chunks(LANES).zip(sums) {
                    s.store(load_part(s, from), &mut sum.0);
                }
            }
            return;
        }
        for (w, lanes) in ranges(lanes, LANES).enumerate() {
            for square in ranges(rows.clone(), LANES) {
                let mut block = [s.splat(0.0); LANES];
                for (v, lane) in block.iter_mut().zip(lanes.clone()) {
                    let at = lane * all_rows + square.start;
                    // SAFETY: as above.
                    *v = load_part(s, unsafe { self.output.part(at, square.len()) });
                }
                let sums = &mut sums[(square.start - rows.start) * panel.width + w..];
                let sums = sums.iter_mut().step_by(panel.width);
                for (sum, v) in sums.zip(s.transpose(block)).take(square.len()) {
                    s.store(v, &mut sum.0);
                }
            }
        }
    }

    /// Writes the sums of some rows to the output.
    #[inline(always)]
    fn finish<S: Simd>(&self, s: S, panel: Panel, rows: Range<usize>) {
        let [all_lanes, all_rows, _] = self.product.shape;
        let lanes = self.lanes_of(panel);
        let sums = Line::flatten(&self.scratch.sums);
        let stride = panel.width * LANES;
        if self.product.output == Output::RowByLane {
            for (row, sums) in rows.zip(sums.chunks_exact(stride)) {
                // SAFETY: this piece alone touches these rows and lanes.
                let to = unsafe { self.output.part(row * all_lanes + lanes.start, lanes.len()) };
                for (to, sum) in to.chunks_mut(LANES).zip(sums.chunks_exact(LANES)) {
                    store_part(s, load_part(s, sum), to);
                }
            }
            return;
        }
        for (w, lanes) in ranges(lanes, LANES).enumerate() {
            for square in ranges(rows.clone(), LANES) {
                let from = &sums[(square.start - rows.start) * stride + w * LANES..];
                let block = s.transpose(load_block(s, from, stride, [square.len(), LANES]));
                for (v, lane) in block.into_iter().zip(lanes.clone()) {
                    let at = lane * all_rows + square.start;
                    // SAFETY: as above.
                    store_part(s, v, unsafe { self.output.part(at, square.len()) });
                }
            }
        }
    }
}
