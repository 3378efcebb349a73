//! How many operations and bytes a model's work takes, from its shape.
//!
//! Counted is what cannot be done without: matrix products and attention (a multiply-add is two
//! operations), weights and KV read. Norms, activations, sampling and statistics are not.

use super::{roofline::Work, workload::Workload};
use onpolicy_engine::{device::Placement, model::config::ModelConfig};

/// Bytes of an f32, the type of gradients, moments and masters.
const F32: f64 = 4.0;

/// The costs of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct Costs {
    /// Weights of all layers' matrices.
    layers: f64,
    /// Weights of the output head.
    head: f64,
    /// All weights, the embedding among them.
    parameters: f64,
    /// `heads * head_dim`.
    query_width: f64,
    /// `2 * kv_heads * head_dim`: K and V of one position in one layer.
    kv_width: f64,
    /// The window of each layer.
    windows: Vec<Option<usize>>,
    /// Bytes of the copies that the engine multiplies with in the weights' place; 0 where none.
    copies: f64,
    /// Bytes of a weight, and of a number of K and V.
    element: f64,
}

/// One forward and backward pass of the trainer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Pass {
    /// Position of each row in its sequence.
    pub positions: Vec<usize>,
    /// Response tokens, for which the head is computed.
    pub targets: usize,
}

impl Costs {
    /// Of the model with this shape.
    pub fn new(model: &ModelConfig) -> Self {
        let hidden = model.hidden_size as f64;
        let query_width = (model.num_heads * model.head_dim) as f64;
        let kv_width = 2.0 * (model.num_kv_heads * model.head_dim) as f64;
        let feed_forward = 3.0 * hidden * model.intermediate_size as f64;
        let layer = hidden * (2.0 * query_width + kv_width) + feed_forward;
        Self {
            layers: layer * model.num_layers as f64,
            head: hidden * model.vocab_size as f64,
            parameters: model.parameter_count() as f64,
            query_width,
            kv_width,
            windows: model.layer_window.clone(),
            copies: 0.0,
            element: F32,
        }
    }

    /// The same where weights, K and V are of the type of `placement`.
    pub fn placed(self, placement: Placement) -> Self {
        Self { element: placement.element_bytes() as f64, ..self }
    }

    /// The same where the engine serves copies of so many bytes in place of layers and head.
    pub fn serving_copies(self, bytes: usize) -> Self {
        Self { copies: bytes as f64, ..self }
    }

    /// Operations of one token's matrix products, attention not counted.
    pub fn flop_per_token(&self) -> f64 {
        2.0 * (self.layers + self.head)
    }

    /// Positions that a row with `context` positions before and at its own sees, over all layers.
    fn seen(&self, context: usize) -> f64 {
        let layer = |window: &Option<usize>| window.map_or(context, |w| w.min(context)) as f64;
        self.windows.iter().map(layer).sum()
    }

    /// Operations of attention for one row: queries by keys, and weights by values.
    fn attention_flop(&self, context: usize) -> f64 {
        4.0 * self.query_width * self.seen(context)
    }

    /// Bytes of the K and V that a row reads.
    fn kv_bytes(&self, context: usize) -> f64 {
        self.element * self.kv_width * self.seen(context)
    }

    /// Bytes of the weights that a pass reads: layers and head.
    fn weight_bytes(&self) -> f64 {
        self.element * (self.layers + self.head)
    }

    /// As [`Costs::weight_bytes`], of a pass of the engine.
    fn served_bytes(&self) -> f64 {
        if self.copies > 0.0 { self.copies } else { self.weight_bytes() }
    }

    /// A rollout: prefill, then one step for every further token of all samples together. `shared`:
    /// a group's prompt is computed once, and its KV read once a step.
    pub fn rollout(&self, workload: &Workload, shared: bool) -> Work {
        let Workload { prompts, samples, prompt_tokens, .. } = *workload;
        let prompts = if shared { prompts } else { prompts * samples } as f64;
        let mut work = Work::default();
        let rows = prompt_tokens as f64;
        let attention: f64 = (1..=prompt_tokens).map(|context| self.attention_flop(context)).sum();
        work.add(
            prompts * (2.0 * self.layers * rows + attention + 2.0 * self.head),
            self.served_bytes(),
        );
        work.then(&self.decode(workload, shared))
    }

    /// The steps of a rollout after its prefill.
    pub fn decode(&self, workload: &Workload, shared: bool) -> Work {
        let Workload { prompts, samples, prompt_tokens, new_tokens, .. } = *workload;
        let all = (prompts * samples) as f64;
        let prompts = if shared { prompts as f64 } else { all };
        let mut work = Work::default();
        for new in 1..new_tokens {
            let attention = self.attention_flop(prompt_tokens + new);
            let of_prompt = self.kv_bytes(prompt_tokens + new) - self.kv_bytes(new);
            let kv = prompts * of_prompt + all * self.kv_bytes(new);
            work.add(all * (self.flop_per_token() + attention), self.served_bytes() + kv);
        }
        work
    }

    /// Forward and backward: every product of the forward pass has two in the backward pass. The
    /// weights are read twice, their gradients read and written.
    pub fn training(&self, passes: &[Pass]) -> Work {
        let mut work = Work::default();
        for pass in passes {
            let rows = pass.positions.len() as f64;
            let attention: f64 = pass.positions.iter().map(|p| self.attention_flop(p + 1)).sum();
            let head = 2.0 * self.head * pass.targets as f64;
            work.add(
                3.0 * (2.0 * self.layers * rows + attention + head),
                4.0 * self.weight_bytes(),
            );
        }
        work
    }

    /// An AdamW step: weights, gradients and two moments are read, all but the gradients written;
    /// narrow weights are written from f32 masters, which are read for it.
    pub fn optimizer(&self) -> Work {
        let narrow = if self.element < F32 { F32 + self.element } else { 0.0 };
        let mut work = Work::default();
        work.add(0.0, (7.0 * F32 + narrow) * self.parameters);
        work
    }

    /// Bytes of all weights.
    pub fn served_weights(&self) -> f64 {
        self.element * self.parameters
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::roofline::Rates;
    use serde_json::json;

    fn smollm2() -> Costs {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152,
            "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
            "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": true,
            "max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2
        });
        Costs::new(&ModelConfig::from_hf(&config, None).expect("a configuration"))
    }

    /// By hand: a layer has 576 * (576 + 192 + 192 + 576) + 3 * 576 * 1536 = 3,538,944 weights in
    /// its matrices; 30 of them 106,168,320; the head 576 * 49152 = 28,311,552.
    #[test]
    fn copies_are_read_in_the_place_of_weights() {
        let (plain, copies) = (smollm2(), smollm2().serving_copies(1000));
        assert_eq!(plain.served_bytes(), plain.weight_bytes());
        assert_eq!(copies.served_bytes(), 1000.0);
        let one = Workload::named("W1").expect("a workload");
        assert_ne!(copies.rollout(&one, true), plain.rollout(&one, true));
        let pass = [Pass { positions: vec![0], targets: 1 }];
        assert_eq!(copies.training(&pass), plain.training(&pass));
    }

    #[test]
    fn narrow_weights_are_half_the_bytes() {
        let wide = smollm2();
        let kind = tch::Kind::BFloat16;
        let narrow = smollm2().placed(Placement { kind, ..Placement::NATIVE });
        assert_eq!(narrow.weight_bytes() * 2.0, wide.weight_bytes());
        assert_eq!(narrow.kv_bytes(7) * 2.0, wide.kv_bytes(7));
        assert_eq!(narrow.served_weights(), 2.0 * 134_515_008.0);
        // Gradients, moments and masters: 28 bytes; masters again, and the weights: 6.
        let rates = Rates { ours_gflops: 1.0, libtorch_gflops: 1.0, read_gbs: 1.0 };
        let gbytes = |costs: &Costs| rates.need(&costs.optimizer()).gbytes;
        assert!((gbytes(&narrow) / gbytes(&wide) - 34.0 / 28.0).abs() < 1e-9);
    }

    #[test]
    fn a_token_of_smollm2() {
        let costs = smollm2();
        assert_eq!(costs.flop_per_token(), 268_959_744.0);
        // 30 layers, 2 products of 576 by the context of 100.
        assert_eq!(costs.attention_flop(100), 30.0 * 4.0 * 576.0 * 100.0);
        // 30 layers, K and V, 3 heads of 64, 4 bytes: 46,080 a position.
        assert_eq!(costs.kv_bytes(1), 46_080.0);
        assert_eq!(costs.parameters, 134_515_008.0);
    }

    #[test]
    fn a_window_ends_what_a_row_sees() {
        let windows = vec![None, Some(8)];
        let costs = Costs { windows, ..smollm2() };
        assert_eq!((costs.seen(5), costs.seen(20)), (10.0, 28.0));
    }

    #[test]
    fn rollouts_by_hand() {
        let costs = smollm2();
        let (layers, head) = (106_168_320.0, 28_311_552.0);
        let workload = Workload::custom([2, 3, 2, 3]);
        // Shared: two prompts of two rows, then two steps of six rows at contexts 3 and 4.
        let prefill = 2.0 * (4.0 * layers + 2.0 * head + 69_120.0 * (1.0 + 2.0));
        let decode = 6.0 * (2.0 * 268_959_744.0 + 69_120.0 * (3.0 + 4.0));
        assert_eq!(costs.rollout(&workload, true).flop(), prefill + decode);
        // Not shared: six prompts.
        assert_eq!(costs.rollout(&workload, false).flop(), 3.0 * prefill + decode);
        let mut by_hand = Work::default();
        let weights = 4.0 * (layers + head);
        by_hand.add(prefill, weights);
        let kv = |new: f64| 46_080.0 * (2.0 * 2.0 + 6.0 * new);
        by_hand.add(6.0 * (268_959_744.0 + 3.0 * 69_120.0), weights + kv(1.0));
        by_hand.add(6.0 * (268_959_744.0 + 4.0 * 69_120.0), weights + kv(2.0));
        assert_eq!(costs.rollout(&workload, true), by_hand);
    }

    #[test]
    fn training_is_three_times_the_forward_pass() {
        let costs = smollm2();
        let pass = Pass { positions: vec![0, 1, 2, 1], targets: 3 };
        let forward = 4.0 * 2.0 * 106_168_320.0 + 3.0 * 2.0 * 28_311_552.0 + 69_120.0 * 8.0;
        assert_eq!(costs.training(&[pass]).flop(), 3.0 * forward);
    }
}
