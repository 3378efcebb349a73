//! The pool of KV blocks: who holds which, which are free, which are worth keeping.
//!
//! A block is in exactly one of three places. *Used*: some tables hold it, and its reference count
//! says how many. *Cached*: no table holds it, but its content is registered in the prefix cache
//! and may be taken again. *Free*: its content is worth nothing. Cached blocks count as free: they
//! are evicted, longest unused first, once the free ones are gone.
//!
//! Only full blocks are registered, so nobody ever writes into one, and whoever holds a registered
//! block also holds the registered blocks before it. A table is released from its end; a block is
//! therefore always evicted before the one that it continues.

mod lru;
mod prefix;
mod salt;

pub(crate) use prefix::fold;
pub use prefix::{BlockHash, Chain, Root};
pub use salt::Salt;

use lru::Lru;
use prefix::PrefixCache;
use std::ops::Range;

/// Tokens in one block.
pub const BLOCK_SIZE: usize = 16;

/// Number of blocks that hold `tokens` tokens.
pub const fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_SIZE)
}

/// A fixed pool of blocks, numbered from 0.
#[derive(Debug)]
pub struct BlockManager {
    references: Vec<u32>,
    free: Vec<u32>,
    cached: Lru,
    prefix: PrefixCache,
}

impl BlockManager {
    /// A pool of `num_blocks` free blocks; fewer than `u32::MAX`.
    pub fn new(num_blocks: usize) -> Self {
        Self::with_hash(num_blocks, prefix::mix)
    }

    /// The same with another hash for the prefix cache. Any function gives right answers, since
    /// hits are verified; a poor one gives fewer hits.
    pub fn with_hash(num_blocks: usize, hash: BlockHash) -> Self {
        let end = u32::try_from(num_blocks).expect("block ids are u32");
        Self {
            references: vec![0; num_blocks],
            free: (0..end).rev().collect(),
            cached: Lru::new(num_blocks),
            prefix: PrefixCache::new(num_blocks, hash),
        }
    }

    /// Size of the pool.
    pub fn total(&self) -> usize {
        self.references.len()
    }

    /// Blocks that can be allocated: the free and the cached ones.
    pub fn free(&self) -> usize {
        self.free.len() + self.cached.len()
    }

    /// Blocks that some table holds.
    pub fn used(&self) -> usize {
        self.total() - self.free()
    }

    /// How many tables hold the block.
    pub fn references(&self, block: u32) -> u32 {
        self.references[block as usize]
    }

    /// How many of the blocks no table holds; taking those makes [`free`](Self::free) smaller.
    pub fn count_idle(&self, blocks: &[u32]) -> usize {
        blocks.iter().filter(|&&block| self.references(block) == 0).count()
    }

    /// Makes the tokens `span` of `table` writable: adds blocks up to its end, and replaces the
    /// block it starts in if others hold that one too. The replacement is pushed to `copies` as
    /// (source, destination). False, with nothing changed, if the pool has too few blocks.
    ///
    /// The tokens before the span are in the table already.
    pub fn prepare(
        &mut self,
        table: &mut Vec<u32>,
        span: Range<usize>,
        copies: &mut Vec<(u32, u32)>,
    ) -> bool {
        if self.missing(table, &span) > self.free() {
            return false;
        }
        if let Some(source) = self.shared(table, &span) {
            let first = span.start / BLOCK_SIZE;
            table[first] = self.allocate();
            self.release(source);
            copies.push((source, table[first]));
        }
        while table.len() < blocks_for(span.end) {
            table.push(self.allocate());
        }
        true
    }

    /// How many blocks it takes to [`prepare`](Self::prepare) that.
    pub fn missing(&self, table: &[u32], span: &Range<usize>) -> usize {
        let added = blocks_for(span.end).saturating_sub(table.len());
        added + usize::from(self.shared(table, span).is_some())
    }

    /// The block that the span starts in, if others hold it too.
    fn shared(&self, table: &[u32], span: &Range<usize>) -> Option<u32> {
        let first = table.get(span.start / BLOCK_SIZE).copied();
        first.filter(|&block| self.references(block) > 1)
    }

    /// One more table holds each of the blocks.
    pub fn share(&mut self, blocks: &[u32]) {
        for &block in blocks {
            let count = &mut self.references[block as usize];
            if *count == 0 {
                self.cached.remove(block);
            }
            *count += 1;
        }
    }

    /// Empties a table, from its end.
    pub fn release_table(&mut self, table: &mut Vec<u32>) {
        while let Some(block) = table.pop() {
            self.release(block);
        }
    }

    /// The longest registered chain of this root (a weight version, or one and a salt) and at most
    /// `limit` blocks that starts `tokens`, and its blocks. They are not taken:
    /// [`share`](Self::share) does that.
    pub fn lookup(&self, root: impl Into<Root>, tokens: &[u32], limit: usize) -> (Chain, Vec<u32>) {
        let mut chain = Chain::root(root);
        let mut blocks = Vec::new();
        for page in tokens.as_chunks().0.iter().take(limit) {
            let Some((next, block)) = self.prefix.find(chain, page) else { break };
            chain = next;
            blocks.push(block);
        }
        (chain, blocks)
    }

    /// Registers the block of `table` that follows its chain; it must be full and computed, all of
    /// it and all before it under the chain's weights. If the same content is registered already,
    /// the table gets that block in place of its own. `None` if the hash belongs to other content:
    /// the chain has ended, and neither this block nor a later one can be registered.
    pub fn register(&mut self, chain: Chain, tokens: &[u32], table: &mut [u32]) -> Option<Chain> {
        let at = chain.len();
        let page = &tokens.as_chunks().0[at];
        let own = table[at];
        let (next, kept) = self.prefix.insert(chain, page, own)?;
        if kept != own {
            self.share(&[kept]);
            self.release(own);
            table[at] = kept;
        }
        Some(next)
    }

    /// Frees the blocks that no table holds, whatever is registered about them. They are the next
    /// ones to be taken, before any that was never used: a pool touches no more of its memory
    /// than it needs.
    pub fn forget_cached(&mut self) {
        while let Some(block) = self.cached.pop_oldest() {
            self.prefix.remove(block);
            self.free.push(block);
        }
    }

    /// As [`forget_cached`](Self::forget_cached), and nothing is registered any more about the
    /// blocks that tables hold. No chain of theirs may be continued.
    pub fn forget_all(&mut self) {
        self.forget_cached();
        self.prefix.clear();
    }

    /// Takes a block that nobody holds; the caller has seen that there is one.
    fn allocate(&mut self) -> u32 {
        let block = self.free.pop().unwrap_or_else(|| {
            let oldest = self.cached.pop_oldest().expect("a free block");
            self.prefix.remove(oldest);
            oldest
        });
        self.references[block as usize] = 1;
        block
    }

    /// One table less holds the block.
    fn release(&mut self, block: u32) {
        let count = &mut self.references[block as usize];
        *count -= 1;
        if *count > 0 {
            return;
        }
        if self.prefix.contains(block) {
            self.cached.push_newest(block);
        } else {
            self.free.push(block);
        }
    }

    /// Verifies the accounts against the tables of all sequences: every block is used, cached or
    /// free, and only one of these; reference counts are right; the prefix cache is consistent.
    ///
    /// # Errors
    /// Says what is wrong; always a bug.
    pub fn check<'a>(&self, tables: impl Iterator<Item = &'a [u32]>) -> Result<(), String> {
        let mut held = vec![0; self.total()];
        for &block in tables.flatten() {
            held[block as usize] += 1;
        }
        let mut listed = vec![0; self.total()];
        for &block in &self.free {
            listed[block as usize] += 1;
        }
        for (block, (&held, &listed)) in held.iter().zip(&listed).enumerate() {
            let id = block as u32;
            let counted = self.references[block];
            let cached = self.cached.contains(id);
            if counted != held {
                return Err(format!("block {id}: counts {counted} holders, has {held}"));
            }
            if u32::from(held > 0) + listed + u32::from(cached) != 1 {
                return Err(format!(
                    "block {id}: {held} holders, {listed} x free, {cached} cached"
                ));
            }
            if held == 0 && cached != self.prefix.contains(id) {
                return Err(format!("block {id}: cached is {cached}, registered is {}", !cached));
            }
        }
        self.prefix.check(&self.references)
    }
}

#[cfg(test)]
mod tests;
