//! How many rows, keys and numbers the passes over a batch have.

use crate::config::{Config, Rollout};
use onpolicy_engine::{
    block_manager::{BLOCK_SIZE, blocks_for},
    cuda::takes,
    device::Placement,
    model::config::ModelConfig,
};
use tch::Device;

/// Rows of the largest pack, for weights on `device`.
pub(super) fn pack_rows(config: &Config, prompts: &[usize], device: Device) -> usize {
    let rollout = &config.rollout;
    let tails = rollout.max_new_tokens - 1;
    let all: usize = prompts.iter().map(|prompt| prompt + rollout.group_size * tails).sum();
    let longest = prompts.iter().max().map_or(0, |prompt| prompt + tails);
    all.min(config.train.pass_tokens(device).max(longest))
}

/// Keys that so many rows see, where each sample has its prompt before it.
pub(super) fn pack_keys(config: &Config, prompts: &[usize], rows: usize) -> usize {
    let tails = config.rollout.max_new_tokens - 1;
    let group = |&prompt: &usize| {
        let samples = config.rollout.group_size;
        (prompt + samples * tails, prompt + samples * (prompt + tails))
    };
    let (all_rows, all_keys) =
        prompts.iter().map(group).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
    (all_keys * rows).div_ceil(all_rows.max(1))
}

/// Floats that one layer of the native path keeps of a row: what its norms, linear layers,
/// attention and gate read again in the backward pass.
pub(super) fn layer_floats(model: &ModelConfig) -> usize {
    let (q, kv) = widths(model);
    // The inputs and outputs of both norms; q, k, v, the output of attention and a sum for every
    // head; gate, up and their product.
    4 * model.hidden_size
        + normed_heads(model)
        + 2 * (q + kv)
        + model.num_heads
        + 3 * model.intermediate_size
}

/// Bytes that one layer of the libtorch path keeps of a row and of a key in `placement`. Prompts are
/// gathered for each of their samples.
pub(super) fn layer_bytes(model: &ModelConfig, placement: Placement) -> (usize, usize) {
    let (q, kv) = widths(model);
    let element = placement.element_bytes();
    // As in `layer_floats`; K and V are counted by key, and without a kernel of our own the gate's
    // exponential is kept too.
    let gates = if takes(placement.device) { 3 } else { 4 };
    let numbers =
        4 * model.hidden_size + normed_heads(model) + 2 * q + gates * model.intermediate_size;
    (element * numbers + size_of::<f32>() * model.num_heads, element * 2 * kv)
}

/// Numbers of a row that the backward pass of one layer holds at once, at most: the gradients by
/// gate, up and their product, and some of the layer's width.
pub(super) fn gradient_numbers(model: &ModelConfig) -> usize {
    3 * model.intermediate_size + 4 * model.hidden_size
}

/// Blocks of the KV pool that the samples of one step fill.
pub(super) fn kv_blocks(rollout: &Rollout, prompts: &[usize]) -> usize {
    let group = |&prompt: &usize| {
        let own = blocks_for(prompt + rollout.max_new_tokens) - prompt / BLOCK_SIZE;
        blocks_for(prompt) + rollout.group_size * own
    };
    prompts.iter().map(group).sum()
}

/// Numbers of the model's largest tensor.
pub(super) fn largest_tensor(model: &ModelConfig) -> usize {
    let numbers = |(_, shape): (String, Vec<i64>)| shape.iter().product::<i64>() as usize;
    model.tensor_shapes().into_iter().map(numbers).max().unwrap_or(0)
}

fn widths(model: &ModelConfig) -> (usize, usize) {
    (model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim)
}

/// Inputs of the norms of q and k.
fn normed_heads(model: &ModelConfig) -> usize {
    let (q, kv) = widths(model);
    if model.qk_norm { q + kv } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(flags: &[&str]) -> Config {
        let flags: Vec<String> =
            ["model.path=x"].iter().chain(flags).map(ToString::to_string).collect();
        Config::parse("", &flags).expect("a configuration")
    }

    #[test]
    fn rows_of_the_largest_pack() {
        let rows =
            |flags: &[&str], prompts: &[usize]| pack_rows(&config(flags), prompts, Device::Cpu);
        let new = "rollout.max_new_tokens=64";
        assert_eq!(rows(&[new], &[41; 8]), 512);
        assert_eq!(rows(&[new, "rollout.group_size=2"], &[41]), 41 + 2 * 63);
        assert_eq!(rows(&[new, "train.micro_batch_tokens=64"], &[41, 30]), 104);
        let whole = 8 * (41 + 8 * 63);
        assert_eq!(pack_rows(&config(&[new]), &[41; 8], Device::Cuda(0)), whole);
        assert_eq!(pack_rows(&config(&[new]), &[41; 80], Device::Cuda(0)), 8192);
    }

    #[test]
    fn keys_of_a_pack() {
        let config = config(&["rollout.max_new_tokens=11", "rollout.group_size=2"]);
        // 30 rows of a group: the prompt's 10 and twice 10; its keys: 10, and twice 10 + 10.
        assert_eq!(pack_keys(&config, &[10], 30), 50);
        assert_eq!(pack_keys(&config, &[10, 10], 30), 50);
    }

    #[test]
    fn blocks_of_a_step() {
        let rollout = |new, n| Rollout { max_new_tokens: new, group_size: n, ..Rollout::default() };
        // 3 blocks of the prompt, two of them full; 7 blocks hold 105 tokens.
        assert_eq!(kv_blocks(&rollout(64, 8), &[41]), 3 + 8 * 5);
        assert_eq!(kv_blocks(&rollout(16, 2), &[32, 32]), 2 * (2 + 2));
    }
}
