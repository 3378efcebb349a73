//! Loops over slices of one length, sixteen elements of each at a time. The last ones are filled
//! up with zeros.

use crate::kernels::simd::{LANES, Simd};

/// Vectors of sums that are kept side by side.
const STRANDS: usize = 4;

/// What happens to sixteen elements of `I` inputs and `O` outputs.
pub(super) trait Step<const I: usize, const O: usize>: Copy {
    /// The new outputs, out of the inputs `x` and the outputs `y` so far. Implementations are
    /// `#[inline(always)]`.
    fn step<S: Simd>(self, s: S, x: [S::V; I], y: [S::V; O]) -> [S::V; O];
}

/// Applies a step to every element.
///
/// # Panics
/// If the slices differ in length.
#[inline(always)]
pub(super) fn map<S: Simd, F: Step<I, O>, const I: usize, const O: usize>(
    s: S,
    step: F,
    inputs: [&[f32]; I],
    outputs: [&mut [f32]; O],
) {
    let len = outputs[0].len();
    let inputs = inputs.map(|input| whole(input, len));
    let mut outputs = outputs.map(|output| {
        assert_eq!(output.len(), len, "slices of one length");
        output.as_chunks_mut::<LANES>()
    });
    for i in 0..len / LANES {
        let mut y = [s.splat(0.0); O];
        for (y, output) in y.iter_mut().zip(&outputs) {
            *y = s.load(&output.0[i]);
        }
        let y = step.step(s, load(s, &inputs, i), y);
        for (y, output) in y.into_iter().zip(&mut outputs) {
            s.store(y, &mut output.0[i]);
        }
    }
    if !len.is_multiple_of(LANES) {
        let mut y = [s.splat(0.0); O];
        for (y, output) in y.iter_mut().zip(&outputs) {
            *y = s.load(&filled_up(output.1));
        }
        let y = step.step(s, load_rest(s, &inputs), y);
        for (y, output) in y.into_iter().zip(&mut outputs) {
            let y = s.to_array(y);
            output.1.copy_from_slice(&y[..output.1.len()]);
        }
    }
}

/// Sums over all elements: what a step, given the sums so far as outputs, adds to them. It must
/// add nothing where all inputs are 0.
///
/// # Panics
/// If the slices differ in length.
#[inline(always)]
pub(super) fn fold<S: Simd, F: Step<I, O>, const I: usize, const O: usize>(
    s: S,
    step: F,
    inputs: [&[f32]; I],
) -> [f64; O] {
    let len = inputs[0].len();
    let inputs = inputs.map(|input| whole(input, len));
    let mut sums = [[s.splat(0.0); O]; STRANDS];
    let lines = len / LANES;
    for i in 0..lines / STRANDS {
        for (j, sums) in sums.iter_mut().enumerate() {
            *sums = step.step(s, load(s, &inputs, i * STRANDS + j), *sums);
        }
    }
    for i in lines / STRANDS * STRANDS..lines {
        sums[0] = step.step(s, load(s, &inputs, i), sums[0]);
    }
    if !len.is_multiple_of(LANES) {
        sums[1] = step.step(s, load_rest(s, &inputs), sums[1]);
    }
    let mut totals = [0.0; O];
    for (i, total) in totals.iter_mut().enumerate() {
        let sum = s.add(s.add(sums[0][i], sums[1][i]), s.add(sums[2][i], sums[3][i]));
        *total = add_up(s.to_array(sum));
    }
    totals
}

/// Whole lines, and what is left.
type Lines<'a> = (&'a [[f32; LANES]], &'a [f32]);

#[inline(always)]
fn whole(input: &[f32], len: usize) -> Lines<'_> {
    assert_eq!(input.len(), len, "slices of one length");
    input.as_chunks()
}

#[inline(always)]
fn load<S: Simd, const I: usize>(s: S, inputs: &[Lines<'_>; I], i: usize) -> [S::V; I] {
    let mut x = [s.splat(0.0); I];
    for (x, input) in x.iter_mut().zip(inputs) {
        *x = s.load(&input.0[i]);
    }
    x
}

#[inline(always)]
fn load_rest<S: Simd, const I: usize>(s: S, inputs: &[Lines<'_>; I]) -> [S::V; I] {
    let mut x = [s.splat(0.0); I];
    for (x, input) in x.iter_mut().zip(inputs) {
        *x = s.load(&filled_up(input.1));
    }
    x
}

#[inline(always)]
fn filled_up(rest: &[f32]) -> [f32; LANES] {
    let mut line = [0.0; LANES];
    line[..rest.len()].copy_from_slice(rest);
    line
}

#[inline(always)]
fn add_up(lanes: [f32; LANES]) -> f64 {
    let mut lanes = lanes.map(f64::from);
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}
