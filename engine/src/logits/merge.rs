//! Sums over whole rows of logits out of those over their parts.
//!
//! With m the largest logit of a part, M that of the row, D = (m - M) / temperature and w = e^D,
//! a token whose d is taken from m has d + D from M. So Z = sum w z, A1 = sum w (a1 + D z),
//! B = sum w^2 b and C = sum w^2 (c + D b) over the parts. They are summed in f64, in order.

use super::RowStats;
use crate::kernels::parts::Part;
use crate::kernels::rows::LOWEST;
use crate::kernels::simd::{Kernel, LANES, Level, Simd, exp};

/// Parts of a span, the unit that a draw looks through first.
pub(crate) const SPAN: usize = 32;

/// Masses below it, of largest tokens of weight 1, are taken for 0: so what is left holds a token
/// whose weight is not 0 in f32.
const LEAST_MASS: f32 = 1e-30;

/// Sums over sixteen rows of logits, one in each lane.
pub(crate) struct Sums {
    max: [f32; LANES],
    inv_temperatures: [f32; LANES],
    /// Z, A1, B and C.
    moments: [[f64; LANES]; 4],
    /// Of each [`SPAN`] parts.
    pub(crate) spans: Vec<Span>,
}

/// What a draw wants to know of some neighbouring parts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Span {
    /// Largest logits.
    pub(crate) max: [f32; LANES],
    /// Sums of e^d.
    pub(crate) mass: [f64; LANES],
}

impl Sums {
    /// The sums of one of the rows.
    pub(crate) fn row(&self, lane: usize) -> RowStats {
        let [z, a1, b, c] = self.moments.map(|sums| sums[lane]);
        let (max, inv_temperature) = (self.max[lane], self.inv_temperatures[lane]);
        RowStats { max, inv_temperature, z, a1, b, c }
    }
}

/// Merges the parts of up to sixteen rows; `inv_temperatures` has a number for each. Afterwards
/// the masses in `parts` are sums of e^d with d from the row's largest logit.
pub(crate) fn merge(parts: &mut [Part], inv_temperatures: &[f32]) -> Sums {
    merge_at(Level::best(), parts, inv_temperatures)
}

fn merge_at(level: Level, parts: &mut [Part], given: &[f32]) -> Sums {
    let mut inv_temperatures = [1.0; LANES];
    inv_temperatures[..given.len()].copy_from_slice(given);
    level.run(Merge { parts, inv_temperatures })
}

struct Merge<'a> {
    parts: &'a mut [Part],
    inv_temperatures: [f32; LANES],
}

impl Kernel for Merge<'_> {
    type Output = Sums;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Sums {
        let Self { parts, inv_temperatures } = self;
        let inv_temperature = s.load(&inv_temperatures);
        let mut spans = vec![Span::default(); parts.len().div_ceil(SPAN)];
        let mut row_max = s.splat(f32::MIN);
        for (span, parts) in spans.iter_mut().zip(parts.chunks(SPAN)) {
            let max =
                parts.iter().fold(s.splat(f32::MIN), |max, part| s.max(largest(s, part), max));
            s.store(max, &mut span.max);
            row_max = s.max(max, row_max);
        }
        let mut moments = [[0.0; LANES]; 4];
        for (span, parts) in spans.iter_mut().zip(parts.chunks_mut(SPAN)) {
            let mut sums = [[0.0; LANES]; 4];
            for part in parts {
                let d = s.mul(s.sub(largest(s, part), row_max), inv_temperature);
                // NaN stays NaN in this order.
                let moved = move_part(s, part, s.max(s.splat(LOWEST), d));
                add(s, &mut sums, moved);
            }
            span.mass = sums[0];
            for (moments, sums) in moments.iter_mut().zip(sums) {
                (0..LANES).for_each(|i| moments[i] += sums[i]);
            }
        }
        Sums { max: s.to_array(row_max), inv_temperatures, moments, spans }
    }
}

/// Largest logits of a part.
#[inline(always)]
fn largest<S: Simd>(s: S, part: &Part) -> S::V {
    let [a, b, c] = [0, 1, 2].map(|cell| s.load(&part.maxima[cell].0));
    s.max(s.max(a, b), c)
}

/// The sums Z, A1, B and C of a part with `distance` D from the row's largest logits, and its
/// masses in place.
#[inline(always)]
fn move_part<S: Simd>(s: S, part: &mut Part, distance: S::V) -> [S::V; 4] {
    let weight = exp(s, distance);
    let square = s.mul(weight, weight);
    let mut z = s.splat(0.0);
    for mass in &mut part.masses {
        let before = s.load(&mass.0);
        z = s.add(z, before);
        let after = s.mul(weight, before);
        s.store(s.zero_below(after, after, LEAST_MASS), &mut mass.0);
    }
    let [a1, b, c] = [&part.a1, &part.b, &part.c].map(|line| s.load(&line.0));
    [
        s.mul(weight, z),
        s.mul(weight, s.mul_add(distance, z, a1)),
        s.mul(square, b),
        s.mul(square, s.mul_add(distance, b, c)),
    ]
}

#[inline(always)]
fn add<S: Simd>(s: S, sums: &mut [[f64; LANES]; 4], terms: [S::V; 4]) {
    for (sums, terms) in sums.iter_mut().zip(terms) {
        let terms = s.to_array(terms);
        (0..LANES).for_each(|i| sums[i] += f64::from(terms[i]));
    }
}

#[cfg(test)]
mod tests;
