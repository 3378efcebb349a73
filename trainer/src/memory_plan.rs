//! How much memory a run will need, part by part, before it has taken it, and how much of a given
//! memory that leaves for K and V.

mod sizes;

use crate::{
    config::{Config, EngineKind, Mode},
    error::TrainError,
    loss::head_rows,
};
use onpolicy_engine::{
    block_manager::BLOCK_SIZE, cuda::takes, device::Placement, kv_cache::KvCache,
    model::config::ModelConfig,
};
use serde::Serialize;
use std::fmt;

const MIB: f64 = (1u64 << 20) as f64;
/// KV pages in main memory, if no other number is given.
pub const HOST_KV: usize = 1 << 30;
/// What the driver, libtorch and its libraries take of a device.
const CONTEXT: usize = 1 << 30;
/// Share of a device that is left to the allocator, whose pieces do not fit without gaps.
pub const SLACK: f64 = 0.05;
/// Tensors of `[rows, vocabulary]` in f32 that statistics and gradients hold at once, in libtorch's
/// operations.
const WIDE_LOGITS: usize = 8;
/// The same with kernels of our own: the logits themselves, and their narrow copy or some chosen rows.
const KERNELS_LOGITS: usize = 2;

/// What a plan is made for.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// The model's shape.
    pub model: &'a ModelConfig,
    /// The run.
    pub config: &'a Config,
    /// Tokens of each prompt of a step.
    pub prompts: &'a [usize],
    /// Where the tensors live.
    pub placement: Placement,
    /// What the process holds of that memory beside the parts of the plan.
    pub others: usize,
    /// Bytes of the memory; none if that is not known.
    pub memory: Option<usize>,
}

/// The parts of a run's memory that live at the same time, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    placement: String,
    parts: Vec<Part>,
    kv: KvPlan,
    memory: Option<usize>,
}

/// One part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Part {
    /// What it is.
    pub name: &'static str,
    /// How much, in bytes.
    pub bytes: usize,
}

/// The pages of K and V.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct KvPlan {
    /// Bytes of a block of 16 tokens, over all layers.
    pub block_bytes: usize,
    /// Blocks of the pool.
    pub blocks: usize,
    /// Blocks that the samples of one step fill.
    pub needed: usize,
    /// Further blocks for which the memory has room; 0 if it is not known.
    pub left: usize,
}

impl MemoryPlan {
    /// The plan for `of`.
    pub fn new(of: &Subject<'_>) -> Self {
        let mut parts = if of.placement.is_native() { of.native() } else { of.libtorch() };
        let mut kv = of.kv();
        let pages = match (of.config.engine.kind(), of.placement.is_native()) {
            (EngineKind::Native, false) => kv.blocks,
            // They come from the system as they are written.
            (EngineKind::Native, true) => kv.blocks.min(kv.needed),
            _ => 0,
        };
        parts.insert(parts.len() - 1, Part { name: "KV pages", bytes: pages * kv.block_bytes });
        parts.retain(|part| part.bytes > 0);
        let plan = Self { placement: of.placement.to_string(), parts, kv, memory: of.memory };
        kv.left = plan.left() / kv.block_bytes;
        Self { kv, ..plan }
    }

    /// The parts.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The pages of K and V.
    pub fn kv(&self) -> KvPlan {
        self.kv
    }

    /// All parts together, in bytes.
    pub fn total(&self) -> usize {
        self.parts.iter().map(|part| part.bytes).sum()
    }

    /// All parts together, in MiB.
    pub fn total_mb(&self) -> f64 {
        self.total() as f64 / MIB
    }

    /// Bytes that the memory has left, some slack apart; 0 if it is too small or not known.
    fn left(&self) -> usize {
        let memory = self.memory.unwrap_or(0);
        let usable = memory - (memory as f64 * SLACK) as usize;
        usable.saturating_sub(self.total())
    }

    /// Whether the run fits into the memory.
    ///
    /// # Errors
    /// It does not; the message says how much is missing and what can be done.
    pub fn check(&self) -> Result<(), TrainError> {
        let Some(memory) = self.memory else { return Ok(()) };
        let missing = self.total().saturating_sub(memory);
        if missing == 0 {
            return Ok(());
        }
        Err(TrainError::Refused(format!(
            "the run does not fit into {:.0} MiB: {:.0} MiB are missing. Set \
             train.activation_checkpointing = true, lower train.micro_batch_tokens or \
             engine.kv_memory_mb, or take a smaller model",
            memory as f64 / MIB,
            missing as f64 / MIB
        )))
    }
}

/// The part that is neither weights nor made of them.
const REST: &str = "libraries and the rest";

impl Subject<'_> {
    /// Kernels of our own over f32 in main memory.
    fn native(&self) -> Vec<Part> {
        let (model, float) = (self.model, size_of::<f32>());
        let weights = model.parameter_count() * float;
        let rows = sizes::pack_rows(self.config, self.prompts, self.placement.device);
        let kept = match self.config.train.activation_checkpointing {
            true => model.num_layers * model.hidden_size + sizes::layer_floats(model),
            false => model.num_layers * sizes::layer_floats(model),
        };
        parts(&[
            ("weights", weights),
            ("gradients", weights),
            ("AdamW moments", 2 * weights),
            ("activations", rows * kept * float),
            ("their gradients", rows * sizes::gradient_numbers(model) * float),
            ("output head", self.head_rows() * (model.vocab_size + 2 * model.hidden_size) * float),
            ("weights on their way", self.underway(weights)),
            (REST, self.others),
        ])
    }

    /// libtorch's operations, on any device.
    fn libtorch(&self) -> Vec<Part> {
        let (model, float) = (self.model, size_of::<f32>());
        let element = self.placement.element_bytes();
        let numbers = model.parameter_count();
        let rows = sizes::pack_rows(self.config, self.prompts, self.placement.device);
        let keys = sizes::pack_keys(self.config, self.prompts, rows);
        let (of_row, of_key) = sizes::layer_bytes(model, self.placement);
        let layer = rows * of_row + keys * of_key;
        let kept = match self.config.train.activation_checkpointing {
            true => model.num_layers * rows * model.hidden_size * element + layer,
            false => model.num_layers * layer,
        };
        let by_layer = rows * sizes::gradient_numbers(model) * element;
        let context = if self.placement.device.is_cuda() { CONTEXT } else { 0 };
        parts(&[
            ("weights", numbers * element),
            ("f32 masters", if element < float { numbers * float } else { 0 }),
            ("gradients", numbers * float.max(element)),
            ("AdamW moments", 2 * numbers * float.max(element)),
            ("activations", kept),
            ("their gradients", by_layer + sizes::largest_tensor(model) * element),
            ("logits", self.logits()),
            ("weights on their way", self.underway(numbers * element)),
            (REST, self.others.max(context)),
        ])
    }

    /// Logits of the trainer's head and of the engine's draws, which share memory unless they are
    /// made at the same time.
    fn logits(&self) -> usize {
        let Config { rollout, engine, train, .. } = self.config;
        let wide = if takes(self.placement.device) { KERNELS_LOGITS } else { WIDE_LOGITS };
        let of = |rows: usize| rows * self.model.vocab_size * size_of::<f32>() * wide;
        let drawn = (self.prompts.len() * rollout.group_size).min(engine.max_num_seqs);
        match train.mode {
            Mode::Overlapped => of(self.head_rows()) + of(drawn),
            Mode::Online | Mode::Batch => of(self.head_rows()).max(of(drawn)),
        }
    }

    fn head_rows(&self) -> usize {
        head_rows(self.placement.device)
    }

    /// Two versions lie there, and a third while it is written.
    fn underway(&self, weights: usize) -> usize {
        let native = self.config.engine.kind() == EngineKind::Native;
        if native { 0 } else { 3 * weights }
    }

    fn kv(&self) -> KvPlan {
        let block_bytes = KvCache::block_bytes_in(self.model, self.placement);
        let pool = self.config.engine.kv_memory_mb.map_or(HOST_KV, |mb| mb << 20);
        let needed = sizes::kv_blocks(&self.config.rollout, self.prompts);
        KvPlan { block_bytes, blocks: pool / block_bytes, needed, left: 0 }
    }
}

fn parts(named: &[(&'static str, usize)]) -> Vec<Part> {
    named.iter().map(|&(name, bytes)| Part { name, bytes }).collect()
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "memory planned: {:.0} MiB (", self.total_mb())?;
        for (index, Part { name, bytes }) in self.parts.iter().enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            write!(f, "{comma}{name} {:.0}", *bytes as f64 / MIB)?;
        }
        write!(f, ")")?;
        let Some(memory) = self.memory else { return Ok(()) };
        write!(
            f,
            " of {:.0} MiB; {} blocks of {BLOCK_SIZE} tokens for K and V, {} for a step, room for {} \
             more",
            memory as f64 / MIB,
            self.kv.blocks,
            self.kv.needed,
            self.kv.left
        )
    }
}

/// The plan as a table, one part a line.
pub struct Table<'a>(pub &'a MemoryPlan);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plan = self.0;
        let mut line =
            |name: &str, bytes: usize| writeln!(f, "  {name:<24} {:>10.0} MiB", bytes as f64 / MIB);
        plan.parts.iter().try_for_each(|part| line(part.name, part.bytes))?;
        line("together", plan.total())?;
        if let Some(memory) = plan.memory {
            line("memory", memory)?;
        }
        let KvPlan { blocks, needed, block_bytes, left } = plan.kv;
        writeln!(
            f,
            "K and V: {blocks} blocks of {BLOCK_SIZE} tokens ({} tokens, {:.2} MiB a block); the \
             samples of a step fill {needed}; {left} more ({:.0} MiB) are left",
            blocks * BLOCK_SIZE,
            block_bytes as f64 / MIB,
            (left * block_bytes) as f64 / MIB
        )
    }
}

#[cfg(test)]
mod tests;
