//! The output head of a training pass: logits of some rows, the statistics of their tokens, and the
//! gradient of their log-probs, which is known in closed form.

use onpolicy_engine::{
    logits::{batch_stats, logprob_gradient},
    model::decoder::Decoder,
    ops::linear::{accumulate_weight_gradient, input_gradient, linear},
    torch::slices::{floats, floats_mut},
};
use onpolicy_plugin_api::TokenStats;
use tch::Tensor;

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
    /// `i`.
    pub fn forward(&self, hidden: &Tensor, targets: &[u32]) -> (Tensor, Vec<TokenStats>) {
        let logits = linear(hidden, &self.weight, None);
        let stats = batch_stats(floats(&logits), self.vocab, targets, self.inverse_temperature);
        (logits, stats)
    }

    /// Adds the gradient of `sum_i slopes[i] * ln p_i(targets[i])` to that of the weight, and
    /// returns the gradient by `hidden`. `logits` are those of the forward pass.
    pub fn backward(
        &self,
        mut logits: Tensor,
        (targets, slopes): (&[u32], &[f32]),
        hidden: &Tensor,
    ) -> Tensor {
        let temperature = self.inverse_temperature;
        logprob_gradient(floats_mut(&mut logits), self.vocab, targets, slopes, temperature);
        let by_hidden = input_gradient(&logits, &self.weight);
        accumulate_weight_gradient(&self.leaf, &logits, hidden);
        by_hidden
    }
}
