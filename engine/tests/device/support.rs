//! Tiny checkpoints in other types, engines over them, and what comes back.

use crate::common::engine;
use onpolicy_engine::{
    collect::{Samples, collect},
    engine::{EngineConfig, EngineHandle},
    model::{
        attention::{Attention, Pack},
        decoder::Decoder,
        loading::Checkpoint,
    },
    weights::Weights,
};
use onpolicy_plugin_api::{Request, SamplingParams};
use std::time::{Duration, Instant};
use tch::Tensor;

pub fn start(checkpoint: &Checkpoint) -> EngineHandle {
    start_with(checkpoint, EngineConfig::default())
}

pub fn start_with(checkpoint: &Checkpoint, config: EngineConfig) -> EngineHandle {
    engine(
        checkpoint,
        EngineConfig { kv_memory: 8 << 20, max_num_seqs: 32, ..ahead(checkpoint, config) },
    )
}

/// Steps are planned ahead, as on a CUDA device, where that is possible.
pub fn ahead(checkpoint: &Checkpoint, config: EngineConfig) -> EngineConfig {
    let native = weights(checkpoint).placement().is_native();
    EngineConfig { async_scheduling: Some(!native), ..config }
}

pub fn weights(checkpoint: &Checkpoint) -> Weights {
    let tensors = checkpoint.tensors.iter().map(|(name, t)| (name.clone(), t.shallow_clone()));
    Weights::new(tensors.collect())
}

/// Logits of every position of a sequence, from the trainer's path.
pub fn logits(checkpoint: &Checkpoint, tokens: &[u32]) -> Tensor {
    let decoder = Decoder::new(&checkpoint.config, &weights(checkpoint));
    let mut pack = Pack::default();
    pack.push(&tokens[..1], &[&tokens[1..]]);
    onpolicy_engine::torch::no_grad(|| {
        let mut attention = Attention::Causal(&pack);
        decoder.logits(&decoder.hidden(&pack.tokens(), &pack.positions(), &mut attention))
    })
}

pub fn run(engine: &EngineHandle, requests: Vec<Request>) -> Vec<Samples> {
    let deadline = Instant::now() + Duration::from_secs(60);
    collect(engine, requests, deadline, &mut || {}).expect("the engine answers")
}

pub fn request(seed: u32, len: usize, params: SamplingParams) -> Request {
    Request::new((0..len as u32).map(|i| 3 + (seed * 31 + i * 7) % 150).collect(), params)
}

pub fn sampled(n: usize, max_tokens: usize, seed: u64) -> SamplingParams {
    let seed = Some(seed);
    SamplingParams { n, max_tokens, seed, ignore_eos: true, ..SamplingParams::default() }
}

pub fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams { temperature: 0.0, ..sampled(1, max_tokens, 0) }
}

/// The tokens of all samples of a group.
pub fn tokens(group: &Samples) -> Vec<Vec<u32>> {
    let ids = |sample: &onpolicy_engine::collect::Sample| {
        sample.tokens.iter().map(|token| token.id).collect()
    };
    group.samples.iter().map(ids).collect()
}

pub fn all_tokens(groups: &[Samples]) -> Vec<Vec<u32>> {
    groups.iter().flat_map(tokens).collect()
}
