//! The gate of the MLP: `y = g s(g) u` of gate g and up u, with `s(g) = 1 / (1 + e^-g)`.

use super::{
    lines::{Step, map},
    rows_at_a_time,
};
use crate::kernels::{
    disjoint::{for_each_chunk, for_each_pair},
    simd::{Kernel, Level, Simd, exp},
};

/// Up to so many elements one thread is faster.
const ALONE: usize = 1 << 16;

/// Below it s(g) is not a normal number any more, and taken as 0.
const LOWEST: f32 = -87.0;

/// Gate and up, of one length.
#[derive(Clone, Copy)]
pub struct SwiGlu<'a> {
    /// g.
    pub gate: &'a [f32],
    /// u.
    pub up: &'a [f32],
}

impl SwiGlu<'_> {
    /// y.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn forward(self, y: &mut [f32]) {
        self.forward_at(Level::best(), y);
    }

    /// The gradients by gate and up, into `by_gate` and `by_up`, out of the gradient by y.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn backward(self, gradient: &[f32], by_gate: &mut [f32], by_up: &mut [f32]) {
        self.backward_at(Level::best(), gradient, by_gate, by_up);
    }

    fn forward_at(self, level: Level, y: &mut [f32]) {
        let size = self.chunk_size(y.len());
        for_each_chunk(y, size, &|i, y| level.run(Forward(self.part(i * size, y.len()), y)));
    }

    fn backward_at(self, level: Level, gradient: &[f32], by_gate: &mut [f32], by_up: &mut [f32]) {
        let size = self.chunk_size(gradient.len());
        assert_eq!(by_gate.len(), gradient.len(), "a gradient of every gate");
        assert_eq!(by_up.len(), gradient.len(), "a gradient of every up");
        for_each_pair((by_gate, size), (by_up, size), &|i, by_gate, by_up| {
            let glu = self.part(i * size, by_gate.len());
            let gradient = &gradient[i * size..][..by_gate.len()];
            level.run(Backward { glu, gradient, by_gate, by_up });
        });
    }

    fn part(self, start: usize, len: usize) -> Self {
        Self { gate: &self.gate[start..][..len], up: &self.up[start..][..len] }
    }

    fn chunk_size(&self, len: usize) -> usize {
        assert!(self.gate.len() == len && self.up.len() == len, "gate and up of one length");
        rows_at_a_time(len, 1, ALONE)
    }
}

struct Forward<'a>(SwiGlu<'a>, &'a mut [f32]);

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        map(s, Glu, [self.0.gate, self.0.up], [self.1]);
    }
}

struct Backward<'a> {
    glu: SwiGlu<'a>,
    gradient: &'a [f32],
    by_gate: &'a mut [f32],
    by_up: &'a mut [f32],
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let inputs = [self.glu.gate, self.glu.up, self.gradient];
        map(s, Differentiate, inputs, [self.by_gate, self.by_up]);
    }
}

#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    // NaN stays NaN in this order.
    let bounded = s.max(s.splat(LOWEST), x);
    let e = exp(s, s.sub(s.splat(0.0), bounded));
    s.zero_below(s.div(one, s.add(one, e)), x, LOWEST)
}

#[derive(Clone, Copy)]
struct Glu;

impl Step<2, 1> for Glu {
    #[inline(always)]
    fn step<S: Simd>(self, s: S, [gate, up]: [S::V; 2], _: [S::V; 1]) -> [S::V; 1] {
        [s.mul(s.mul(gate, sigmoid(s, gate)), up)]
    }
}

/// By gate: `d u s (1 + g (1 - s))`. By up: `d g s`.
#[derive(Clone, Copy)]
struct Differentiate;

impl Step<3, 2> for Differentiate {
    #[inline(always)]
    fn step<S: Simd>(self, s: S, [gate, up, d]: [S::V; 3], _: [S::V; 2]) -> [S::V; 2] {
        let one = s.splat(1.0);
        let sigmoid = sigmoid(s, gate);
        let slope = s.mul_add(gate, s.sub(one, sigmoid), one);
        let scaled = s.mul(d, sigmoid);
        [s.mul(s.mul(scaled, up), slope), s.mul(scaled, gate)]
    }
}

#[cfg(test)]
mod tests {
    use super::super::{assert_close, numbers};
    use super::*;

    /// y, by gate and by up in f64.
    fn reference(gate: &[f32], up: &[f32], gradient: &[f32]) -> [Vec<f64>; 3] {
        let (mut y, mut by_gate, mut by_up) = (vec![], vec![], vec![]);
        for i in 0..gate.len() {
            let (g, u, d) = (f64::from(gate[i]), f64::from(up[i]), f64::from(gradient[i]));
            let s = 1.0 / (1.0 + (-g).exp());
            y.push(g * s * u);
            by_gate.push(d * u * s * (1.0 + g * (1.0 - s)));
            by_up.push(d * g * s);
        }
        [y, by_gate, by_up]
    }

    #[test]
    fn values_and_gradients_at_every_length() {
        for len in (1..=70).chain([576, 1536, ALONE + 7]) {
            for size in [0.1, 4.0, 60.0] {
                let (gate, up) = (numbers(len, 1, size), numbers(len, 2, 3.0));
                let gradient = numbers(len, 3, 0.5);
                let [want, want_by_gate, want_by_up] = reference(&gate, &up, &gradient);
                let glu = SwiGlu { gate: &gate, up: &up };
                for level in Level::available() {
                    let mut y = vec![f32::NAN; len];
                    let (mut by_gate, mut by_up) = (y.clone(), y.clone());
                    glu.forward_at(level, &mut y);
                    glu.backward_at(level, &gradient, &mut by_gate, &mut by_up);
                    assert_close(&y, &want, 5e-7);
                    assert_close(&by_gate, &want_by_gate, 1e-6);
                    assert_close(&by_up, &want_by_up, 5e-7);
                }
            }
        }
    }

    #[test]
    fn small_results_are_as_exact() {
        let gate: Vec<f32> = (0..860).map(|i| i as f32 / -10.0).collect();
        let ones = vec![1.0; gate.len()];
        let [want, _, _] = reference(&gate, &ones, &ones);
        for level in Level::available() {
            let mut y = ones.clone();
            SwiGlu { gate: &gate, up: &ones }.forward_at(level, &mut y);
            for (got, want) in y.iter().zip(want.iter()).skip(1) {
                assert!((f64::from(*got) / want - 1.0).abs() < 5e-7, "{got} for {want}");
            }
        }
    }

    #[test]
    fn edges() {
        let gate = [0.0, 100.0, f32::MAX, -1e3, f32::MIN, f32::NAN];
        for level in Level::available() {
            let (mut y, mut by_gate, mut by_up) = ([9.0; 6], [9.0; 6], [9.0; 6]);
            let glu = SwiGlu { gate: &gate, up: &[1.0; 6] };
            glu.forward_at(level, &mut y);
            glu.backward_at(level, &[1.0; 6], &mut by_gate, &mut by_up);
            assert_eq!(y[..5], [0.0, 100.0, f32::MAX, 0.0, 0.0], "{level:?}");
            assert_eq!(by_gate[..5], [0.5, 1.0, 1.0, 0.0, 0.0], "{level:?}");
            assert_eq!(by_up[..5], y[..5], "{level:?}");
            assert!(y[5].is_nan() && by_gate[5].is_nan() && by_up[5].is_nan(), "{level:?}");
        }
    }

    #[test]
    fn an_element_does_not_depend_on_its_place() {
        let len = ALONE + 1000;
        let (gate, up) = (numbers(len, 1, 4.0), numbers(len, 2, 3.0));
        let glu = SwiGlu { gate: &gate, up: &up };
        let mut all = vec![0.0; len];
        glu.forward(&mut all);
        for (start, len) in [(0, 1), (17, 33), (ALONE / 2 + 3, 576), (len - 1, 1)] {
            let mut part = vec![0.0; len];
            glu.part(start, len).forward(&mut part);
            assert_eq!(part, all[start..][..len]);
        }
    }
}
