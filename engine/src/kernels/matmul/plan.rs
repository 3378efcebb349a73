//! How a product is cut: blocks that fit the caches, shares of about equal work for the threads.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::kernels::simd::LANES;
use crate::torch::parallel;

/// Rows that share the results of a panel in the first-level cache; a multiple of every tile's.
pub(super) const GROUP: usize = 48;
/// Numbers of a packed block of lanes, which stays in the second-level cache.
const BLOCK_NUMBERS: usize = 160 * 1024;
/// Depth of a block: a tile's rows of it stay in the first-level cache.
const DEPTH: usize = 768;
/// The same for a single panel, which reads every row only once anyway.
const PANEL_DEPTH: usize = 2048;
/// Lanes of a single panel.
const PANEL: usize = 64;
/// Pieces of work for each thread, if there is enough.
const PIECES: usize = 6;
/// What a core computes, and reads, in a microsecond: only to tell whether threads are worth it.
const FLOPS: usize = 200_000;
const NUMBERS: usize = 5_000;
/// Microseconds below which a single thread does everything.
const WORTHWHILE: usize = 10;

/// Block sizes of a product.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Plan {
    /// `[lanes, rows, depth]` of the product.
    shape: [usize; 3],
    /// The same of a piece: a block of lanes, a chunk of rows, a block of the depth.
    piece: [usize; 3],
    /// Threads that take part.
    pub(super) workers: usize,
}

impl Plan {
    pub(super) fn new([lanes, rows, depth]: [usize; 3], threads: usize) -> Self {
        let most = if lanes <= PANEL { PANEL_DEPTH } else { DEPTH };
        let deep = even(depth, most, LANES);
        let block = even(lanes, (BLOCK_NUMBERS / deep).max(PANEL), LANES);
        let computing = lanes * rows * depth / (FLOPS / 2);
        let reading = (lanes + rows) * depth / NUMBERS;
        let workers = if computing.max(reading) < WORTHWHILE { 1 } else { threads };
        let chunks =
            (workers * PIECES).div_ceil(lanes.div_ceil(block).max(1)).next_multiple_of(workers);
        let chunk = even(rows, rows.div_ceil(chunks).max(GROUP), GROUP);
        Self { shape: [lanes, rows, depth], piece: [block, chunk, deep], workers }
    }

    /// Blocks of the depth, in order.
    pub(super) fn depths(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        ranges(0..self.shape[2], self.piece[2])
    }

    /// Chunks of rows of one block of lanes.
    fn chunks(&self) -> usize {
        self.shape[1].div_ceil(self.piece[1])
    }

    /// All pieces; those of a block of lanes follow each other.
    fn pieces(&self) -> usize {
        self.shape[0].div_ceil(self.piece[0]) * self.chunks()
    }

    /// The lanes and the rows of a piece.
    fn piece(&self, index: usize) -> [Range<usize>; 2] {
        let at = [index / self.chunks() * self.piece[0], index % self.chunks() * self.piece[1]];
        [0, 1].map(|i| at[i]..self.shape[i].min(at[i] + self.piece[i]))
    }
}

/// The smallest multiple of `unit` that cuts `total` into as few parts as `most` does.
fn even(total: usize, most: usize, unit: usize) -> usize {
    let most = (most / unit * unit).max(unit);
    total.div_ceil(total.div_ceil(most).max(1)).next_multiple_of(unit).max(unit)
}

/// Consecutive ranges of `size`; the last may be shorter.
pub(super) fn ranges(all: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    let end = all.end;
    all.step_by(size).map(move |start| start..end.min(start + size))
}

/// Hands out a plan's pieces. Each worker has a share of neighbouring ones, and helps the others
/// when it is done with its own.
pub(super) struct Shares<'a> {
    plan: &'a Plan,
    /// What was taken from each worker's share.
    taken: Vec<AtomicUsize>,
}

impl<'a> Shares<'a> {
    pub(super) fn new(plan: &'a Plan) -> Self {
        let taken = (0..plan.workers).map(|_| AtomicUsize::new(0)).collect();
        Self { plan, taken }
    }

    /// Runs `work(worker)` on every thread.
    pub(super) fn run(&self, work: &(dyn Fn(usize) + Sync)) {
        if self.plan.workers == 1 {
            work(0);
        } else {
            parallel::for_each(self.plan.workers, work);
        }
    }

    /// The lanes and the rows of the next piece for a worker.
    pub(super) fn take(&self, worker: usize) -> Option<[Range<usize>; 2]> {
        let workers = self.plan.workers;
        let pieces = self.plan.pieces();
        (0..workers).map(|turn| (worker + turn) % workers).find_map(|owner| {
            let start = pieces * owner / workers;
            let len = pieces * (owner + 1) / workers - start;
            let index = self.taken[owner].fetch_add(1, Ordering::Relaxed);
            (index < len).then(|| self.plan.piece(start + index))
        })
    }
}
