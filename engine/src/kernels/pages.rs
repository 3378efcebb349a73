//! The pages of one layer: where a token's key and value lie, writing and copying them.
//!
//! Keys are `[num_blocks][kv_heads][head_dim][16]`: a block's keys are transposed, so that a
//! vector holds one dimension of sixteen tokens and the scores of all sixteen come out side by
//! side. Values are `[num_blocks][kv_heads][16][head_dim]`, because there the sum runs over the
//! tokens.

use super::disjoint::Shared;
use super::parallel::for_each;

/// Tokens per block.
pub const BLOCK: usize = 16;

/// Rows from which on [`write_pages`] works in parallel.
const PARALLEL_ROWS: usize = 64;

/// One layer's pages, to read.
#[derive(Clone, Copy)]
pub struct Pages<'a> {
    /// `[num_blocks][kv_heads][head_dim][16]`
    pub keys: &'a [f32],
    /// `[num_blocks][kv_heads][16][head_dim]`
    pub values: &'a [f32],
    /// Heads that keys and values have.
    pub kv_heads: usize,
    /// Dimensions of a head; a multiple of 8.
    pub head_dim: usize,
}

/// One layer's pages, to write; laid out as [`Pages`].
pub struct PagesMut<'a> {
    /// `[num_blocks][kv_heads][head_dim][16]`
    pub keys: &'a mut [f32],
    /// `[num_blocks][kv_heads][16][head_dim]`
    pub values: &'a mut [f32],
    /// Heads that keys and values have.
    pub kv_heads: usize,
    /// Dimensions of a head; a multiple of 8.
    pub head_dim: usize,
}

impl<'a> Pages<'a> {
    /// Number of blocks.
    pub fn num_blocks(&self) -> usize {
        self.keys.len() / self.block_len()
    }

    /// Floats in a block's keys, and in its values.
    fn block_len(&self) -> usize {
        self.kv_heads * self.head_len()
    }

    /// Floats in one head's keys of a block, and in its values.
    fn head_len(&self) -> usize {
        self.head_dim * BLOCK
    }

    /// Keys of one head in one block, `[head_dim][16]`.
    #[inline(always)]
    pub(super) fn keys_of(&self, block: u32, head: usize) -> &'a [[f32; BLOCK]] {
        let start = block as usize * self.block_len() + head * self.head_len();
        self.keys[start..start + self.head_len()].as_chunks().0
    }

    /// Values of one head in one block, `[16][head_dim]`.
    #[inline(always)]
    pub(super) fn values_of(&self, block: u32, head: usize) -> &'a [f32] {
        let start = block as usize * self.block_len() + head * self.head_len();
        &self.values[start..start + self.head_len()]
    }

    /// # Panics
    /// If keys and values are not whole blocks, equally many.
    pub(super) fn check(&self) {
        assert!(self.kv_heads > 0, "pages have at least one head");
        assert!(
            self.head_dim > 0 && self.head_dim.is_multiple_of(8),
            "head_dim must be a multiple of 8, not {}",
            self.head_dim
        );
        assert_eq!(self.keys.len(), self.values.len(), "keys and values have the same size");
        assert_eq!(self.keys.len() % self.block_len(), 0, "pages are whole blocks");
    }
}

impl PagesMut<'_> {
    /// The same pages, to read.
    pub fn as_pages(&self) -> Pages<'_> {
        Pages {
            keys: self.keys,
            values: self.values,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
        }
    }
}

/// Writes the keys and values of new tokens, both `[rows, kv_heads, head_dim]`, to their slots.
/// Row `i` goes to `slots[i]`, which is block * 16 + offset.
///
/// # Panics
/// If shapes do not fit or a slot is outside of the pages.
pub fn write_pages(k: &[f32], v: &[f32], pages: &mut PagesMut, slots: &[u32]) {
    let shape = pages.as_pages();
    shape.check();
    let (heads, dim) = (pages.kv_heads, pages.head_dim);
    assert_eq!(k.len(), slots.len() * heads * dim, "one key per slot and head");
    assert_eq!(v.len(), k.len(), "as many values as keys");
    let end = shape.num_blocks() * BLOCK;
    assert!(slots.iter().all(|&slot| (slot as usize) < end), "a slot is outside of the pages");

    let keys = Shared::new(&mut *pages.keys);
    let values = Shared::new(&mut *pages.values);
    let write_head = |head: usize| {
        for (row, &slot) in slots.iter().enumerate() {
            let (block, offset) = (slot as usize / BLOCK, slot as usize % BLOCK);
            let from = (row * heads + head) * dim;
            let to = (block * heads + head) * dim * BLOCK;
            // SAFETY: parts of one head, which only this call of the closure touches.
            let (keys, values) =
                unsafe { (keys.part(to, dim * BLOCK), values.part(to + offset * dim, dim)) };
            for (line, &x) in keys.as_chunks_mut::<BLOCK>().0.iter_mut().zip(&k[from..from + dim]) {
                line[offset] = x;
            }
            values.copy_from_slice(&v[from..from + dim]);
        }
    };
    if slots.len() < PARALLEL_ROWS {
        (0..heads).for_each(write_head);
    } else {
        for_each(heads, &write_head);
    }
}

/// Copies the keys and values of block `from` to block `to`, for copy on write.
///
/// # Panics
/// If one of them is outside of the pages.
pub fn copy_block(pages: &mut PagesMut, from: u32, to: u32) {
    let len = pages.as_pages().block_len();
    let (from, to) = (from as usize * len, to as usize * len);
    pages.keys.copy_within(from..from + len, to);
    pages.values.copy_within(from..from + len, to);
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: usize = 3;
    const DIM: usize = 8;

    fn pages(buffers: &mut (Vec<f32>, Vec<f32>)) -> PagesMut<'_> {
        let (keys, values) = (&mut buffers.0[..], &mut buffers.1[..]);
        PagesMut { keys, values, kv_heads: HEADS, head_dim: DIM }
    }

    fn empty(blocks: usize) -> (Vec<f32>, Vec<f32>) {
        let len = blocks * HEADS * DIM * BLOCK;
        (vec![0.0; len], vec![0.0; len])
    }

    /// Writes `rows` rows at scattered slots and reads every one of them back by its formula.
    fn round_trip(rows: usize) {
        let mut buffers = empty(8);
        let slots: Vec<u32> = (0..rows as u32).map(|row| row * 37 % 128).collect();
        let k: Vec<f32> = (0..rows * HEADS * DIM).map(|i| i as f32).collect();
        let v: Vec<f32> = k.iter().map(|x| -x).collect();
        write_pages(&k, &v, &mut pages(&mut buffers), &slots);
        for (row, &slot) in slots.iter().enumerate() {
            let (block, offset) = (slot as usize / 16, slot as usize % 16);
            for head in 0..HEADS {
                for d in 0..DIM {
                    let want = ((row * HEADS + head) * DIM + d) as f32;
                    let key = buffers.0[((block * HEADS + head) * DIM + d) * 16 + offset];
                    let value = buffers.1[((block * HEADS + head) * 16 + offset) * DIM + d];
                    assert_eq!((key, value), (want, -want));
                }
            }
        }
        let written = buffers.0.iter().filter(|&&x| x != 0.0).count();
        assert_eq!(written, rows * HEADS * DIM - 1);
    }

    #[test]
    fn writes_reach_their_slots_and_no_others() {
        round_trip(5);
        round_trip(100);
    }

    #[test]
    fn a_copied_block_is_equal_and_others_stay() {
        let mut buffers = empty(4);
        buffers.0.iter_mut().enumerate().for_each(|(i, x)| *x = i as f32);
        buffers.1.iter_mut().enumerate().for_each(|(i, x)| *x = -(i as f32));
        let before = buffers.clone();
        copy_block(&mut pages(&mut buffers), 1, 3);
        let len = HEADS * DIM * BLOCK;
        assert_eq!(buffers.0[3 * len..], before.0[len..2 * len]);
        assert_eq!(buffers.1[3 * len..], before.1[len..2 * len]);
        assert_eq!(buffers.0[..3 * len], before.0[..3 * len]);
        assert_eq!(buffers.1[..3 * len], before.1[..3 * len]);
    }

    #[test]
    #[should_panic(expected = "a slot is outside of the pages")]
    fn a_slot_outside_of_the_pages_is_refused() {
        let row = [0.0; HEADS * DIM];
        write_pages(&row, &row, &mut pages(&mut empty(2)), &[32]);
    }
}
