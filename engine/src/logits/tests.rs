//! Against the full softmax in f64, on every instruction set; and the theorem itself.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

/// The slow, obvious version.
struct Naive {
    p: Vec<f64>,
    entropy: f64,
}

impl Naive {
    fn new(logits: &[f64]) -> Self {
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = logits.iter().map(|z| (z - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        let p: Vec<f64> = weights.iter().map(|w| w / total).collect();
        let entropy = -p.iter().filter(|&&p| p > 0.0).map(|p| p * p.ln()).sum::<f64>();
        Self { p, entropy }
    }

    fn of(logits: &[f32], inv_temperature: f32) -> Self {
        let scaled = logits.iter().map(|&z| f64::from(z) * f64::from(inv_temperature));
        Self::new(&scaled.collect::<Vec<_>>())
    }

    /// S of token `i`.
    fn score(&self, i: usize) -> f64 {
        let p = self.p[i];
        if p == 0.0 { 0.0 } else { p * (self.entropy + p.ln()) }
    }

    fn baseline(&self) -> f64 {
        (0..self.p.len()).map(|i| self.p[i] * self.score(i)).sum()
    }
}

fn random_row(rng: &mut StdRng, len: usize, spread: f32) -> Vec<f32> {
    (0..len).map(|_| (0..4).map(|_| rng.random::<f32>() - 0.5).sum::<f32>() * spread).collect()
}

/// Largest error that statistics of order `want` may have.
fn close(got: f32, want: f64, what: &str) {
    let error = (f64::from(got) - want).abs();
    assert!(error <= 1e-6 * want.abs() + 2e-7, "{what}: {got} instead of {want}");
}

fn check(row: &[f32], inv_temperature: f32) {
    let want = Naive::of(row, inv_temperature);
    for level in Level::available() {
        let stats = stats_at(level, row, inv_temperature, None);
        assert!(stats.is_valid());
        let z: f64 = row
            .iter()
            .map(|&x| (f64::from(x) - f64::from(stats.max)) * f64::from(inv_temperature))
            .map(f64::exp)
            .sum();
        assert!((stats.z / z - 1.0).abs() < 1e-6, "{level:?}: Z {} instead of {z}", stats.z);
        close(stats.entropy(), want.entropy, "entropy");
        close(stats.baseline(), want.baseline(), "baseline");
        for i in (0..row.len()).step_by(row.len() / 50 + 1) {
            let token = stats.token(row[i]);
            if want.p[i] > 0.0 {
                close(token.logprob, want.p[i].ln(), "logprob");
                close(token.discriminator(), want.score(i), "discriminator");
            }
        }
    }
}

#[test]
fn statistics_equal_the_full_softmax() {
    let mut rng = StdRng::seed_from_u64(1);
    for len in [1, 2, 15, 16, 17, 255, 256, 257, 1000, 49_152, 151_936] {
        for spread in [0.0, 1.0, 6.0, 40.0] {
            for inv_temperature in [1.0, 1.0 / 0.7, 0.5] {
                let row = random_row(&mut rng, len, spread);
                check(&row, inv_temperature);
                let shifted: Vec<f32> = row.iter().map(|z| z + 17.0).collect();
                check(&shifted, inv_temperature);
            }
        }
    }
}

#[test]
fn one_likely_token_and_a_long_tail_lose_nothing() {
    // Each of the tail's weights is below half an ulp of the first one, their sum is not.
    let mut row = vec![-17.0; 151_936];
    row[700] = 0.0;
    check(&row, 1.0);
    row[700] = 6.0;
    check(&row, 1.0);
}

#[test]
fn forbidden_tokens_have_no_part() {
    let mut rng = StdRng::seed_from_u64(2);
    let kept = random_row(&mut rng, 300, 5.0);
    let mut row = vec![f32::NEG_INFINITY; 900];
    row.iter_mut().skip(1).step_by(3).zip(&kept).for_each(|(x, &z)| *x = z);
    for level in Level::available() {
        let (got, want) = (stats_at(level, &row, 1.0, None), Naive::of(&kept, 1.0));
        close(got.entropy(), want.entropy, "entropy");
        close(got.baseline(), want.baseline(), "baseline");
        assert_eq!(got.logprob(f32::NEG_INFINITY), f32::NEG_INFINITY);
    }
    let one = [f32::NEG_INFINITY, 3.0, f32::NEG_INFINITY];
    let stats = row_stats(&one, 1.0).token(3.0);
    assert_eq!(stats, TokenStats { logprob: 0.0, entropy: 0.0, baseline: 0.0 });
}

#[test]
fn huge_logits_stay_finite() {
    for (row, entropy) in [
        (vec![f32::MAX, f32::MIN, 0.0], 0.0),
        (vec![1e30, 1e30, -1e30], std::f64::consts::LN_2),
        (vec![-1e38; 4], 4f64.ln()),
        (vec![f32::MIN, f32::NEG_INFINITY], 0.0),
    ] {
        for level in Level::available() {
            for inv_temperature in [1.0, 100.0, f32::MAX] {
                let stats = stats_at(level, &row, inv_temperature, None);
                assert!(stats.is_valid());
                close(stats.entropy(), entropy, "entropy");
                assert!(stats.baseline().is_finite());
                close(stats.logprob(stats.max), -stats.z.ln(), "logprob");
            }
        }
    }
}

#[test]
fn what_is_no_distribution_is_not_valid() {
    for bad in [f32::NAN, f32::INFINITY] {
        for len in [1, 20, 700] {
            let mut row = vec![0.5; len];
            row[len / 2] = bad;
            for level in Level::available() {
                assert!(!stats_at(level, &row, 1.0, None).is_valid(), "{level:?} {bad} {len}");
            }
        }
    }
    assert!(!row_stats(&[f32::NEG_INFINITY; 40], 1.0).is_valid());
    assert!(!row_stats(&[], 1.0).is_valid());
}

#[test]
fn a_batch_is_its_rows() {
    let mut rng = StdRng::seed_from_u64(3);
    let logits = random_row(&mut rng, 37 * 101, 8.0);
    let tokens: Vec<u32> = (0..37).map(|i| i * 29 % 101).collect();
    let got = batch_stats(&logits, 101, &tokens, 0.8);
    for (i, row) in logits.chunks(101).enumerate() {
        assert_eq!(got[i], row_stats(row, 0.8).token(row[tokens[i] as usize]));
    }
    assert_eq!(batch_stats(&[], 101, &[], 1.0), vec![]);
}

#[test]
#[should_panic(expected = "a token is outside of vocab")]
fn a_token_outside_of_the_vocabulary_is_refused() {
    batch_stats(&[0.0; 8], 4, &[0, 4], 1.0);
}

#[test]
fn the_gradient_is_that_of_the_logprob() {
    let mut rng = StdRng::seed_from_u64(4);
    for (vocab, inv_temperature) in [(5, 1.0), (40, 1.0 / 0.7), (300, 0.5)] {
        let logits = random_row(&mut rng, 3 * vocab, 4.0);
        let tokens = [0, vocab as u32 / 2, vocab as u32 - 1];
        let scales = [1.5, 0.0, -0.25];
        let mut got = logits.clone();
        logprob_gradient(&mut got, vocab, &tokens, &scales, inv_temperature);
        let inv = f64::from(inv_temperature);
        for i in 0..3 {
            let row: Vec<f64> =
                logits[i * vocab..(i + 1) * vocab].iter().map(|&z| f64::from(z)).collect();
            let loss = |j: usize, step: f64| {
                let mut z: Vec<f64> = row.iter().map(|z| z * inv).collect();
                z[j] += step * inv;
                f64::from(scales[i]) * Naive::new(&z).p[tokens[i] as usize].ln()
            };
            for j in 0..vocab {
                let want = (loss(j, 1e-4) - loss(j, -1e-4)) / 2e-4;
                let error = (f64::from(got[i * vocab + j]) - want).abs();
                assert!(error < 1e-6, "row {i}, logit {j}: {} {want}", got[i * vocab + j]);
            }
        }
    }
}

#[test]
fn the_gradient_of_a_row_sums_to_nothing() {
    let mut rng = StdRng::seed_from_u64(5);
    let mut row = random_row(&mut rng, 49_153, 5.0);
    row[7] = f32::NEG_INFINITY;
    softmax_minus_onehot(&mut row, 11, 2.0, 1.0);
    assert_eq!(row[7], 0.0);
    assert!(row.iter().map(|&x| f64::from(x)).sum::<f64>().abs() < 2e-6);
}

/// dH = -eps S* for one logit moved by eps, to first order.
#[test]
fn the_discriminator_predicts_what_one_logit_does_to_the_entropy() {
    let mut rng = StdRng::seed_from_u64(6);
    for _ in 0..20 {
        let row = random_row(&mut rng, 60, 6.0);
        let stats = row_stats(&row, 1.0);
        let z: Vec<f64> = row.iter().map(|&z| f64::from(z)).collect();
        for k in 0..60 {
            let moved = |eps: f64| {
                let mut z = z.clone();
                z[k] += eps;
                Naive::new(&z).entropy
            };
            let slope = (moved(1e-4) - moved(-1e-4)) / 2e-4;
            let predicted = -f64::from(stats.token(row[k]).discriminator());
            assert!((slope - predicted).abs() < 1e-6, "{slope} {predicted}");
        }
    }
}

/// dH = -alpha (S* - E_p\[S\]) for a GRPO step of size alpha on the logits of one token.
#[test]
fn the_baseline_predicts_what_a_policy_gradient_step_does_to_the_entropy() {
    let mut rng = StdRng::seed_from_u64(7);
    for _ in 0..20 {
        let row = random_row(&mut rng, 60, 6.0);
        let stats = row_stats(&row, 1.0);
        let z: Vec<f64> = row.iter().map(|&z| f64::from(z)).collect();
        for k in 0..60 {
            let mut gradient = row.clone();
            softmax_minus_onehot(&mut gradient, k as u32, 1.0, 1.0);
            let moved = |alpha: f64| {
                let z: Vec<f64> =
                    z.iter().zip(&gradient).map(|(z, &g)| z + alpha * f64::from(g)).collect();
                Naive::new(&z).entropy
            };
            let slope = (moved(1e-4) - moved(-1e-4)) / 2e-4;
            let token = stats.token(row[k]);
            let predicted = -f64::from(token.discriminator() - token.baseline);
            assert!((slope - predicted).abs() < 1e-6, "{slope} {predicted}");
        }
    }
}

/// E_p[S* - E_p[S]] = 0: on-policy, the expected change of the entropy is none to first order.
#[test]
fn the_baseline_is_the_mean_of_the_discriminator() {
    let mut rng = StdRng::seed_from_u64(8);
    let row = random_row(&mut rng, 1000, 6.0);
    let stats = row_stats(&row, 1.0);
    let mean: f64 = row
        .iter()
        .map(|&z| stats.token(z))
        .map(|token| f64::from(token.logprob).exp() * f64::from(token.discriminator()))
        .sum();
    close(stats.baseline(), mean, "baseline");
}
