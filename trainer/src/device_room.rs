//! What K and V may take of a device: what the weights, the optimizer and training leave, training
//! being tried out before the engine is started.

use crate::{
    batch::{MicroBatch, TrainBatch, TrainGroup, TrainSample},
    config::{Config, EngineKind},
    entropy::KeepAll,
    error::TrainError,
    loss::{Activations, LossSettings, accumulate_gradient_with},
    memory_plan::SLACK,
    optimizer::{Optimizer, OptimizerSettings},
    room::Room,
};
use onpolicy_engine::{
    device::agreement::settle_early,
    model::{config::ModelConfig, decoder::Decoder, loading::Checkpoint},
    torch::{
        device_memory::{DeviceMemory, reset_peak},
        storage::empty_cache,
    },
    weights::Weights,
};
use tch::Device;

/// Looks whether kernels can be relied upon on the device that the weights lie on, before its memory is measured
/// with them or without.
///
/// # Errors
/// The device has no memory left.
pub fn settle_kernels(checkpoint: &Checkpoint) -> Result<(), TrainError> {
    Ok(settle_early(&checkpoint.config, &handles(checkpoint))?)
}

/// Handles to the weights.
fn handles(checkpoint: &Checkpoint) -> Weights {
    let handles = checkpoint.tensors.iter().map(|(name, t)| (name.clone(), t.shallow_clone()));
    Weights::new(handles.collect())
}

/// `config` with `engine.kv_memory_mb` and `train.micro_batch_tokens` as the device allows that the
/// weights lie on, where the former is not given.
///
/// # Errors
/// Training alone does not fit.
pub fn fit(
    config: &Config,
    checkpoint: &Checkpoint,
    prompts: &[usize],
) -> Result<Config, TrainError> {
    let mut config = config.clone();
    let Some(index) = to_be_sized(&config, checkpoint) else { return Ok(config) };
    let policy = handles(checkpoint);
    empty_cache(Device::Cuda(index))?;
    let before = DeviceMemory::of(index)?;
    reset_peak(index)?;
    let rows = rehearse(&config, (&checkpoint.config, &policy), prompts)?;
    config.train.micro_batch_tokens = Some(rows);
    let peak = DeviceMemory::of(index)?.peak_allocated.saturating_sub(before.allocated);
    empty_cache(Device::Cuda(index))?;
    config.engine.kv_memory_mb = Some(left(&before, peak)? >> 20);
    tracing::info!(
        training_mib = peak >> 20,
        kv_mib = config.engine.kv_memory_mb,
        rows,
        "memory of the device"
    );
    Ok(config)
}

/// As [`fit`], for an engine whose weights are not trained: all that is left but some slack, and what
/// steps of the engine take.
///
/// # Errors
/// Nothing is left.
pub fn fit_serving(config: &Config, checkpoint: &Checkpoint) -> Result<Config, TrainError> {
    let mut config = config.clone();
    if let Some(index) = to_be_sized(&config, checkpoint) {
        let others = step_bytes(&config, &checkpoint.config);
        config.engine.kv_memory_mb = Some(left(&DeviceMemory::of(index)?, others)? >> 20);
    }
    Ok(config)
}

/// The device whose room for K and V is to be found out, if there is one.
fn to_be_sized(config: &Config, checkpoint: &Checkpoint) -> Option<usize> {
    let own = config.engine.kind() == EngineKind::Native && config.engine.kv_memory_mb.is_none();
    match checkpoint.tensors.first()?.1.device() {
        Device::Cuda(index) if own => Some(index),
        _ => None,
    }
}

/// Bytes for K and V beside `others`.
fn left(memory: &DeviceMemory, others: usize) -> Result<usize, TrainError> {
    let slack = (memory.total as f64 * SLACK) as usize;
    let left = memory.available().saturating_sub(others + slack);
    if left >> 20 == 0 {
        return Err(TrainError::Refused(format!(
            "the device has {} MiB free, and {} MiB are needed beside K and V: lower \
             train.micro_batch_tokens, set train.activation_checkpointing = true, or take a smaller \
             model",
            memory.available() >> 20,
            (others + slack) >> 20
        )));
    }
    Ok(left)
}

/// Logits and hidden states of an engine's largest step.
fn step_bytes(config: &Config, model: &ModelConfig) -> usize {
    let engine = &config.engine;
    let logits = engine.max_num_seqs * model.vocab_size * 8;
    let rows = engine.max_batched_tokens * (4 * model.hidden_size + 3 * model.intermediate_size);
    (logits + rows) * size_of::<f32>()
}

/// Runs the largest pass that a step may have, over made-up tokens, with an optimizer beside it, and
/// returns the rows of a pass for which there was room. The weights stay as they are.
///
/// # Errors
/// One sample alone does not fit.
pub fn rehearse(
    config: &Config,
    (model, policy): (&ModelConfig, &Weights),
    prompts: &[usize],
) -> Result<usize, TrainError> {
    let weights = policy.share_trainable();
    let _optimizer = Optimizer::new(&weights, OptimizerSettings::new(&config.train))?;
    let decoder = Decoder::new(model, &weights);
    let batch = TrainBatch::new(groups(config, prompts), &KeepAll {});
    let activations = match config.train.activation_checkpointing {
        true => Activations::Recomputed,
        false => Activations::Kept,
    };
    let mut room = Room::new(config.train.pass_tokens(decoder.placement().device));
    room.run(batch.span(), |rows| {
        let mini_batch = batch.mini_batches(1, rows).remove(0);
        let settings = LossSettings::new(config, mini_batch.kept, true);
        let rows_of = |micro: &&MicroBatch| micro.pack.len();
        let largest = mini_batch.micro_batches.iter().max_by_key(rows_of).expect("one at least");
        accumulate_gradient_with(&decoder, largest, &settings, activations)
    })?;
    Ok(room.rows())
}

/// Groups of the longest samples.
fn groups(config: &Config, prompts: &[usize]) -> Vec<TrainGroup> {
    let (count, tokens) = (config.rollout.group_size, config.rollout.max_new_tokens);
    let sample = |index: usize| TrainSample {
        tokens: vec![0; tokens],
        logprob: vec![0.0; tokens],
        entropy: vec![0.0; tokens],
        baseline: vec![0.0; tokens],
        advantage: if index.is_multiple_of(2) { 1.0 } else { -1.0 },
    };
    let group = |&prompt: &usize| TrainGroup {
        prompt: vec![0; prompt.max(1)],
        samples: (0..count).map(sample).collect(),
        teaches: true,
    };
    prompts.iter().map(group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use onpolicy_engine::model::loading::load;

    #[test]
    fn a_rehearsal_leaves_the_weights_alone() {
        let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/tiny/llama-tied");
        let model = load(tiny).expect("a golden checkpoint");
        let handles = model.tensors.iter().map(|(name, t)| (name.clone(), t.shallow_clone()));
        let policy = Weights::new(handles.collect());
        let before: Vec<_> = policy.iter().map(|(_, tensor)| tensor.copy()).collect();
        let flags = ["model.path=x", "rollout.max_new_tokens=16"].map(String::from);
        let config = Config::parse("", &flags).expect("a configuration");
        let rows = rehearse(&config, (&model.config, &policy), &[20, 30]).expect("it fits");
        assert_eq!(rows, config.train.pass_tokens(Device::Cpu));
        for ((name, tensor), before) in policy.iter().zip(before) {
            assert!(tensor.equal(&before) && !tensor.grad().defined(), "{name}");
        }
        assert_eq!(fit(&config, &model, &[20]).expect("in main memory"), config);
        assert_eq!(fit_serving(&config, &model).expect("in main memory"), config);
    }

    #[test]
    fn what_is_left_is_beside_all_others() {
        let gib = 1usize << 30;
        let memory = DeviceMemory {
            free: 60 * gib,
            total: 80 * gib,
            allocated: 15 * gib,
            peak_allocated: 15 * gib,
            reserved: 16 * gib,
            peak_reserved: 16 * gib,
        };
        // 61 GiB can be had; 4 of them are slack.
        assert_eq!(left(&memory, 7 * gib).expect("room"), 50 * gib);
        let error = left(&memory, 57 * gib).expect_err("no room").to_string();
        assert!(
            error.contains("62464 MiB free") && error.contains("micro_batch_tokens"),
            "{error}"
        );
    }
}
