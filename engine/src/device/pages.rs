//! The paged K and V of every layer, in one tensor on a device.

use super::Placement;
use crate::{block_manager::BLOCK_SIZE, model::config::ModelConfig, torch::TorchError};
use std::collections::HashSet;
use tch::Tensor;

/// The pages of all layers. A block id names the same page in each.
pub struct DevicePages {
    /// Layers times two (K, then V), blocks, heads, tokens of a block, dimensions of a head.
    shape: [i64; 5],
    placement: Placement,
    pool: Option<Pool>,
}

/// Memory that is there.
struct Pool {
    /// All of it.
    whole: Tensor,
    /// K and V of each layer, `[num_blocks, kv_heads, BLOCK_SIZE, head_dim]`.
    layers: Vec<(Tensor, Tensor)>,
}

impl Pool {
    fn new(shape: [i64; 5], placement: Placement) -> Result<Self, TorchError> {
        // Zeros: what was never written must be a number.
        let whole = Tensor::f_zeros(shape, (placement.kind, placement.device));
        let whole = whole.map_err(TorchError::from)?;
        let layer = |layer| (whole.get(2 * layer), whole.get(2 * layer + 1));
        Ok(Self { layers: (0..shape[0] / 2).map(layer).collect(), whole })
    }
}

impl DevicePages {
    /// Takes the memory of `num_blocks` blocks.
    ///
    /// # Errors
    /// There is not as much.
    pub fn new(
        config: &ModelConfig,
        num_blocks: usize,
        placement: Placement,
    ) -> Result<Self, TorchError> {
        let (layers, heads) = (2 * config.num_layers, config.num_kv_heads);
        let shape = [layers, num_blocks, heads, BLOCK_SIZE, config.head_dim].map(|n| n as i64);
        Ok(Self { shape, placement, pool: Some(Pool::new(shape, placement)?) })
    }

    /// Blocks of the pool.
    pub fn num_blocks(&self) -> usize {
        self.shape[1] as usize
    }

    /// Makes everything that is in them zero.
    ///
    /// # Errors
    /// What the device says.
    ///
    /// # Panics
    /// If their memory is given back.
    pub fn clear(&self) -> Result<(), TorchError> {
        self.pool().whole.shallow_clone().f_zero_().map(drop).map_err(TorchError::from)
    }

    /// K and V pages of one layer, `[num_blocks, kv_heads, BLOCK_SIZE, head_dim]` each.
    ///
    /// # Panics
    /// If their memory is given back.
    pub fn layer(&self, index: usize) -> (&Tensor, &Tensor) {
        let (k, v) = &self.pool().layers[index];
        (k, v)
    }

    fn pool(&self) -> &Pool {
        self.pool.as_ref().expect("pages that are there")
    }

    /// Gives the memory back to libtorch's allocator.
    pub fn give_back(&mut self) {
        self.pool = None;
    }

    /// Takes the memory again, if it was given back; at another address.
    ///
    /// # Errors
    /// There is not as much.
    pub fn take(&mut self) -> Result<(), TorchError> {
        if self.pool.is_none() {
            self.pool = Some(Pool::new(self.shape, self.placement)?);
        }
        Ok(())
    }

    /// Copies blocks to others in every layer, one after the other as far as that matters.
    pub fn copy(&self, copies: &[(u32, u32)]) {
        let mut rest = copies;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(independent(rest));
            rest = later;
            let blocks = now.iter().map(|&(from, _)| from).chain(now.iter().map(|&(_, to)| to));
            let blocks: Vec<i64> = blocks.map(i64::from).collect();
            let blocks = super::upload(&blocks, self.placement.device).view([2, -1]);
            let whole = &self.pool().whole;
            let read = whole.index_select(1, &blocks.get(0));
            let _ = whole.shallow_clone().index_copy_(1, &blocks.get(1), &read);
        }
    }
}

/// How many of the first copies can be done at once: none reads or writes what one before it
/// wrote.
fn independent(copies: &[(u32, u32)]) -> usize {
    let mut written = HashSet::new();
    let dependent = |(from, to): &(u32, u32)| written.contains(from) || !written.insert(*to);
    copies.iter().position(dependent).unwrap_or(copies.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    fn pages() -> DevicePages {
        let placement = Placement { device: Device::Cpu, kind: Kind::BFloat16 };
        let shape = [4, 6, 2, BLOCK_SIZE as i64, 8];
        DevicePages { shape, placement, pool: Some(Pool::new(shape, placement).unwrap()) }
    }

    /// The first numbers of K and V of block `block` in both layers.
    fn first(pages: &DevicePages, block: i64) -> [f64; 4] {
        let layers = [0, 1].map(|layer| pages.layer(layer));
        let all = [layers[0].0, layers[0].1, layers[1].0, layers[1].1];
        all.map(|pages| pages.double_value(&[block, 0, 0, 0]))
    }

    #[test]
    fn copies_are_made_in_order_in_every_layer() {
        let pages = pages();
        for block in 0..6 {
            for layer in 0..2 {
                let (k, v) = pages.layer(layer);
                let value = (10 * block + layer as i64) as f64;
                let _ = k.get(block).fill_(value);
                let _ = v.get(block).fill_(value + 2.0);
            }
        }
        assert_eq!(first(&pages, 3), [30.0, 32.0, 31.0, 33.0]);
        // 2 gets 1's content, 3 gets it from there; 1 gets 0's after 1 was read.
        pages.copy(&[(1, 2), (0, 1), (2, 3), (5, 3)]);
        assert_eq!(first(&pages, 2), [10.0, 12.0, 11.0, 13.0]);
        assert_eq!(first(&pages, 1), [0.0, 2.0, 1.0, 3.0]);
        assert_eq!(first(&pages, 3), [50.0, 52.0, 51.0, 53.0]);
        pages.copy(&[(1, 4), (4, 5)]);
        assert_eq!(first(&pages, 5), [0.0, 2.0, 1.0, 3.0]);
        assert_eq!(independent(&[(1, 2), (0, 1), (2, 3)]), 2);
        assert_eq!(independent(&[(1, 2), (0, 2)]), 1);
    }

    #[test]
    fn pages_come_back_as_zeros() {
        let mut pages = pages();
        let _ = pages.layer(1).0.get(2).fill_(1.0);
        pages.give_back();
        pages.take().unwrap();
        pages.take().unwrap();
        assert_eq!(first(&pages, 2), [0.0; 4]);
    }

    #[test]
    fn more_memory_than_there_is_is_an_error() {
        let placement = Placement { device: Device::Cpu, kind: Kind::Float };
        assert!(Pool::new([4, 1 << 40, 8, 16, 64], placement).is_err());
    }
}
