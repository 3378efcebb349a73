//! A product: its operands, and the run over all threads.

use std::cell::RefCell;

use super::piece::{Piece, Scratch};
use super::plan::{Plan, Shares, run_on};
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
    /// Computes it on all kernel threads; `output` holds as many numbers as there are results,
    /// or as a summary leaves to be written.
    pub(super) fn run(&self, level: Level, output: &mut [f32]) {
        run_each(level, &mut [(self, output)]);
    }

    fn plan(&self, threads: usize) -> Plan {
        match self.summary {
            Some(_) => Plan::uncut(self.shape, threads),
            None => Plan::new(self.shape, self.rows.depth_inner, threads),
        }
    }
}

/// Computes products of the same lanes, in one go: a thread that finds no more work in one begins
/// with the next. Lanes are packed once for all where they are packed whole.
pub(super) fn run_each(level: Level, products: &mut [(&Product<'_>, &mut [f32])]) {
    let threads = tch::get_num_threads().max(1) as usize;
    let plans: Vec<Plan> = products.iter().map(|(product, _)| product.plan(threads)).collect();
    let jobs = products.iter_mut().zip(&plans).map(|((product, output), plan)| Job {
        product,
        plan,
        shares: Shares::new(plan),
        output: Shared::new(output),
    });
    let jobs: Vec<Job> = jobs.collect();
    let workers = plans.iter().map(Plan::workers).max().unwrap_or(0);
    run_on(workers, &|worker| {
        SCRATCH.with_borrow_mut(|scratch| {
            for (i, job) in jobs.iter().enumerate() {
                if i == 0 || !job.packs_like(&jobs[i - 1]) {
                    scratch.forget();
                }
                job.run(level, worker, scratch);
            }
        });
    });
}

/// One of several products.
struct Job<'a> {
    product: &'a Product<'a>,
    plan: &'a Plan,
    shares: Shares<'a>,
    output: Shared<'a, f32>,
}

impl Job<'_> {
    /// Whether what was packed for `other` serves this product too.
    fn packs_like(&self, other: &Self) -> bool {
        let same_lanes = std::ptr::eq(self.product.lanes.data, other.product.lanes.data);
        same_lanes && self.plan.packs_like(other.plan)
    }

    /// What the worker does of it.
    fn run(&self, level: Level, worker: usize, scratch: &mut Scratch) {
        let Self { product, plan, output, .. } = self;
        while let Some([lanes, rows]) = self.shares.take(worker) {
            level.run(Piece { product, plan, output, lanes, rows, scratch: &mut *scratch });
        }
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch::EMPTY) };
}
