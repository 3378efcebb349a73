//! Passes over one row of logits.
//!
//! With `d = (x - max) * inv_temperature`, which is never above 0, the weight of a logit is e^d.
//! Sums are made in f32 over a block of 256 logits and carried on in f64: so a long row loses
//! nothing, and a sample can be found in its block without another pass over the row.

use super::simd::{Kernel, LANES, Level, Simd, exp};

/// Logits per block.
pub const ROW_BLOCK: usize = 256;

/// d is cut off here; e^d is 0 already, and d * e^d stays 0 for a logit of minus infinity.
pub const LOWEST: f32 = -100.0;

/// Vectors that are summed side by side.
const STRANDS: usize = 4;

/// Calls `each(index, sixteen logits)`; the last ones are filled up with `fill`.
macro_rules! for_each_line {
    ($row:expr, $fill:expr, |$at:ident, $line:ident| $body:block) => {
        let (lines, rest) = $row.as_chunks::<LANES>();
        for (i, $line) in lines.iter().enumerate() {
            let $at = i * LANES;
            $body
        }
        if !rest.is_empty() {
            let mut last = [$fill; LANES];
            last[..rest.len()].copy_from_slice(rest);
            let ($at, $line) = (lines.len() * LANES, &last);
            $body
        }
    };
}

/// The largest logit; NaN left out, minus infinity if there is none.
pub fn max(level: Level, row: &[f32]) -> f32 {
    level.run(Max(row))
}

struct Max<'a>(&'a [f32]);

impl Kernel for Max<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut max = [s.splat(f32::NEG_INFINITY); STRANDS];
        let (blocks, rest) = self.0.as_chunks::<{ STRANDS * LANES }>();
        for block in blocks {
            for (max, line) in max.iter_mut().zip(block.as_chunks().0) {
                *max = s.max(s.load(line), *max);
            }
        }
        for_each_line!(rest, f32::NEG_INFINITY, |_at, line| {
            max[0] = s.max(s.load(line), max[0]);
        });
        s.largest(s.max(s.max(max[0], max[1]), s.max(max[2], max[3])))
    }
}

/// Sums over a row.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moments {
    /// Sum of e^d.
    pub z: f64,
    /// Sum of e^d d.
    pub a1: f64,
    /// Sum of e^(2d).
    pub b: f64,
    /// Sum of e^(2d) d.
    pub c: f64,
}

/// How logits become weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// The row's largest logit.
    pub max: f32,
    /// One over the temperature.
    pub inv_temperature: f32,
}

impl Scale {
    #[inline(always)]
    fn d<S: Simd>(self, s: S, x: S::V) -> S::V {
        let d = s.mul(s.sub(x, s.splat(self.max)), s.splat(self.inv_temperature));
        // NaN stays NaN in this order.
        s.max(s.splat(LOWEST), d)
    }
}

/// The sums of a row. If `masses` is given, it is filled with the sum of e^d of each block.
pub fn moments(level: Level, row: &[f32], scale: Scale, masses: Option<&mut Vec<f64>>) -> Moments {
    level.run(Sum { row, scale, masses })
}

struct Sum<'a> {
    row: &'a [f32],
    scale: Scale,
    masses: Option<&'a mut Vec<f64>>,
}

impl Kernel for Sum<'_> {
    type Output = Moments;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Moments {
        let Self { row, scale, mut masses } = self;
        if let Some(masses) = &mut masses {
            masses.clear();
        }
        let mut lanes = [[0.0; LANES]; 3];
        let mut z = 0.0;
        let (blocks, rest) = row.as_chunks::<ROW_BLOCK>();
        let mut last = [f32::NEG_INFINITY; ROW_BLOCK];
        last[..rest.len()].copy_from_slice(rest);
        let last = (!rest.is_empty()).then_some(&last);
        for block in blocks.iter().chain(last) {
            let [mass, others @ ..] = sum_block(s, block, scale);
            for (lanes, v) in lanes.iter_mut().zip(others) {
                let v = s.to_array(v);
                for i in 0..LANES {
                    lanes[i] += f64::from(v[i]);
                }
            }
            let mass = total(s.to_array(mass).map(f64::from));
            z += mass;
            if let Some(masses) = &mut masses {
                masses.push(mass);
            }
        }
        let [a1, b, c] = lanes.map(total);
        Moments { z, a1, b, c }
    }
}

/// Sums of e^d, e^d d, e^(2d) and e^(2d) d over a block, by lane.
#[inline(always)]
fn sum_block<S: Simd>(s: S, block: &[f32; ROW_BLOCK], scale: Scale) -> [S::V; 4] {
    let mut sums = [[s.splat(0.0); STRANDS]; 4];
    for lines in block.as_chunks::<LANES>().0.as_chunks::<STRANDS>().0 {
        for i in 0..STRANDS {
            let d = scale.d(s, s.load(&lines[i]));
            let e = exp(s, d);
            let square = s.mul(e, e);
            sums[0][i] = s.add(sums[0][i], e);
            sums[1][i] = s.mul_add(e, d, sums[1][i]);
            sums[2][i] = s.add(sums[2][i], square);
            sums[3][i] = s.mul_add(square, d, sums[3][i]);
        }
    }
    let mut out = [s.splat(0.0); 4];
    for (out, sums) in out.iter_mut().zip(sums) {
        *out = s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3]));
    }
    out
}

#[inline(always)]
fn total(mut lanes: [f64; LANES]) -> f64 {
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}

/// Replaces every logit by `factor * e^d`.
pub fn weigh(level: Level, row: &mut [f32], scale: Scale, factor: f32) {
    level.run(Weigh { row, scale, factor });
}

struct Weigh<'a> {
    row: &'a mut [f32],
    scale: Scale,
    factor: f32,
}

impl Kernel for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { row, scale, factor } = self;
        let (lines, rest) = row.as_chunks_mut::<LANES>();
        for line in lines {
            let weight = exp(s, scale.d(s, s.load(line)));
            s.store(s.mul(weight, s.splat(factor)), line);
        }
        let mut last = [0.0; LANES];
        last[..rest.len()].copy_from_slice(rest);
        let weight = exp(s, scale.d(s, s.load(&last)));
        s.store(s.mul(weight, s.splat(factor)), &mut last);
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// The sum of e^d over the logits that are at least `floor`.
pub fn mass_above(level: Level, row: &[f32], scale: Scale, floor: f32) -> f64 {
    level.run(MassAbove { row, scale, floor })
}

struct MassAbove<'a> {
    row: &'a [f32],
    scale: Scale,
    floor: f32,
}

impl Kernel for MassAbove<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f64 {
        let Self { row, scale, floor } = self;
        let mut lanes = [0.0; LANES];
        for block in row.chunks(ROW_BLOCK) {
            let mut sum = s.splat(0.0);
            for_each_line!(block, f32::NEG_INFINITY, |_at, line| {
                let x = s.load(line);
                sum = s.add(sum, s.zero_below(exp(s, scale.d(s, x)), x, floor));
            });
            let sum = s.to_array(sum);
            for i in 0..LANES {
                lanes[i] += f64::from(sum[i]);
            }
        }
        total(lanes)
    }
}

/// The largest logit of every `LANES * 4` neighbours, as [`max`].
pub fn group_maxima(level: Level, row: &[f32], maxima: &mut Vec<f32>) {
    maxima.clear();
    maxima.extend(row.chunks(STRANDS * LANES).map(|group| max(level, group)));
}

/// Appends index and value of every logit that is at least `floor`, in order.
pub fn gather(level: Level, row: &[f32], floor: f32, found: &mut Vec<(u32, f32)>) {
    level.run(Gather { row, floor, found });
}

struct Gather<'a> {
    row: &'a [f32],
    floor: f32,
    found: &'a mut Vec<(u32, f32)>,
}

impl Kernel for Gather<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { row, floor, found } = self;
        let floor = s.splat(floor);
        for_each_line!(row, f32::NAN, |at, line| {
            let mut mask = s.at_least(s.load(line), floor);
            while mask != 0 {
                let lane = mask.trailing_zeros() as usize;
                found.push(((at + lane) as u32, line[lane]));
                mask &= mask - 1;
            }
        });
    }
}

/// Index of the first logit that is at least `floor`.
pub fn find(level: Level, row: &[f32], floor: f32) -> Option<usize> {
    level.run(Find { row, floor })
}

struct Find<'a> {
    row: &'a [f32],
    floor: f32,
}

impl Kernel for Find<'_> {
    type Output = Option<usize>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Option<usize> {
        let floor = s.splat(self.floor);
        for_each_line!(self.row, f32::NAN, |at, line| {
            let mask = s.at_least(s.load(line), floor);
            if mask != 0 {
                return Some(at + mask.trailing_zeros() as usize);
            }
        });
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 % 1013) as f32 / 97.0).sin() * 9.0).collect()
    }

    #[test]
    fn maxima_and_positions() {
        for len in [1, 15, 16, 17, 64, 100, 1000, 4099] {
            let mut row = row(len);
            row[len / 2] = 20.0;
            row[len - 1] = 20.0;
            row[0] = if len > 2 { f32::NAN } else { 20.0 };
            for level in Level::available() {
                assert_eq!(max(level, &row), 20.0);
                let first = if len > 2 { len / 2 } else { 0 };
                assert_eq!(find(level, &row, 20.0), Some(first), "{level:?} {len}");
                assert_eq!(find(level, &row, 20.5), None);
                let mut found = Vec::new();
                gather(level, &row, 8.5, &mut found);
                let want: Vec<(u32, f32)> =
                    (0..).zip(row.iter().copied()).filter(|&(_, x)| x >= 8.5).collect();
                assert_eq!(found, want);
                let mut maxima = Vec::new();
                group_maxima(level, &row, &mut maxima);
                let want: Vec<f32> =
                    row.chunks(64).map(|g| g.iter().copied().fold(f32::MIN, f32::max)).collect();
                assert_eq!(maxima, want);
            }
        }
    }

    #[test]
    fn no_logit_has_no_maximum() {
        for level in Level::available() {
            assert_eq!(max(level, &[]), f32::NEG_INFINITY);
            assert_eq!(max(level, &[f32::NAN; 20]), f32::NEG_INFINITY);
        }
    }

    #[test]
    fn masses_add_up_and_weights_are_theirs() {
        let row = row(1000);
        for level in Level::available() {
            let scale = Scale { max: max(level, &row), inv_temperature: 0.7 };
            let mut masses = vec![1.0; 9];
            let sums = moments(level, &row, scale, Some(&mut masses));
            assert_eq!(masses.len(), 4);
            assert!((masses.iter().sum::<f64>() / sums.z - 1.0).abs() < 1e-14);
            assert_eq!(moments(level, &row, scale, None), sums);
            let mut weights = row.clone();
            weigh(level, &mut weights, scale, 2.0);
            for (block, mass) in weights.chunks(ROW_BLOCK).zip(&masses) {
                let sum: f64 = block.iter().map(|&w| f64::from(w)).sum();
                assert!((sum / 2.0 / mass - 1.0).abs() < 1e-6);
            }
            let want: f64 = (row.iter().zip(&weights))
                .filter(|(x, _)| **x >= row[3])
                .map(|(_, &w)| f64::from(w) / 2.0)
                .sum();
            assert!((mass_above(level, &row, scale, row[3]) / want - 1.0).abs() < 1e-6);
        }
    }
}
