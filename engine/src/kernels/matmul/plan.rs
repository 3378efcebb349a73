//! How a product is cut: blocks that fit the caches, shares of about equal work for the threads.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::kernels::parallel;
use crate::kernels::parts::PART;
use crate::kernels::simd::LANES;

/// Rows that share the results of a panel in the first-level cache; a multiple of every tile's.
pub(super) const GROUP: usize = PART;
/// Numbers of a packed block of lanes: it stays in the second-level cache.
const BLOCK: usize = 192 * 1024;
/// Numbers that a thread packs at most to keep them from piece to piece.
const KEPT: usize = 512 * 1024;
/// Most of the depth that is not cut, if the rows need no packing; more for few lanes.
const UNCUT: usize = 2048;
/// Blocks of a depth that is cut, for rows that need no packing, and for those that do.
const CUT: [usize; 2] = [1024, 768];
/// Fewest lanes that a block is made for because of `BLOCK`, and to have enough pieces.
const LANES_LEAST: [usize; 2] = [64, 96];
/// Pieces for each thread, if there is enough work; fewer if each packs its own lanes.
const PIECES: [usize; 2] = [6, 4];
/// Rows of a piece that make packing its own lanes cheap.
const ROWS_LEAST: usize = 384;
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
    /// Whether a thread packs a block of lanes over the whole depth, and keeps it from piece to
    /// piece; otherwise it packs a block of the depth at a time, for each piece anew.
    pub(super) whole: bool,
    /// Threads that take part.
    workers: usize,
}

impl Plan {
    /// For `[lanes, rows, depth]`. If the rows are not `direct`, they are packed for each block
    /// of lanes.
    pub(super) fn new(shape: [usize; 3], direct: bool, threads: usize) -> Self {
        let [lanes, _, depth] = shape;
        let uncut = UNCUT.max(BLOCK / lanes.next_multiple_of(LANES).max(LANES));
        let most = match direct {
            true if depth <= uncut => uncut,
            true => CUT[0],
            false => CUT[1],
        };
        Self::cut(shape, most, threads)
    }

    /// As [`Plan::new`] for direct rows, with the depth in one block.
    pub(super) fn uncut(shape: [usize; 3], threads: usize) -> Self {
        Self::cut(shape, shape[2].next_multiple_of(LANES), threads)
    }

    /// With at most so much of the depth in a block.
    fn cut(shape: [usize; 3], most: usize, threads: usize) -> Self {
        let [lanes, rows, depth] = shape;
        let workers = if microseconds(shape) < WORTHWHILE { 1 } else { threads };
        let deep = even(depth, most, LANES);
        let most = (BLOCK / deep).max(LANES_LEAST[0]);
        let block = even(lanes, most, LANES);
        if deep >= depth || block * depth <= KEPT {
            let pieces = workers * PIECES[0];
            let chunks = pieces.div_ceil(lanes.div_ceil(block).max(1)).next_multiple_of(workers);
            let chunk = even(rows, rows / chunks, GROUP);
            return Self { shape, piece: [block, chunk, deep], whole: true, workers };
        }
        let pieces = workers * PIECES[1];
        let blocks = pieces.div_ceil((rows / ROWS_LEAST).max(1));
        let block = even(lanes, most.min((lanes / blocks).max(LANES_LEAST[1])), LANES);
        let chunks = pieces.div_ceil(lanes.div_ceil(block).max(1)).next_multiple_of(workers);
        let chunk = even(rows, (rows / chunks).max(ROWS_LEAST), GROUP);
        Self { shape, piece: [block, chunk, deep], whole: false, workers }
    }

    /// Threads that take part.
    pub(super) fn workers(&self) -> usize {
        self.workers
    }

    /// Whether blocks of the same lanes that were packed whole for `other` are those of this plan.
    pub(super) fn packs_like(&self, other: &Self) -> bool {
        let blocks = |plan: &Self| (plan.shape[0], plan.shape[2], plan.piece[0], plan.piece[2]);
        self.whole && other.whole && blocks(self) == blocks(other)
    }

    /// Blocks of the depth, in order: at least one, which may be empty.
    pub(super) fn depths(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let depth = self.shape[2];
        ranges(0..depth.max(1), self.piece[2]).map(move |block| block.start..depth.min(block.end))
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

/// About how long a product takes on one thread.
fn microseconds([lanes, rows, depth]: [usize; 3]) -> usize {
    (2 * lanes * rows * depth / FLOPS).max((lanes + rows) * depth / NUMBERS)
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

/// Runs `work(worker)` on so many threads.
pub(super) fn run_on(workers: usize, work: &(dyn Fn(usize) + Sync)) {
    match workers {
        0 => {}
        1 => work(0),
        _ => parallel::for_each(workers, work),
    }
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

    /// The lanes and the rows of the next piece for a worker.
    pub(super) fn take(&self, worker: usize) -> Option<[Range<usize>; 2]> {
        let workers = self.plan.workers;
        let worker = worker % workers;
        let pieces = self.plan.pieces();
        (0..workers).map(|turn| (worker + turn) % workers).find_map(|owner| {
            let start = pieces * owner / workers;
            let len = pieces * (owner + 1) / workers - start;
            let index = self.taken[owner].fetch_add(1, Ordering::Relaxed);
            (index < len).then(|| self.plan.piece(start + index))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pieces that two workers get when the first takes `turns` for each one of the second.
    fn pieces(plan: &Plan, turns: usize) -> Vec<[Range<usize>; 2]> {
        let shares = Shares::new(plan);
        let order = (0..).map(|i| usize::from(i % (turns + 1) == turns) % plan.workers);
        let taken = order.map_while(|worker| shares.take(worker));
        taken.collect()
    }

    #[test]
    fn an_uncut_depth_is_one_block() {
        for depth in [0, 1, 15, 16, 17, 576, 2047, 2049, 8192, 30_000] {
            for lanes in [1, 64, 256] {
                let blocks: Vec<_> = Plan::uncut([lanes, 49_152, depth], 2).depths().collect();
                assert!(blocks.len() == 1 && blocks[0] == (0..depth), "{lanes} lanes: {blocks:?}");
            }
        }
    }

    #[test]
    fn pieces_cover_every_result_once() {
        for shape in [[1, 49_152, 576], [1700, 576, 576], [576, 256, 49_152], [100, 9, 3000]] {
            for (direct, turns) in [(true, 1), (true, 5), (false, 1), (false, 50)] {
                let plan = Plan::new(shape, direct, 2);
                let [lanes, rows, depth] = shape;
                let mut hits = vec![0u8; lanes.div_ceil(LANES) * rows];
                for [piece_lanes, piece_rows] in pieces(&plan, turns) {
                    assert!(piece_lanes.start.is_multiple_of(LANES) && piece_lanes.end <= lanes);
                    for vector in piece_lanes.step_by(LANES).map(|lane| lane / LANES) {
                        piece_rows.clone().for_each(|row| hits[vector * rows + row] += 1);
                    }
                }
                assert!(hits.iter().all(|&hits| hits == 1), "{shape:?}: {plan:?}");
                assert_eq!(plan.depths().map(|block| block.len()).sum::<usize>(), depth);
            }
        }
    }

    #[test]
    fn large_products_have_pieces_for_everyone() {
        for shape in [[1, 576, 576], [64, 192, 576], [1700, 576, 1536], [576, 256, 49_152]] {
            for direct in [true, false] {
                let plan = Plan::new(shape, direct, 2);
                assert!(plan.workers == 2 && plan.pieces() >= 4, "{shape:?}: {plan:?}");
                assert!(plan.piece[0] * plan.piece[2] <= BLOCK, "{shape:?}: {plan:?}");
            }
        }
    }

    #[test]
    fn small_products_stay_on_one_thread() {
        assert_eq!(Plan::new([4, 64, 64], true, 2).workers, 1);
        assert_eq!(Plan::new([0, 64, 64], true, 2).pieces(), 0);
        assert_eq!(Plan::new([0, 64, 1 << 20], true, 2).pieces(), 0);
        assert_eq!(Plan::new([64, 0, 64], true, 2).pieces(), 0);
    }
}
