//! A weight's rows across the lanes of panels, as tiles read them.

use std::ops::Range;

use super::format::Format;
use crate::kernels::disjoint::Shared;
use crate::kernels::matmul::blocks::load_block;
use crate::kernels::matmul::pack::Panel;
use crate::kernels::matmul::plan::ranges;
use crate::kernels::matmul::tile::widest;
use crate::kernels::parallel::for_each;
use crate::kernels::simd::{Kernel, LANES, Level, Simd};
use crate::torch::memory::give_back_raw;

/// Most vectors in a panel; its width is what tiles of many rows leave of the registers.
const WIDEST: usize = 3;
/// Panels come in multiples of this where there are few, so that threads get equal shares.
const SHARES: usize = 4;

/// A weight `[n, k]`: panels of up to three vectors of rows, each `[k][width]` vectors. Rows beyond
/// the last are 0.
pub(super) struct Packed<F> {
    level: Level,
    /// Rows and depth.
    pub(super) shape: [usize; 2],
    panels: Vec<Panel>,
    lanes: Vec<F>,
    /// One for each row, and for those beyond the last.
    scales: Vec<f32>,
}

impl<F: Format> Packed<F> {
    /// Room for a weight of this shape, all 0.
    pub(super) fn new(level: Level, shape: [usize; 2]) -> Self {
        let vectors = shape[0].div_ceil(LANES);
        Self {
            level,
            shape,
            panels: level.run(Panels { vectors }),
            lanes: vec![F::ZERO; vectors * shape[1]],
            scales: vec![1.0; vectors * LANES],
        }
    }

    /// The instruction set that the panels are laid out for.
    pub(super) fn level(&self) -> Level {
        self.level
    }

    /// The panels, in the order of their rows.
    pub(super) fn panels(&self) -> &[Panel] {
        &self.panels
    }

    /// The weights of a panel.
    pub(super) fn lanes_of(&self, panel: Panel) -> &[F] {
        &self.lanes[panel.first * self.shape[1]..][..panel.width * self.shape[1]]
    }

    /// The scales of a panel's rows.
    pub(super) fn scales_of(&self, panel: Panel) -> &[f32] {
        &self.scales[panel.first * LANES..][..panel.width * LANES]
    }

    /// Bytes that it takes.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&self.lanes[..]) + size_of_val(&self.scales[..])
    }

    /// Gives the lanes' memory back to the system; false if it does not take it.
    pub(super) fn give_back(&mut self) -> bool {
        // SAFETY: every format is an array of integers, and all of their bits may be 0.
        unsafe { give_back_raw(&mut self.lanes) }
    }

    /// Packs `weights`, row by row.
    pub(super) fn pack(&mut self, weights: &[f32]) {
        let Self { level, shape, ref panels, ref mut lanes, ref mut scales } = *self;
        let (lanes, scales) = (Shared::new(lanes), Shared::new(scales));
        for_each(panels.len(), &|i| {
            let panel = panels[i];
            // SAFETY: each panel is packed by one thread, and panels do not overlap.
            let (lanes, scales) = unsafe {
                (
                    lanes.part(panel.first * shape[1], panel.width * shape[1]),
                    scales.part(panel.first * LANES, panel.width * LANES),
                )
            };
            level.run(Pack { weights, shape, panel, lanes, scales });
        });
    }
}

/// Cuts vectors into panels of about equal width.
struct Panels {
    vectors: usize,
}

impl Kernel for Panels {
    type Output = Vec<Panel>;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Vec<Panel> {
        let count = self.vectors.div_ceil(widest::<S>().min(WIDEST)).next_multiple_of(SHARES);
        let count = count.min(self.vectors);
        let panel = |i| {
            let first = self.vectors * i / count;
            Panel { first, width: self.vectors * (i + 1) / count - first }
        };
        (0..count).map(panel).collect()
    }
}

/// Packs one panel.
struct Pack<'a, F> {
    weights: &'a [f32],
    shape: [usize; 2],
    panel: Panel,
    lanes: &'a mut [F],
    scales: &'a mut [f32],
}

impl<F: Format> Kernel for Pack<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { weights, shape: [n, k], panel, lanes, scales } = self;
        for w in 0..panel.width {
            let start = (panel.first + w) * LANES;
            let rows = start..n.min(start + LANES);
            let scales = &mut scales[w * LANES..][..LANES];
            let inverse = F::LARGEST.map(|largest| {
                let weights = &weights[rows.start * k..rows.end * k];
                s.load(&scale_rows(weights, k, largest, scales))
            });
            for steps in ranges(0..k, LANES) {
                let block = s.transpose(block(s, weights, k, [&rows, &steps]));
                for (step, v) in steps.zip(block) {
                    let v = inverse.map_or(v, |inverse| s.mul(v, inverse));
                    lanes[step * panel.width + w] = F::round(s, v);
                }
            }
        }
    }
}

/// Up to sixteen rows and sixteen steps of the depth.
#[inline(always)]
fn block<S: Simd>(
    s: S,
    weights: &[f32],
    k: usize,
    [rows, steps]: [&Range<usize>; 2],
) -> [S::V; LANES] {
    load_block(s, &weights[rows.start * k + steps.start..], k, [rows.len(), steps.len()])
}

/// Sets the scale of each of up to sixteen rows, so that its largest magnitude becomes `largest`;
/// returns one over the scales. Rows without a magnitude worth keeping become 0, and rows with
/// a number that is not finite get such a scale.
#[inline(always)]
fn scale_rows(weights: &[f32], k: usize, largest: f32, scales: &mut [f32]) -> [f32; LANES] {
    let mut inverse = [0.0; LANES];
    for (i, row) in weights.chunks_exact(k.max(1)).enumerate() {
        // As integers, so that what is not finite counts as largest.
        let magnitude = row.iter().fold(0, |most, x| most.max(x.abs().to_bits()));
        let magnitude = f32::from_bits(magnitude);
        scales[i] = magnitude / largest;
        inverse[i] = if magnitude < f32::MIN_POSITIVE * 256.0 { 0.0 } else { largest / magnitude };
    }
    inverse
}
