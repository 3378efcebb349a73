//! Root-mean-square norm: `y = x r w` with `r = 1 / sqrt(mean(x^2) + eps)` of each row.

use super::{
    lines::{Step, fold, map},
    rows_at_a_time,
};
use crate::kernels::{
    disjoint::{for_each_chunk, for_each_pair},
    simd::{Kernel, Level, Simd},
};

/// Up to so many elements one thread is faster.
const ALONE: usize = 1 << 17;

/// The norm of rows.
#[derive(Clone, Copy)]
pub struct RmsNorm<'a> {
    /// The rows, one after the other, each as long as the weight.
    pub x: &'a [f32],
    /// What each column is multiplied by.
    pub weight: &'a [f32],
    /// Added to the mean of the squares.
    pub eps: f64,
}

impl<'a> RmsNorm<'a> {
    /// The normed rows, into `y`.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn forward(self, y: &mut [f32]) {
        self.forward_at(Level::best(), y);
    }

    /// The gradients by the rows and by the weight, into `by_x` and `by_weight`, out of the
    /// gradient by the result.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn backward(self, gradient: &[f32], by_x: &mut [f32], by_weight: &mut [f32]) {
        self.backward_at(Level::best(), gradient, by_x, by_weight);
    }

    fn forward_at(self, level: Level, y: &mut [f32]) {
        let size = self.chunk_size();
        assert_eq!(y.len(), self.x.len(), "a place for every element");
        for_each_chunk(y, size, &|i, y| level.run(Forward(self.part(i * size, y.len()), y)));
    }

    fn backward_at(self, level: Level, gradient: &[f32], by_x: &mut [f32], by_weight: &mut [f32]) {
        let (size, width) = (self.chunk_size(), self.weight.len());
        let len = self.x.len();
        assert!(gradient.len() == len && by_x.len() == len, "gradients of every element");
        assert_eq!(by_weight.len(), width, "a gradient of every weight");
        let mut sums = vec![0.0; len.div_ceil(size) * width];
        for_each_pair((by_x, size), (&mut sums, width), &|i, by_x, by_weight| {
            let norm = self.part(i * size, by_x.len());
            let gradient = &gradient[i * size..][..by_x.len()];
            level.run(Backward { norm, gradient, by_x, by_weight });
        });
        add_rows(&sums, by_weight);
    }

    fn part(self, start: usize, len: usize) -> Self {
        Self { x: &self.x[start..][..len], ..self }
    }

    fn chunk_size(&self) -> usize {
        let width = self.weight.len();
        assert!(width > 0 && self.x.len().is_multiple_of(width), "rows as long as the weight");
        rows_at_a_time(self.x.len() / width, width, ALONE) * width
    }

    /// `1 / sqrt(mean + eps)` of a row, out of the sum of its squares.
    #[inline(always)]
    fn inverse(&self, squares: f64) -> f64 {
        1.0 / (squares / self.weight.len() as f64 + self.eps).sqrt()
    }
}

/// Writes the sum of two terms and its norm, with a weight and eps, into `sum` and `normed`.
///
/// # Panics
/// If a length does not fit.
pub fn add_norm([x, y]: [&[f32]; 2], (weight, eps): (&[f32], f64), [sum, normed]: [&mut [f32]; 2]) {
    assert!(y.len() == x.len() && sum.len() == x.len(), "terms and their sum, of one length");
    let size = RmsNorm { x, weight, eps }.chunk_size();
    for_each_pair((sum, size), (normed, size), &|i, sum, normed| {
        let [x, y] = [x, y].map(|term| &term[i * size..][..sum.len()]);
        Level::best().run(AddNorm { x, y, weight, eps, sum, normed });
    });
}

struct AddNorm<'a> {
    x: &'a [f32],
    y: &'a [f32],
    weight: &'a [f32],
    eps: f64,
    sum: &'a mut [f32],
    normed: &'a mut [f32],
}

impl Kernel for AddNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, y, weight, eps, sum, normed } = self;
        let width = weight.len();
        let terms = x.chunks_exact(width).zip(y.chunks_exact(width));
        let results = sum.chunks_exact_mut(width).zip(normed.chunks_exact_mut(width));
        for ((x, y), (sum, normed)) in terms.zip(results) {
            map(s, Add, [x, y], [&mut *sum]);
            Forward(RmsNorm { x: sum, weight, eps }, normed).run(s);
        }
    }
}

/// Adds two terms.
#[derive(Clone, Copy)]
struct Add;

impl Step<2, 1> for Add {
    #[inline(always)]
    fn step<S: Simd>(self, s: S, [x, y]: [S::V; 2], _: [S::V; 1]) -> [S::V; 1] {
        [s.add(x, y)]
    }
}

/// The sum of the rows `sums`, into `total`.
fn add_rows(sums: &[f32], total: &mut [f32]) {
    let mut wide = vec![0.0; total.len()];
    for row in sums.chunks_exact(total.len()) {
        for (wide, &sum) in wide.iter_mut().zip(row) {
            *wide += f64::from(sum);
        }
    }
    for (total, &wide) in total.iter_mut().zip(&wide) {
        *total = wide as f32;
    }
}

struct Forward<'a>(RmsNorm<'a>, &'a mut [f32]);

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self(norm, y) = self;
        let width = norm.weight.len();
        for (x, y) in norm.x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            let [squares] = fold(s, Square, [x]);
            let inverse = norm.inverse(squares) as f32;
            map(s, Normalize { inverse }, [x, norm.weight], [y]);
        }
    }
}

struct Backward<'a> {
    norm: RmsNorm<'a>,
    gradient: &'a [f32],
    by_x: &'a mut [f32],
    /// Added to, one row after the other.
    by_weight: &'a mut [f32],
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { norm, gradient, by_x, by_weight } = self;
        let width = norm.weight.len();
        let rows = norm.x.chunks_exact(width).zip(gradient.chunks_exact(width));
        for ((x, gradient), by_x) in rows.zip(by_x.chunks_exact_mut(width)) {
            let inputs = [x, gradient, norm.weight];
            let [squares, along] = fold(s, SquareAndAlong, inputs);
            let inverse = norm.inverse(squares);
            let pull = inverse.powi(3) * along / width as f64;
            let step = Differentiate { inverse: inverse as f32, pull: pull as f32 };
            map(s, step, inputs, [by_x, by_weight]);
        }
    }
}

/// Sums x^2.
#[derive(Clone, Copy)]
struct Square;

impl Step<1, 1> for Square {
    #[inline(always)]
    fn step<S: Simd>(self, s: S, [x]: [S::V; 1], [sum]: [S::V; 1]) -> [S::V; 1] {
        [s.mul_add(x, x, sum)]
    }
}

/// Sums x^2 and x g w.
#[derive(Clone, Copy)]
struct SquareAndAlong;

impl Step<3, 2> for SquareAndAlong {
    #[inline(always)]
    fn step<S: Simd>(self, s: S, [x, g, w]: [S::V; 3], sums: [S::V; 2]) -> [S::V; 2] {
        [s.mul_add(x, x, sums[0]), s.mul_add(s.mul(g, w), x, sums[1])]
    }
}

#[derive(Clone, Copy)]
struct Normalize {
    inverse: f32,
}

impl Step<2, 1> for Normalize {
    #[inline(always)]
    fn step<S: Simd>(self, s: S, [x, w]: [S::V; 2], _: [S::V; 1]) -> [S::V; 1] {
        [s.mul(s.mul(x, s.splat(self.inverse)), w)]
    }
}

/// By x: `g w r - x r^3 sum(x g w) / width`. By the weight: `g x r`, added up.
#[derive(Clone, Copy)]
struct Differentiate {
    inverse: f32,
    pull: f32,
}

impl Step<3, 2> for Differentiate {
    #[inline(always)]
    fn step<S: Simd>(self, s: S, [x, g, w]: [S::V; 3], [_, sum]: [S::V; 2]) -> [S::V; 2] {
        let scaled = s.mul(g, s.splat(self.inverse));
        let by_x = s.mul_add(scaled, w, s.mul(x, s.splat(-self.pull)));
        [by_x, s.mul_add(scaled, x, sum)]
    }
}

#[cfg(test)]
mod tests {
    use super::super::{assert_close, numbers};
    use super::*;

    const EPS: f64 = 1e-5;

    /// y, by x and by weight in f64.
    fn reference(norm: RmsNorm<'_>, gradient: &[f32]) -> [Vec<f64>; 3] {
        let RmsNorm { x, weight, eps } = norm;
        let width = weight.len();
        let (mut y, mut by_x, mut by_weight) = (vec![], vec![], vec![0.0; width]);
        for (x, g) in x.chunks(width).zip(gradient.chunks(width)) {
            let column = |i: usize| (f64::from(x[i]), f64::from(g[i]), f64::from(weight[i]));
            let mean = (0..width).map(|i| column(i).0.powi(2)).sum::<f64>() / width as f64;
            let r = 1.0 / (mean + eps).sqrt();
            let along: f64 = (0..width).map(column).map(|(x, g, w)| x * g * w).sum();
            for (i, by_weight) in by_weight.iter_mut().enumerate() {
                let (x, g, w) = column(i);
                y.push(x * r * w);
                by_x.push(g * w * r - x * r.powi(3) * along / width as f64);
                *by_weight += g * x * r;
            }
        }
        [y, by_x, by_weight]
    }

    #[test]
    fn values_and_gradients_at_every_width() {
        for width in (1..=70).chain([576, 1536]) {
            for rows in [1, 3, 90] {
                let len = rows * width;
                let (x, gradient) = (numbers(len, 1, 3.0), numbers(len, 2, 0.5));
                let weight = numbers(width, 3, 2.0);
                // A short row has next to no gradient but through eps.
                let eps = if width < 8 { 0.5 } else { EPS };
                let norm = RmsNorm { x: &x, weight: &weight, eps };
                let [want, want_by_x, want_by_weight] = reference(norm, &gradient);
                for level in Level::available() {
                    let (mut y, mut by_x) = (vec![f32::NAN; len], vec![f32::NAN; len]);
                    let mut by_weight = vec![f32::NAN; width];
                    norm.forward_at(level, &mut y);
                    norm.backward_at(level, &gradient, &mut by_x, &mut by_weight);
                    assert_close(&y, &want, 5e-7);
                    assert_close(&by_x, &want_by_x, 1e-6);
                    assert_close(&by_weight, &want_by_weight, 1e-6);
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_others() {
        for width in [1, 33, 576] {
            let rows = ALONE / width + 5;
            let (x, weight) = (numbers(rows * width, 1, 3.0), numbers(width, 2, 2.0));
            let norm = RmsNorm { x: &x, weight: &weight, eps: EPS };
            let mut all = vec![0.0; x.len()];
            norm.forward(&mut all);
            for row in [0, 1, rows / 2, rows - 1] {
                let mut one = vec![0.0; width];
                norm.part(row * width, width).forward(&mut one);
                assert_eq!(one, all[row * width..][..width]);
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let (rows, width) = (1000, 576);
        let (x, weight) = (numbers(rows * width, 1, 3.0), numbers(width, 2, 2.0));
        let gradient = numbers(rows * width, 3, 0.5);
        let gradients = [1, 2, 5].map(|threads| {
            tch::set_num_threads(threads);
            let (mut by_x, mut by_weight) = (vec![0.0; x.len()], vec![0.0; width]);
            let norm = RmsNorm { x: &x, weight: &weight, eps: EPS };
            norm.backward(&gradient, &mut by_x, &mut by_weight);
            (by_x, by_weight)
        });
        assert!(gradients[0] == gradients[1] && gradients[0] == gradients[2]);
    }

    #[test]
    fn no_rows_have_no_gradient() {
        let mut by_weight = [f32::NAN; 3];
        RmsNorm { x: &[], weight: &[1.0; 3], eps: EPS }.backward(&[], &mut [], &mut by_weight);
        assert_eq!(by_weight, [0.0; 3]);
    }

    #[test]
    #[should_panic(expected = "rows as long as the weight")]
    fn rows_fit_the_weight() {
        RmsNorm { x: &[1.0; 4], weight: &[1.0; 3], eps: EPS }.forward(&mut [0.0; 4]);
    }
}
