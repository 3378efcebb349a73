//! The paged K and V of every layer.

use crate::{
    block_manager::BLOCK_SIZE,
    device::Placement,
    kernels::attention::{Pages, PagesMut, copy_block, write_pages},
    model::config::ModelConfig,
    torch::memory::{Zeroed, give_back},
};

/// K and V pages of one layer.
struct Layer {
    keys: Zeroed,
    values: Zeroed,
}

/// The pages of all layers. A block id names the same page in each.
pub struct KvCache {
    layers: Vec<Layer>,
    kv_heads: usize,
    head_dim: usize,
}

impl KvCache {
    /// Bytes that one block of f32 takes over all layers, K and V together.
    pub fn block_bytes(config: &ModelConfig) -> usize {
        Self::block_bytes_in(config, Placement::NATIVE)
    }

    /// As [`KvCache::block_bytes`], where the model's tensors lie in `placement`.
    pub fn block_bytes_in(config: &ModelConfig, placement: Placement) -> usize {
        2 * config.num_layers * Self::page_len(config) * placement.element_bytes()
    }

    fn page_len(config: &ModelConfig) -> usize {
        config.num_kv_heads * config.head_dim * BLOCK_SIZE
    }

    /// A cache of `num_blocks` blocks, zeroed (the system hands out its memory as it is used).
    pub fn new(config: &ModelConfig, num_blocks: usize) -> Self {
        let len = num_blocks * Self::page_len(config);
        let layer = |_| Layer { keys: Zeroed::new(len), values: Zeroed::new(len) };
        Self {
            layers: (0..config.num_layers).map(layer).collect(),
            kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
        }
    }

    /// One layer's pages, to be read.
    pub fn pages(&self, layer: usize) -> Pages<'_> {
        let Layer { keys, values } = &self.layers[layer];
        Pages { keys, values, kv_heads: self.kv_heads, head_dim: self.head_dim }
    }

    fn pages_mut(&mut self, layer: usize) -> PagesMut<'_> {
        let Layer { keys, values } = &mut self.layers[layer];
        PagesMut { keys, values, kv_heads: self.kv_heads, head_dim: self.head_dim }
    }

    /// Stores one layer's K and V rows, `[N, kv_heads, head_dim]` each, in their slots.
    pub fn write(&mut self, layer: usize, k: &[f32], v: &[f32], slots: &[u32]) {
        write_pages(k, v, &mut self.pages_mut(layer), slots);
    }

    /// Gives all pages back to the system, which hands them out again, zeroed, as they are written;
    /// false if it does not take them.
    pub fn give_back(&mut self) -> bool {
        let mut layers = self.layers.iter_mut();
        layers.all(|layer| give_back(&mut layer.keys) && give_back(&mut layer.values))
    }

    /// Copies block `from` to block `to` in every layer.
    pub fn copy(&mut self, from: u32, to: u32) {
        for layer in 0..self.layers.len() {
            copy_block(&mut self.pages_mut(layer), from, to);
        }
    }
}
