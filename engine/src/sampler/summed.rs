//! Draws from a row of logits of which only sums are kept: the cell of tokens that a random
//! number falls into is found by the masses, and only its logits are asked for.

use std::ops::Range;

use super::{Draw, Drawn, random::uniform, search, truncate};
use crate::kernels::parts::{CELL, CELLS, Part};
use crate::kernels::{rows, simd::Level};
use crate::logits::RowStats;
use crate::logits::merge::{SPAN, Span, Sums};

/// A row of logits, summed up.
pub(crate) struct SummedRow<'a> {
    /// Of the sixteen rows that this one is among.
    pub(crate) parts: &'a [Part],
    /// Of the same.
    pub(crate) sums: &'a Sums,
    /// Which of them.
    pub(crate) lane: usize,
}

/// One over the temperature of the distribution whose statistics a draw reports.
pub(crate) fn inv_temperature(draw: &Draw) -> f32 {
    match draw.params.temperature {
        0.0 => 1.0,
        temperature => (1.0 / temperature).min(f32::MAX),
    }
}

/// Whether a draw has to see all logits of its row.
pub(crate) fn needs_logits(draw: &Draw, vocab: usize) -> bool {
    let truncated = draw.params.temperature > 0.0 && !truncate::keeps_all(draw.params, vocab);
    truncated || draw.params.top_logprobs > 0 || !draw.forbidden.is_empty() || draw.mask.is_some()
}

impl SummedRow<'_> {
    /// Statistics of the row.
    pub(crate) fn stats(&self) -> RowStats {
        self.sums.row(self.lane)
    }

    /// Draws a token as [`sample`](super::sample) does, from a draw that need not see all logits.
    /// `logits` computes those of some neighbouring tokens. None: the row is no distribution.
    pub(crate) fn draw(
        &self,
        draw: &Draw,
        vocab: usize,
        logits: impl FnOnce(Range<usize>) -> Vec<f32>,
    ) -> Option<Drawn> {
        let stats = self.stats();
        if !stats.is_valid() {
            return None;
        }
        let greedy = draw.params.temperature == 0.0;
        let (cell, rest) = if greedy {
            (self.likeliest_cell(stats.max), 0.0)
        } else {
            self.cell_at(uniform(draw.stream, draw.position) * stats.z)
        };
        let start = cell * CELL;
        let logits = logits(start..vocab.min(start + CELL));
        let at = if greedy {
            rows::find(Level::best(), &logits, stats.max).expect("a cell holds its maximum")
        } else {
            let mut weights = logits.clone();
            rows::weigh(Level::best(), &mut weights, stats.scale(), 1.0);
            search(weights.into_iter().map(f64::from), rest).0
        };
        Some(Drawn { id: (start + at) as u32, stats: stats.token(logits[at]), top: Vec::new() })
    }

    /// The cell that the sum of masses exceeds `target` in, and what of the target is left there.
    fn cell_at(&self, target: f64) -> (usize, f64) {
        let spans = self.sums.spans.iter().map(|span| span.mass[self.lane]);
        let (span, rest) = search(spans, target);
        let parts = self.parts_of(span);
        let masses = |part: &Part| part.masses.map(|mass| f64::from(mass.0[self.lane]));
        let (part, rest) = search(parts.iter().map(|part| masses(part).iter().sum()), rest);
        let (cell, rest) = search(masses(&parts[part]).into_iter(), rest);
        ((span * SPAN + part) * CELLS + cell, rest)
    }

    /// The first cell that holds the row's largest logit.
    fn likeliest_cell(&self, max: f32) -> usize {
        let reaches = |span: &Span| span.max[self.lane] == max;
        let span = self.sums.spans.iter().position(reaches).expect("a span holds the maximum");
        let maxima = self.parts_of(span).iter().flat_map(|part| &part.maxima);
        let reached = maxima.map(|max| max.0[self.lane]).position(|largest| largest == max);
        span * SPAN * CELLS + reached.expect("a span holds its maximum")
    }

    fn parts_of(&self, span: usize) -> &[Part] {
        let start = span * SPAN;
        &self.parts[start..self.parts.len().min(start + SPAN)]
    }
}
