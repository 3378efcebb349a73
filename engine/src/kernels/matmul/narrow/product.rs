//! A batch of rows times a packed weight.

use std::cell::RefCell;
use std::ops::Range;

use super::format::{AHEAD, Format};
use super::packed::Packed;
use crate::kernels::disjoint::Shared;
use crate::kernels::matmul::blocks::{load_part, store_part};
use crate::kernels::matmul::pack::Panel;
use crate::kernels::matmul::plan::ranges;
use crate::kernels::matmul::tile::{Filled, Rows, multiply};
use crate::kernels::parallel::for_each;
use crate::kernels::simd::{Kernel, LANES, Level, Line, Simd};

/// Rows whose sums are kept at a time.
const ROWS: usize = 192;
/// Depth of a panel that is multiplied at a time; it stays in the first-level cache for all rows.
const DEPTH: usize = AHEAD;
/// Numbers of a weight, and products, that are a microsecond's work or so, and how many
/// microseconds are worth a second thread.
const MICROSECOND: [usize; 2] = [10_000, 100_000];
const WORTHWHILE: usize = 10;

/// `y[m, n] = x[m, k] * weight[n, k]^T + bias[n]`.
pub(super) struct Product<'a, F> {
    pub(super) weight: &'a Packed<F>,
    pub(super) x: &'a [f32],
    pub(super) bias: Option<&'a [f32]>,
}

impl<F: Format> Product<'_, F> {
    /// Computes it on all kernel threads.
    pub(super) fn run(&self, y: &mut [f32]) {
        let [n, k] = self.weight.shape;
        let m = y.len() / n.max(1);
        let output = Shared::new(y);
        let chunks: Vec<Range<usize>> = ranges(0..m, ROWS).collect();
        let panels = self.weight.panels();
        let work = |i: usize| {
            let (panel, rows) = (panels[i / chunks.len()], chunks[i % chunks.len()].clone());
            SUMS.with_borrow_mut(|sums| {
                let piece = Piece { product: self, output: &output, panel, rows, sums };
                Level::run(self.weight.level(), piece);
            });
        };
        let microseconds = (n * k / MICROSECOND[0]).max(m * n * k / MICROSECOND[1]);
        let items = panels.len() * chunks.len();
        if microseconds < WORTHWHILE { (0..items).for_each(work) } else { for_each(items, &work) }
    }
}

thread_local! {
    /// Sums of some rows and a panel, `[row][vector]`; kept from product to product.
    static SUMS: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Some rows of the batch times one panel.
struct Piece<'a, F> {
    product: &'a Product<'a, F>,
    output: &'a Shared<'a, f32>,
    panel: Panel,
    rows: Range<usize>,
    sums: &'a mut Vec<Line>,
}

impl<F: Format> Kernel for Piece<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [_, k] = self.product.weight.shape;
        let width = self.panel.width;
        let lanes = self.product.weight.lanes_of(self.panel);
        self.sums.clear();
        self.sums.resize(self.rows.len() * width, Line([0.0; LANES]));
        let x = &self.product.x[self.rows.start * k..];
        for depth in ranges(0..k, DEPTH) {
            let block = &lanes[depth.start * width..depth.end * width];
            let rows = Rows { data: &x[depth.start..], stride: k };
            multiply(s, (width, Filled::All), block, rows, self.sums);
        }
        self.finish(s);
    }
}

impl<F: Format> Piece<'_, F> {
    /// Writes the sums, scaled, plus the bias.
    #[inline(always)]
    fn finish<S: Simd>(self, s: S) {
        let [n, _] = self.product.weight.shape;
        let start = self.panel.first * LANES;
        let lanes = start..n.min(start + self.panel.width * LANES);
        let (scales, _) = self.product.weight.scales_of(self.panel).as_chunks::<LANES>();
        let sums = self.sums.chunks_exact(self.panel.width);
        for (row, sums) in self.rows.zip(sums) {
            // SAFETY: this piece alone writes these rows and lanes.
            let to = unsafe { self.output.part(row * n + lanes.start, lanes.len()) };
            for (w, (to, sum)) in to.chunks_mut(LANES).zip(sums).enumerate() {
                let bias = self.product.bias.map_or(s.splat(0.0), |bias| {
                    load_part(s, &bias[start + w * LANES..][..to.len()])
                });
                store_part(s, s.mul_add(s.load(&sum.0), s.load(&scales[w]), bias), to);
            }
        }
    }
}
