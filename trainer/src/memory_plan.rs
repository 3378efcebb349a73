//! How much memory a run will need, part by part, before it has taken it.

use crate::{
    config::{Config, EngineKind, Rollout},
    loss::HEAD_ROWS,
};
use onpolicy_engine::{
    block_manager::{BLOCK_SIZE, blocks_for},
    kv_cache::KvCache,
    model::config::ModelConfig,
};
use std::fmt;

const MIB: f64 = (1u64 << 20) as f64;

/// The parts of a run's memory that live at the same time, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryPlan {
    parts: Vec<(&'static str, usize)>,
}

impl MemoryPlan {
    /// The plan for steps whose prompts have `prompts` tokens each. `resident` is what the process
    /// holds now, with the weights loaded, the optimizer made and nothing run yet.
    pub fn new(model: &ModelConfig, config: &Config, prompts: &[usize], resident: usize) -> Self {
        let float = size_of::<f32>();
        let weights = model.parameter_count() * float;
        let rows = pack_rows(config, prompts);
        let kept = match config.train.activation_checkpointing {
            true => model.num_layers * model.hidden_size + layer_floats(model),
            false => model.num_layers * layer_floats(model),
        };
        let block = KvCache::block_bytes(model);
        let native = config.engine.kind() == EngineKind::Native;
        let pool = (config.engine.kv_memory_mb << 20) / block * block;
        let pages = if native { pool.min(kv_blocks(&config.rollout, prompts) * block) } else { 0 };
        // Two versions lie there, and a third while it is written.
        let underway = if native { 0 } else { 3 * weights };
        let parts = vec![
            ("weights", weights),
            ("gradients", weights),
            ("AdamW moments", 2 * weights),
            ("activations", rows * kept * float),
            ("their gradients", rows * gradient_floats(model) * float),
            ("output head", HEAD_ROWS * (model.vocab_size + 2 * model.hidden_size) * float),
            ("KV pages", pages),
            ("weights on their way", underway),
            ("libraries and the rest", resident.saturating_sub(4 * weights)),
        ];
        Self { parts: parts.into_iter().filter(|(_, bytes)| *bytes > 0).collect() }
    }

    /// All parts together, in bytes.
    pub fn total(&self) -> usize {
        self.parts.iter().map(|(_, bytes)| bytes).sum()
    }

    /// All parts together, in MiB.
    pub fn total_mb(&self) -> f64 {
        self.total() as f64 / MIB
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "memory planned: {:.0} MiB (", self.total_mb())?;
        for (index, (name, bytes)) in self.parts.iter().enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            write!(f, "{comma}{name} {:.0}", *bytes as f64 / MIB)?;
        }
        write!(f, ")")
    }
}

/// Rows of the largest pack.
fn pack_rows(config: &Config, prompts: &[usize]) -> usize {
    let rollout = &config.rollout;
    let tails = rollout.max_new_tokens - 1;
    let all: usize = prompts.iter().map(|prompt| prompt + rollout.group_size * tails).sum();
    let longest = prompts.iter().max().map_or(0, |prompt| prompt + tails);
    all.min(config.train.micro_batch_tokens.max(longest))
}

/// Floats that one layer keeps of a row: what its norms, linear layers, attention and gate read
/// again in the backward pass.
fn layer_floats(model: &ModelConfig) -> usize {
    let (q, kv) = (model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim);
    let normed_heads = if model.qk_norm { q + kv } else { 0 };
    // The inputs and outputs of both norms; q, k, v, the output of attention and a sum for every
    // head; gate, up and their product.
    4 * model.hidden_size
        + normed_heads
        + 2 * (q + kv)
        + model.num_heads
        + 3 * model.intermediate_size
}

/// Floats of a row that the backward pass of one layer holds at once, at most: the gradients by
/// gate, up and their product, and some of the layer's width.
fn gradient_floats(model: &ModelConfig) -> usize {
    3 * model.intermediate_size + 4 * model.hidden_size
}

/// Blocks of the KV pool that the samples of one step fill.
fn kv_blocks(rollout: &Rollout, prompts: &[usize]) -> usize {
    let group = |&prompt: &usize| {
        let own = blocks_for(prompt + rollout.max_new_tokens) - prompt / BLOCK_SIZE;
        blocks_for(prompt) + rollout.group_size * own
    };
    prompts.iter().map(group).sum()
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
        let rows = |flags: &[&str], prompts: &[usize]| pack_rows(&config(flags), prompts);
        let new = "rollout.max_new_tokens=64";
        assert_eq!(rows(&[new], &[41; 8]), 512);
        assert_eq!(rows(&[new, "rollout.group_size=2"], &[41]), 41 + 2 * 63);
        assert_eq!(rows(&[new, "train.micro_batch_tokens=64"], &[41, 30]), 104);
    }

    #[test]
    fn blocks_of_a_step() {
        let rollout = |new, n| Rollout { max_new_tokens: new, group_size: n, ..Rollout::default() };
        // 3 blocks of the prompt, two of them full; 7 blocks hold 105 tokens.
        assert_eq!(kv_blocks(&rollout(64, 8), &[41]), 3 + 8 * 5);
        assert_eq!(kv_blocks(&rollout(16, 2), &[32, 32]), 2 * (2 + 2));
    }

    #[test]
    fn checkpointing_is_planned_for() {
        let text = std::fs::read_to_string(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../tests/golden/tiny/llama-tied/config.json"
        ));
        let json = serde_json::from_str(&text.expect("the file")).expect("JSON");
        let model = ModelConfig::from_hf(&json, None).expect("a model");
        let total = |flags: &[&str]| MemoryPlan::new(&model, &config(flags), &[41; 8], 0).total();
        let (kept, recomputed) = (total(&[]), total(&["train.activation_checkpointing=true"]));
        let layers = model.num_layers;
        let saved = (layers - 1) * layer_floats(&model) - layers * model.hidden_size;
        assert_eq!(kept - recomputed, 512 * 4 * saved);
    }
}
