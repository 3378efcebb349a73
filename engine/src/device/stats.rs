//! Log-prob, entropy and baseline of rows of logits in tensor operations: [`crate::logits`] on any
//! device, with the same sums.

use tch::{Kind, Tensor};

/// Below it, d counts as this much where it is a factor: its exponential is 0 or next to it, and
/// 0 times minus infinity is no number.
const LOWEST: f64 = -100.0;

/// Sums over rows of logits; `[rows, 1]` each, f64 but for `max`. See
/// [`RowStats`](crate::logits::RowStats).
pub struct RowSums {
    /// Largest logit, in the logits' type.
    pub max: Tensor,
    /// One over the temperature.
    pub inv_temperature: Tensor,
    /// Sum of e^d.
    pub z: Tensor,
    /// Sum of e^d d.
    pub a1: Tensor,
    /// Sum of e^2d.
    pub b: Tensor,
    /// Sum of e^2d d.
    pub c: Tensor,
}

impl RowSums {
    /// The sums of the rows of `logits` (`[rows, vocab]`, f32 or f64), and e^d of each logit.
    /// `inv_temperature` (`[rows, 1]`) has the type of the logits.
    pub fn of(logits: &Tensor, inv_temperature: &Tensor) -> (Self, Tensor) {
        let max = logits.amax([-1i64].as_slice(), true);
        let d = (logits - &max) * inv_temperature;
        let weights = d.exp();
        let d = d.clamp_min(LOWEST);
        let sum = |terms: &Tensor| terms.sum_dim_intlist([-1i64].as_slice(), true, Kind::Double);
        let (first, square) = (&weights * &d, weights.square());
        let sums = Self {
            z: sum(&weights),
            a1: sum(&first),
            b: sum(&square),
            c: sum(&(square * d)),
            inv_temperature: inv_temperature.to_kind(Kind::Double),
            max,
        };
        (sums, weights)
    }

    /// ln p of the token with this logit in each row (`[rows, 1]`); NaN where a row is no
    /// distribution.
    pub fn logprob(&self, logit: &Tensor) -> Tensor {
        let logit = logit.to_kind(Kind::Double);
        (logit - self.max.to_kind(Kind::Double)) * &self.inv_temperature - self.z.log()
    }

    /// Entropy H, `[rows, 1]`.
    pub fn entropy(&self) -> Tensor {
        self.z.log() - &self.a1 / &self.z
    }

    /// Baseline E_p\[S\], `[rows, 1]`.
    pub fn baseline(&self) -> Tensor {
        (&self.c - &self.b * &self.a1 / &self.z) / self.z.square()
    }

    /// Log-prob, entropy and baseline of the token with this logit, `[rows, 3]`, f64.
    pub fn token(&self, logit: &Tensor) -> Tensor {
        Tensor::cat(&[self.logprob(logit), self.entropy(), self.baseline()], 1)
    }
}

/// As [`batch_stats`](crate::logits::batch_stats), for `logits` `[rows, vocab]` (f32 or f64) and
/// `tokens` `[rows]` (i64) on one device: log-prob, entropy and baseline, `[rows, 3]`, f64.
pub fn batch_stats(logits: &Tensor, tokens: &Tensor, inv_temperature: f64) -> Tensor {
    let rows = [logits.size()[0], 1];
    let factor = Tensor::full(rows, inv_temperature, (logits.kind(), logits.device()));
    let (sums, _) = RowSums::of(logits, &factor);
    sums.token(&logits.gather(1, &tokens.unsqueeze(1), false))
}

/// As [`logprob_gradient`](crate::logits::logprob_gradient), for tensors of one device: the gradient
/// of `sum_i scales[i] * ln p_i(tokens[i])` by `logits` (`[rows, vocab]`, f32 or f64), which it
/// overwrites. `tokens` (i64) and `scales` (the logits' type) are `[rows]`.
pub fn logprob_gradient(
    logits: &mut Tensor,
    tokens: &Tensor,
    scales: &Tensor,
    inv_temperature: f64,
) {
    let scales = (scales * inv_temperature).unsqueeze(1);
    let probabilities = (&*logits * inv_temperature).softmax(-1, logits.kind());
    logits.copy_(&(probabilities * -&scales));
    let _ = logits.scatter_add_(1, &tokens.unsqueeze(1), &scales);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::download,
        logits,
        torch::{random, slices::floats},
    };
    use tch::Device;

    fn rows() -> (Tensor, Vec<u32>) {
        random::seed(1);
        let logits = random::normal(&[9, 1000]) * 6.0;
        let _ = logits.get(3).narrow(0, 10, 900).fill_(f64::NEG_INFINITY);
        let _ = logits.get(3).get(0).fill_(40.0);
        (logits, (0..9).map(|i| i * 111).collect())
    }

    #[test]
    fn statistics_are_those_of_the_kernels() {
        let (rows, tokens) = rows();
        let ids: Vec<i64> = tokens.iter().map(|&id| i64::from(id)).collect();
        for inv_temperature in [1.0, 0.7, 3.0] {
            let want = logits::batch_stats(floats(&rows), 1000, &tokens, inv_temperature);
            let ids = Tensor::from_slice(&ids);
            let got = download(&batch_stats(&rows, &ids, f64::from(inv_temperature)));
            for (row, (got, want)) in got.chunks(3).zip(want).enumerate() {
                let want = [want.logprob, want.entropy, want.baseline];
                for (got, want) in got.iter().zip(want) {
                    let close = (got - want).abs() <= 1e-5 * want.abs().max(1.0);
                    assert!(close || *got == want, "row {row}: {got}, not {want}");
                }
            }
        }
    }

    #[test]
    fn a_row_that_is_no_distribution_is_told_by_nan() {
        for (broken, count) in [(f64::NAN, 1), (f64::INFINITY, 1), (f64::NEG_INFINITY, 5)] {
            let rows = Tensor::zeros([2, 5], (Kind::Float, Device::Cpu));
            let _ = rows.get(1).narrow(0, 0, count).fill_(broken);
            let stats = download(&batch_stats(&rows, &Tensor::from_slice(&[1i64, 1]), 1.0));
            assert!((stats[0] + 5f32.ln()).abs() < 1e-6 && stats[3].is_nan(), "{stats:?}");
        }
    }

    #[test]
    fn gradients_are_those_of_the_kernels() {
        let (mut rows, tokens) = rows();
        let ids: Vec<i64> = tokens.iter().map(|&id| i64::from(id)).collect();
        let scales: Vec<f32> = (0..9).map(|i| i as f32 - 4.0).collect();
        let mut want = floats(&rows).to_vec();
        logits::logprob_gradient(&mut want, 1000, &tokens, &scales, 0.8);
        let (ids, scales) = (Tensor::from_slice(&ids), Tensor::from_slice(&scales));
        logprob_gradient(&mut rows, &ids, &scales, 0.8);
        for (got, want) in download(&rows).iter().zip(want) {
            assert!((got - want).abs() < 1e-5, "{got}, not {want}");
        }
    }
}
