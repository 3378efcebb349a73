//! A product: its operands, and the run over all threads.

use std::cell::RefCell;

use super::piece::{Piece, Scratch};
use super::plan::{Plan, Shares};
use crate::kernels::disjoint::Shared;
use crate::kernels::parts::Part;
use crate::kernels::simd::Level;

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

/// Sums over the results of each lane, in addition to the results or in place of them. The rows
/// must be direct and the start must not be `Present`.
pub(super) struct Summary<'a> {
    /// Lanes whose results are written, the first ones; the others are summed.
    pub(super) written: usize,
    /// One for each lane.
    pub(super) inv_temperatures: &'a [f32],
    /// The parts of each vector of lanes, one vector after the other.
    pub(super) parts: Shared<'a, Part>,
}

/// `output[lane, row] = start + sum over k of lanes[lane, k] * rows[row, k]`.
pub(super) struct Product<'a> {
    pub(super) lanes: Operand<'a>,
    pub(super) rows: Operand<'a>,
    /// `[lanes, rows, depth]`.
    pub(super) shape: [usize; 3],
    pub(super) output: Output,
    pub(super) start: Start<'a>,
    pub(super) summary: Option<Summary<'a>>,
}

impl Product<'_> {
    /// Computes it on libtorch's threads; `output` holds as many numbers as there are results,
    /// or as a summary leaves to be written.
    pub(super) fn run(&self, level: Level, output: &mut [f32]) {
        let threads = tch::get_num_threads().max(1) as usize;
        let plan = match self.summary {
            Some(_) => Plan::uncut(self.shape, threads),
            None => Plan::new(self.shape, self.rows.depth_inner, threads),
        };
        let shares = Shares::new(&plan);
        let output = Shared::new(output);
        shares.run(&|worker| {
            SCRATCH.with_borrow_mut(|scratch| {
                scratch.forget();
                while let Some([lanes, rows]) = shares.take(worker) {
                    let (product, plan, output) = (self, &plan, &output);
                    level.run(Piece { product, plan, output, lanes, rows, scratch: &mut *scratch });
                }
            });
        });
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch::EMPTY) };
}
