//! Packed groups against padded batches, and layers that are run again against those that are not.

mod common;

use common::{drawn, groups, padded, settings, tiny, trainable};
use onpolicy_engine::weights::Weights;
use onpolicy_trainer::{
    batch::{MicroBatch, TrainBatch},
    entropy::KeepAll,
    loss::{Activations, LossSums, accumulate_gradient_with, token_stats},
};
use tch::Tensor;

const MODELS: [&str; 4] = ["llama-tied", "qwen2", "qwen3", "mistral-window"];

/// The loss and every weight's gradient, which is taken away.
fn gradients(
    (weights, decoder): (&Weights, &onpolicy_engine::model::decoder::Decoder),
    micros: &[MicroBatch],
    activations: Activations,
) -> (LossSums, Vec<(String, Tensor)>) {
    let mut sums = LossSums::default();
    let settings = settings(micros.iter().map(|micro| micro.targets.len()).sum());
    for micro in micros {
        let part = accumulate_gradient_with(decoder, micro, &settings, activations);
        sums.add(&part.expect("a gradient"));
    }
    let gradients = weights.iter().map(|(name, weight)| {
        let gradient = weight.grad();
        assert!(gradient.defined(), "{name} has no gradient");
        let copy = gradient.copy();
        let _ = weight.grad().fill_(0.0);
        (name.to_string(), copy)
    });
    (sums, gradients.collect())
}

#[test]
fn packed_groups_agree_with_padded_batches() {
    for model in MODELS {
        let (config, weights, decoder) = trainable(&tiny(model));
        let groups = groups([3, 5, config.vocab_size], 3..=20, 1..=12);
        let groups = drawn(&decoder, groups, 1000);
        let unshared = padded(&groups, 4);
        let batch = TrainBatch::new(groups, &KeepAll {});
        let packed = batch.mini_batches(1, 60).remove(0).micro_batches;
        let stats = |micros: &[MicroBatch]| -> Vec<f32> {
            let stats = micros.iter().flat_map(|micro| token_stats(&decoder, micro, 1.0));
            stats.flat_map(|token| [token.logprob, token.entropy]).collect()
        };
        for (got, want) in stats(&packed).iter().zip(stats(&unshared)) {
            assert!((got - want).abs() < 1e-5, "{model}: {got}, not {want}");
        }
        let (got_sums, got) = gradients((&weights, &decoder), &packed, Activations::Kept);
        let (sums, want) = gradients((&weights, &decoder), &unshared, Activations::Kept);
        assert_eq!((got_sums.tokens, got_sums.clipped), (sums.tokens, sums.clipped), "{model}");
        assert!((got_sums.objective - sums.objective).abs() < 1e-5, "{model}");
        assert!(sums.clipped > 0 && sums.clipped < sums.tokens, "{model}: a case worth testing");
        for ((name, got), (_, want)) in got.iter().zip(&want) {
            let error = (got - want).abs().max().double_value(&[]);
            let size = want.abs().max().double_value(&[]);
            assert!(error <= 1e-5 * size.max(1.0), "{model} {name}: off by {error:e} of {size:e}");
        }
    }
}

#[test]
fn layers_that_are_run_again_give_the_same_bits() {
    for model in MODELS {
        let (config, weights, decoder) = trainable(&tiny(model));
        let groups = groups([2, 3, config.vocab_size], 3..=20, 1..=12);
        let batch = TrainBatch::new(drawn(&decoder, groups, 1000), &KeepAll {});
        let micros = batch.mini_batches(1, 50).remove(0).micro_batches;
        let policy = (&weights, &decoder);
        let (sums, want) = gradients(policy, &micros, Activations::Kept);
        let (again, got) = gradients(policy, &micros, Activations::Recomputed);
        assert_eq!(sums, again, "{model}");
        for ((name, got), (_, want)) in got.iter().zip(&want) {
            assert!(got.equal(want), "{model}: {name}");
        }
    }
}
