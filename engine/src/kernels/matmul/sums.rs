//! The sums of a group of rows and a panel, from and to the output.

use std::ops::Range;

use super::blocks::{load_block, load_part, store_part};
use super::pack::Panel;
use super::piece::Piece;
use super::plan::{GROUP, ranges};
use super::product::{Operand, Output, Start, Summary};
use super::tile::widest;
use crate::kernels::parts::{self, PART, parts_of};
use crate::kernels::simd::{LANES, Line, Simd, prefetch_address};

/// Rows of the tallest tile.
const TALLEST: usize = 12;
/// Lines that memory delivers while the sums of a group and one vector are made.
const PREFETCHED: usize = 48;

impl Piece<'_> {
    /// Sets the sums to what the products from `depth` on are added to.
    #[inline(always)]
    pub(super) fn start<S: Simd>(&mut self, s: S, panel: Panel, rows: &Range<usize>, depth: usize) {
        let sums = &mut self.scratch.sums[..rows.len() * panel.width];
        match self.product.start {
            Start::Zero if depth == 0 => sums.fill(Line([0.0; LANES])),
            Start::Bias(bias) if depth == 0 => {
                for (sums, &bias) in sums.chunks_exact_mut(panel.width).zip(&bias[rows.clone()]) {
                    sums.fill(Line([bias; LANES]));
                }
            }
            _ if self.product.output == Output::RowByLane => self.load_rows(s, panel, rows),
            _ => self.load_lanes(s, panel, rows),
        }
    }

    /// Writes the sums to the output, or sums them up.
    #[inline(always)]
    pub(super) fn finish<S: Simd>(&mut self, s: S, panel: Panel, rows: &Range<usize>) {
        if self.product.summary.is_some() {
            self.summarize(s, panel, rows);
        }
        match self.product.output {
            Output::RowByLane => self.store_rows(s, panel, rows),
            Output::LaneByRow => self.store_lanes(s, panel, rows),
        }
    }

    #[inline(always)]
    fn load_rows<S: Simd>(&mut self, s: S, panel: Panel, rows: &Range<usize>) {
        let lanes = self.lanes_of(panel);
        let all_lanes = self.product.shape[0];
        let sums = self.scratch.sums.chunks_exact_mut(panel.width);
        for (row, sums) in rows.clone().zip(sums) {
            // SAFETY: this piece alone touches these rows and lanes.
            let from = unsafe { self.output.part(row * all_lanes + lanes.start, lanes.len()) };
            for (from, sum) in from.chunks(LANES).zip(sums) {
                prefetch_address(from.as_ptr().wrapping_add(GROUP * all_lanes));
                s.store(load_part(s, from), &mut sum.0);
            }
        }
    }

    #[inline(always)]
    fn store_rows<S: Simd>(&self, s: S, panel: Panel, rows: &Range<usize>) {
        let lanes = self.lanes_of(panel);
        let all_lanes = self.product.shape[0];
        let sums = self.scratch.sums.chunks_exact(panel.width);
        for (row, sums) in rows.clone().zip(sums) {
            // SAFETY: as in `load_rows`.
            let to = unsafe { self.output.part(row * all_lanes + lanes.start, lanes.len()) };
            for (to, sum) in to.chunks_mut(LANES).zip(sums) {
                store_part(s, s.load(&sum.0), to);
            }
        }
    }

    #[inline(always)]
    fn load_lanes<S: Simd>(&mut self, s: S, panel: Panel, rows: &Range<usize>) {
        let all_rows = self.product.shape[1];
        for (w, lanes) in ranges(self.lanes_of(panel), LANES).enumerate() {
            for square in ranges(rows.clone(), LANES) {
                let mut block = [s.splat(0.0); LANES];
                for (v, lane) in block.iter_mut().zip(lanes.clone()) {
                    let at = lane * all_rows + square.start;
                    // SAFETY: as in `load_rows`.
                    *v = load_part(s, unsafe { self.output.part(at, square.len()) });
                }
                let first = (square.start - rows.start) * panel.width + w;
                let sums = self.scratch.sums[first..].iter_mut().step_by(panel.width);
                for (sum, v) in sums.zip(s.transpose(block)).take(square.len()) {
                    s.store(v, &mut sum.0);
                }
            }
        }
    }

    #[inline(always)]
    fn store_lanes<S: Simd>(&self, s: S, panel: Panel, rows: &Range<usize>) {
        let all_rows = self.product.shape[1];
        let sums = Line::flatten(&self.scratch.sums);
        let stride = panel.width * LANES;
        let mut lanes = self.lanes_of(panel);
        if let Some(summary) = &self.product.summary {
            lanes.end = lanes.end.min(summary.written);
        }
        for (w, lanes) in ranges(lanes, LANES).enumerate() {
            for square in ranges(rows.clone(), LANES) {
                let from = &sums[(square.start - rows.start) * stride + w * LANES..];
                let block = s.transpose(load_block(s, from, stride, [square.len(), LANES]));
                for (v, lane) in block.into_iter().zip(lanes.clone()) {
                    let at = lane * all_rows + square.start;
                    // SAFETY: as in `load_rows`.
                    store_part(s, v, unsafe { self.output.part(at, square.len()) });
                }
            }
        }
    }

    /// Sums up those lanes of a group of rows that are not written.
    #[inline(always)]
    fn summarize<S: Simd>(&mut self, s: S, panel: Panel, rows: &Range<usize>) {
        let tile = &mut self.scratch.sums[..PART * panel.width];
        tile[rows.len() * panel.width..].fill(Line([f32::NEG_INFINITY; LANES]));
        if self.lanes.len() <= LANES {
            self.prefetch_rows(rows.end);
        }
        match (const { widest::<S>() }, panel.width) {
            (4, 4) => self.summarize_tile::<S, 4>(s, panel, rows),
            (4, 3) => self.summarize_tile::<S, 3>(s, panel, rows),
            (4, 2) => self.summarize_tile::<S, 2>(s, panel, rows),
            _ => self.summarize_tile::<S, 1>(s, panel, rows),
        }
    }

    /// Asks for the start of a tile of rows, the second one from `row` on: with few lanes memory
    /// is what a product waits for, and should not rest while sums are made.
    #[inline(always)]
    fn prefetch_rows(&self, row: usize) {
        let Operand { data, stride, .. } = self.product.rows;
        for line in 0..PREFETCHED / TALLEST {
            for row in row + TALLEST..row + 2 * TALLEST {
                prefetch_address(data.as_ptr().wrapping_add(row * stride + line * LANES));
            }
        }
    }

    #[inline(always)]
    fn summarize_tile<S: Simd, const W: usize>(&self, s: S, panel: Panel, rows: &Range<usize>) {
        let Some(Summary { written, inv_temperatures, parts }) = &self.product.summary else {
            return;
        };
        let tile = self.scratch.sums.as_chunks::<W>().0.first_chunk().expect("a whole group");
        let parts_of_row = parts_of(self.product.shape[1]);
        for (w, lanes) in ranges(self.lanes_of(panel), LANES).enumerate() {
            if lanes.end <= *written {
                continue;
            }
            let vector = lanes.start / LANES - written / LANES;
            let part = vector * parts_of_row + rows.start / PART;
            // SAFETY: this piece alone touches these rows and lanes.
            let to = unsafe { parts.part(part, 1) };
            let inv_temperatures = &inv_temperatures[lanes];
            to[0] = match (tile.as_flattened().as_array(), inv_temperatures.len()) {
                (Some(tile), ..=4) => parts::sum_few::<S, 4>(s, tile, inv_temperatures),
                (Some(tile), ..=8) => parts::sum_few::<S, 8>(s, tile, inv_temperatures),
                _ => parts::sum::<S, W>(s, tile, w, load_part(s, inv_temperatures)),
            };
        }
    }
}
