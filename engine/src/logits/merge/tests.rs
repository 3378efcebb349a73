//! Against sums in f64, on every instruction set.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::kernels::matmul::{Summed, nt_at, nt_summed_at};
use crate::kernels::parts::{PART, parts_of};

fn merge_rows(level: Level, parts: &mut [Part], factors: &[f32]) -> Vec<Sums> {
    let len = parts.len() / factors.len().div_ceil(LANES);
    let vectors = parts.chunks_mut(len).zip(factors.chunks(LANES));
    vectors.map(|(parts, factors)| merge_at(level, parts, factors)).collect()
}

/// Rows of logits by a product, and their sums by its parts.
fn check(level: Level, a: &[f32], b: &[f32], [m, n, k]: [usize; 3]) {
    let mut rng = StdRng::seed_from_u64(n as u64);
    let factors: Vec<f32> = (0..m).map(|_| rng.random_range(0.3..3.0)).collect();
    let mut logits = vec![0.0; m * n];
    nt_at(level, [a, b], None, &mut logits, [m, n, k]);
    let mut parts = vec![Part::EMPTY; m.div_ceil(LANES) * parts_of(n)];
    let to = Summed { written: &mut [], inv_temperatures: &factors, parts: &mut parts };
    nt_summed_at(level, [a, b], to, [m, n, k]);
    let sums = merge_rows(level, &mut parts, &factors);
    for (row, logits) in logits.chunks(n).enumerate() {
        let got = sums[row / LANES].row(row % LANES);
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        assert_eq!(got.max, max);
        let weights = logits.iter().map(|&x| {
            let d = (f64::from(x) - f64::from(max)) * f64::from(factors[row]);
            (d.exp(), if x == f32::NEG_INFINITY { 0.0 } else { d })
        });
        let want = weights
            .clone()
            .fold([0.0; 4], |[z, a1, b, c], (e, d)| [z + e, a1 + e * d, b + e * e, c + e * e * d]);
        for (got, want) in [got.z, got.a1, got.b, got.c].into_iter().zip(want) {
            let error = (got - want).abs();
            assert!(error <= 1e-6 * want.abs() + 1e-7, "{level:?} {n}: {got} instead of {want}");
        }
        let masses: Vec<f64> = weights.map(|(e, _)| e).collect();
        let spans = sums[row / LANES].spans.iter().map(|span| span.mass[row % LANES]);
        for (got, want) in spans.zip(masses.chunks(SPAN * PART)) {
            assert!((got - want.iter().sum::<f64>()).abs() <= 1e-6 * got.abs() + 1e-12);
        }
    }
}

#[test]
fn sums_are_those_of_whole_rows() {
    let mut rng = StdRng::seed_from_u64(1);
    let shapes =
        [[1, 1, 3], [16, 47, 5], [5, 48, 9], [70, 49, 40], [130, 3100, 20], [3, 700, 3000]];
    for [m, n, k] in shapes {
        for size in [0.1, 3.0] {
            let mut numbers = |len: usize, size: f32| -> Vec<f32> {
                (0..len).map(|_| rng.random_range(-size..size)).collect()
            };
            let (a, b) = (numbers(m * k, size), numbers(n * k, 1.0));
            for level in Level::available() {
                check(level, &a, &b, [m, n, k]);
            }
        }
    }
}

#[test]
fn one_likely_token_and_a_long_tail_lose_nothing() {
    // Each of the tail's weights is below half an ulp of the first one, their sum is not.
    for likely in [0.0, 6.0] {
        let mut b = vec![-17.0; 50_000];
        b[700] = likely;
        for level in Level::available() {
            check(level, &[1.0], &b, [1, 50_000, 1]);
        }
    }
}

#[test]
fn logits_of_minus_infinity_have_no_part() {
    let mut b: Vec<f32> = (0..400).map(|i| (i as f32).sin() * 4.0).collect();
    b[100..250].fill(f32::NEG_INFINITY);
    b[..7].fill(f32::NEG_INFINITY);
    for level in Level::available() {
        check(level, &[1.0, 0.5], &b, [2, 400, 1]);
    }
}

#[test]
fn parts_are_the_same_bits_in_any_batch_on_any_thread() {
    let mut rng = StdRng::seed_from_u64(2);
    let [m, n, k] = [150, 5000, 70];
    let mut numbers =
        |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-1.0f32..1.0)).collect() };
    let (a, b, factors) = (numbers(m * k), numbers(n * k), vec![1.3; m]);
    for level in Level::available() {
        let parts = |rows: std::ops::Range<usize>| {
            let mut parts = vec![Part::EMPTY; rows.len().div_ceil(LANES) * parts_of(n)];
            let (len, inv_temperatures) = (rows.len(), &factors[rows.clone()]);
            let to = Summed { written: &mut [], inv_temperatures, parts: &mut parts };
            nt_summed_at(level, [&a[rows.start * k..rows.end * k], &b], to, [len, n, k]);
            let sums = merge_rows(level, &mut parts, inv_temperatures);
            let row = |i: usize| {
                (sums[i / LANES].row(i % LANES), parts[i / LANES * parts_of(n)..].to_vec())
            };
            (0..len)
                .map(|i| {
                    let (stats, parts) = row(i);
                    let masses: Vec<f32> = parts[..parts_of(n)]
                        .iter()
                        .flat_map(|part| part.masses.map(|mass| mass.0[i % LANES]))
                        .collect();
                    (stats, masses)
                })
                .collect::<Vec<_>>()
        };
        let want = parts(0..m);
        for rows in [0..1, 7..8, 20..24, 9..14, 30..38, 60..69, 3..19, 40..104, 17..130] {
            assert!(parts(rows.clone()) == want[rows.clone()], "{level:?} {rows:?}");
        }
        let threads = tch::get_num_threads();
        tch::set_num_threads(1);
        let alone = parts(0..m);
        tch::set_num_threads(threads);
        assert!(alone == want, "{level:?}: on one thread");
    }
}
