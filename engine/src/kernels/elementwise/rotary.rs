//! Rotary position embedding: element i of the first half of a head and element i of the second
//! half are turned against each other by the angle i of the row.

use super::{
    lines::{Step, map},
    rows_at_a_time,
};
use crate::kernels::{
    disjoint::for_each_chunk,
    simd::{Kernel, Level, Simd},
};

/// Up to so many elements one thread is faster.
const ALONE: usize = 1 << 17;

/// The angles of some rows.
#[derive(Clone, Copy)]
pub struct Rotary<'a> {
    /// Cosines, `[rows][half]`.
    pub cos: &'a [f32],
    /// Sines, `[rows][half]`.
    pub sin: &'a [f32],
    /// Half of the dimension of a head.
    pub half: usize,
    /// Elements of a row: those of all its heads.
    pub width: usize,
}

impl Rotary<'_> {
    /// The heads `x` (`[rows][width]`) turned by the angles, into `y`.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn forward(self, x: &[f32], y: &mut [f32]) {
        self.turn(Level::best(), x, y, 1.0);
    }

    /// The gradient by x, into `by_x`, out of the gradient by y: turned back.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn backward(self, gradient: &[f32], by_x: &mut [f32]) {
        self.turn(Level::best(), gradient, by_x, -1.0);
    }

    fn turn(self, level: Level, x: &[f32], y: &mut [f32], direction: f32) {
        let Self { cos, sin, half, width } = self;
        assert!(half > 0 && width > 0 && width.is_multiple_of(2 * half), "rows of whole heads");
        let rows = cos.len() / half;
        assert!(cos.len() == rows * half && sin.len() == cos.len(), "half a head of angles a row");
        assert!(x.len() == rows * width && y.len() == x.len(), "as many rows as angles");
        let at_a_time = rows_at_a_time(rows, width, ALONE);
        for_each_chunk(y, at_a_time * width, &|i, y| {
            let x = &x[i * at_a_time * width..][..y.len()];
            let angles = i * at_a_time * half..(i * at_a_time + y.len() / width) * half;
            let rotary = Self { cos: &cos[angles.clone()], sin: &sin[angles], half, width };
            level.run(Turn { rotary, x, y, direction });
        });
    }
}

struct Turn<'a> {
    rotary: Rotary<'a>,
    x: &'a [f32],
    y: &'a mut [f32],
    direction: f32,
}

impl Kernel for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { rotary: Rotary { cos, sin, half, width }, x, y, direction } = self;
        let angles = cos.chunks_exact(half).zip(sin.chunks_exact(half));
        let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width));
        for ((cos, sin), (x, y)) in angles.zip(rows) {
            for (x, y) in x.chunks_exact(2 * half).zip(y.chunks_exact_mut(2 * half)) {
                let (first, second) = x.split_at(half);
                let outputs = y.split_at_mut(half).into();
                map(s, Pairs { direction }, [first, second, cos, sin], outputs);
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Pairs {
    direction: f32,
}

impl Step<4, 2> for Pairs {
    #[inline(always)]
    fn step<S: Simd>(self, s: S, [a, b, cos, sin]: [S::V; 4], _: [S::V; 2]) -> [S::V; 2] {
        let sin = s.mul(sin, s.splat(self.direction));
        [s.sub(s.mul(a, cos), s.mul(b, sin)), s.mul_add(b, cos, s.mul(a, sin))]
    }
}

#[cfg(test)]
mod tests {
    use super::super::{assert_close, numbers};
    use super::*;

    fn reference(rotary: Rotary<'_>, x: &[f32], direction: f64) -> Vec<f64> {
        let Rotary { cos, sin, half, width } = rotary;
        let element = |i: usize| {
            let (row, place) = (i / width, i % (2 * half));
            let angle = row * half + place % half;
            let (other, sign) = if place < half { (i + half, -1.0) } else { (i - half, 1.0) };
            let turned = sign * direction * f64::from(x[other]);
            f64::from(x[i]) * f64::from(cos[angle]) + turned * f64::from(sin[angle])
        };
        (0..x.len()).map(element).collect()
    }

    #[test]
    fn every_head_size_both_ways() {
        for half in (1..=35).chain([64, 128]) {
            for (rows, heads) in [(1, 1), (3, 9), (40, 3)] {
                let angles = numbers(rows * half, 1, 3.0);
                let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
                let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
                let width = heads * half * 2;
                let rotary = Rotary { cos: &cos, sin: &sin, half, width };
                let x = numbers(rows * width, 2, 2.0);
                for (level, direction) in
                    Level::available().into_iter().flat_map(|level| [(level, 1.0), (level, -1.0)])
                {
                    let mut y = vec![f32::NAN; x.len()];
                    rotary.turn(level, &x, &mut y, direction);
                    assert_close(&y, &reference(rotary, &x, f64::from(direction)), 3e-7);
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_others() {
        let (half, width) = (32, 576);
        let rows = ALONE / width + 5;
        let (cos, sin) = (numbers(rows * half, 1, 1.0), numbers(rows * half, 2, 1.0));
        let rotary = Rotary { cos: &cos, sin: &sin, half, width };
        let x = numbers(rows * width, 3, 2.0);
        let mut all = vec![0.0; x.len()];
        rotary.forward(&x, &mut all);
        for row in [0, 1, rows / 2, rows - 1] {
            let angles = row * half..(row + 1) * half;
            let rotary = Rotary { cos: &cos[angles.clone()], sin: &sin[angles], ..rotary };
            let mut one = vec![0.0; width];
            rotary.forward(&x[row * width..][..width], &mut one);
            assert_eq!(one, all[row * width..][..width]);
        }
    }

    #[test]
    #[should_panic(expected = "as many rows as angles")]
    fn rows_have_angles() {
        let rotary = Rotary { cos: &[1.0; 2], sin: &[0.0; 2], half: 2, width: 4 };
        rotary.forward(&[1.0; 8], &mut [0.0; 8]);
    }
}
