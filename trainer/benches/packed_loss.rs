//! The packed loss of one micro-batch, a group of 8 samples of 64 tokens that share a prompt of 41,
//! on made-up weights of SmolLM2-135M's shape: gradient of the loss, the same with layers that are
//! run again, and log-probs alone. Elements are the samples' tokens. Packed against padded, in
//! turns, is `loss`. `cargo bench --workspace --bench packed_loss`

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::Duration;

use common::{drawn, groups, settings};
use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use onpolicy_engine::{
    model::{config::ModelConfig, decoder::Decoder},
    torch::{memory::keep_freed, random},
    weights::Weights,
};
use onpolicy_trainer::{
    batch::{MicroBatch, TrainBatch},
    entropy::KeepAll,
    loss::{Activations, accumulate_gradient_with, token_stats},
};
use serde_json::json;
use tch::{Device, Kind, Tensor};

/// Rows that a pack may have; the group fits into one.
const MAX_ROWS: usize = 1024;

criterion_group! {
    name = packed;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(10));
    targets = loss
}
criterion_main!(packed);

fn smollm2_shape() -> ModelConfig {
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": true,
        "vocab_size": 49_152,
    });
    ModelConfig::from_hf(&config, None).expect("a configuration")
}

/// Norms are 1, everything else is drawn as before a pre-training.
fn weights(config: &ModelConfig) -> Weights {
    let options = (Kind::Float, Device::Cpu);
    let tensor = |shape: Vec<i64>| match shape.len() {
        1 => Tensor::ones(&shape, options),
        _ => random::normal(&shape) * 0.02,
    };
    let tensors = config.tensor_shapes().into_iter().map(|(name, shape)| (name, tensor(shape)));
    Weights::new(tensors.collect()).share_trainable()
}

fn micro_batch(config: &ModelConfig, decoder: &Decoder) -> MicroBatch {
    let groups = groups([1, 8, config.vocab_size], 41..=41, 64..=64);
    let batch = TrainBatch::new(drawn(decoder, groups, MAX_ROWS), &KeepAll {});
    let mut micros = batch.mini_batches(1, MAX_ROWS).remove(0).micro_batches;
    assert_eq!(micros.len(), 1, "the group fits into a pack");
    micros.remove(0)
}

fn loss(criterion: &mut Criterion) {
    keep_freed();
    let config = smollm2_shape();
    let weights = weights(&config);
    let decoder = Decoder::new(&config, &weights);
    let micro = micro_batch(&config, &decoder);
    let settings = settings(micro.targets.len());
    let mut group = criterion.benchmark_group("packed loss, 8 samples of 64");
    group.sampling_mode(SamplingMode::Flat);
    group.throughput(Throughput::Elements(micro.targets.len() as u64));
    for (name, activations) in
        [("gradient", Activations::Kept), ("gradient, layers run again", Activations::Recomputed)]
    {
        group.bench_function(name, |bench| {
            bench.iter(|| {
                accumulate_gradient_with(&decoder, &micro, &settings, activations)
                    .expect("a gradient")
            });
        });
    }
    group.bench_function("log-probs", |bench| bench.iter(|| token_stats(&decoder, &micro, 1.0)));
}
