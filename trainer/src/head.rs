//! The output head of a training pass: logits of some rows, the statistics of their tokens, and the
//! gradient of their log-probs, which is known in closed form. Logits and all that follows from them
//! are f32 where the weights are narrower.

use onpolicy_engine::{
    cuda::{sampling as kernel, takes},
    device::{download, is_native, stats, upload},
    logits,
    model::decoder::Decoder,
    ops::linear::{self, accumulate_weight_gradient, input_gradient},
    torch::slices::{floats, floats_mut},
};
use onpolicy_plugin_api::TokenStats;
use tch::{Device, Tensor};

/// The output head, `[vocab, hidden]`, at a temperature.
pub struct Head {
    /// Collects the gradient.
    leaf: Tensor,
    /// The same storage without a graph.
    weight: Tensor,
    vocab: usize,
    inverse_temperature: f32,
}

impl Head {
    /// The head of `decoder`.
    pub fn new(decoder: &Decoder, temperature: f32) -> Self {
        let leaf = decoder.head().shallow_clone();
        let weight = leaf.detach();
        let vocab = leaf.size()[0] as usize;
        Self { leaf, weight, vocab, inverse_temperature: 1.0 / temperature }
    }

    /// Logits of `hidden` (`[rows, hidden]`), and the statistics of the token `targets[i]` in row
    /// `i`, which are all that leaves a device.
    pub fn forward(&self, hidden: &Tensor, targets: &[u32]) -> (Logits, Vec<TokenStats>) {
        let rows = linear::logits(hidden, &self.weight);
        let temperature = self.inverse_temperature;
        if is_native(&rows) {
            let stats = logits::batch_stats(floats(&rows), self.vocab, targets, temperature);
            return (Logits { rows, sums: None }, stats);
        }
        let ids = ids(targets, rows.device());
        if takes(rows.device()) {
            let looked = kernel::stats(&rows, &ids, temperature);
            let looked = looked.unwrap_or_else(|error| panic!("{error}"));
            let stats = numbers(&looked.numbers.narrow(1, 1, 3));
            return (Logits { rows, sums: Some(looked.sums) }, stats);
        }
        let stats = numbers(&stats::batch_stats(&rows, &ids, f64::from(temperature)));
        (Logits { rows, sums: None }, stats)
    }

    /// Adds the gradient of `sum_i slopes[i] * ln p_i(targets[i])` to that of the weight, and
    /// returns the gradient by `hidden`.
    pub fn backward(&self, logits: Logits, targets: (&[u32], &[f32]), hidden: &Tensor) -> Tensor {
        let rows = self.by_logits(logits, targets);
        let by_hidden = input_gradient(&rows, &self.weight);
        accumulate_weight_gradient(&self.leaf, &rows, hidden);
        by_hidden
    }

    /// The gradient by the logits, in the type of the weight.
    fn by_logits(&self, logits: Logits, (targets, slopes): (&[u32], &[f32])) -> Tensor {
        let (Logits { mut rows, sums }, temperature) = (logits, self.inverse_temperature);
        if is_native(&rows) {
            let values = floats_mut(&mut rows);
            logits::logprob_gradient(values, self.vocab, targets, slopes, temperature);
            return rows;
        }
        let ids = ids(targets, rows.device());
        let slopes = upload(slopes, rows.device());
        let kind = self.weight.kind();
        if let Some(sums) = sums {
            let made = kernel::gradient(rows, (&ids, &slopes), temperature, &sums, kind);
            return made.unwrap_or_else(|error| panic!("{error}"));
        }
        let slopes = slopes.to_kind(rows.kind());
        stats::logprob_gradient(&mut rows, &ids, &slopes, f64::from(temperature));
        rows.to_kind(kind)
    }
}

/// Logits, `[rows, vocab]`, between the passes.
pub struct Logits {
    rows: Tensor,
    /// What the kernels of a CUDA device know of each row.
    sums: Option<Tensor>,
}

/// Token ids, i64, on a device.
fn ids(tokens: &[u32], device: Device) -> Tensor {
    upload(&tokens.iter().map(|&id| i64::from(id)).collect::<Vec<_>>(), device)
}

/// Rows of log-prob, entropy and baseline.
fn numbers(rows: &Tensor) -> Vec<TokenStats> {
    let stats =
        |&[logprob, entropy, baseline]: &[f32; 3]| TokenStats { logprob, entropy, baseline };
    download(rows).as_chunks::<3>().0.iter().map(stats).collect()
}
