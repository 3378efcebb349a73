//! The prefix cache: which blocks hold the KV of which beginnings of sequences.
//!
//! A block is found by a chained hash: of its 16 tokens and the hash of the block before it, the
//! first one's being that of the weight version and the salt. A hit counts only if the tokens, the
//! block before it, the version and the salt are the same too, so a collision costs a hit and
//! nothing else.

use super::{BLOCK_SIZE, Salt};
use std::collections::HashMap;

/// Hash of a block's tokens and of its predecessor's hash (of the [`Root`], for a first block).
pub type BlockHash = fn(u64, &[u32; BLOCK_SIZE]) -> u64;

/// What KV depends on beside the tokens: KV of one root is never used under another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Root {
    /// The weight version that computed it.
    pub version: u64,
    /// Whom it is shared with.
    pub salt: Salt,
}

impl From<u64> for Root {
    /// That of a weight version, shared with all requests that have no salt.
    fn from(version: u64) -> Self {
        Self { version, salt: Salt::default() }
    }
}

impl Root {
    /// The same salt under other weights.
    pub fn at(self, version: u64) -> Self {
        Self { version, ..self }
    }

    fn hash(self) -> u64 {
        self.version ^ self.salt.low_bits()
    }
}

/// How far the beginning of a sequence is registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chain {
    root: Root,
    hash: u64,
    last: Option<u32>,
    len: usize,
}

impl Chain {
    /// The chain of no blocks, for KV of this root: a weight version, or one and a salt.
    pub fn root(root: impl Into<Root>) -> Self {
        let root = root.into();
        Self { root, hash: root.hash(), last: None, len: 0 }
    }

    /// The chain of no blocks of the same salt, for KV computed by weights `version`.
    pub fn restart(self, version: u64) -> Self {
        Self::root(self.root.at(version))
    }

    /// Number of registered blocks.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if no block is registered.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The last registered block.
    pub fn last(&self) -> Option<u32> {
        self.last
    }

    fn then(self, hash: u64, block: u32) -> Self {
        Self { hash, last: Some(block), len: self.len + 1, ..self }
    }
}

/// What a registered block holds.
#[derive(Debug, Clone)]
struct Entry {
    root: Root,
    hash: u64,
    /// The block that this one continues. It is evicted later than this one, so its number stays
    /// its identity.
    parent: Option<u32>,
    tokens: [u32; BLOCK_SIZE],
}

/// The registered blocks, by number and by hash.
#[derive(Debug)]
pub(super) struct PrefixCache {
    hash: BlockHash,
    by_hash: HashMap<u64, u32>,
    entries: Vec<Option<Entry>>,
}

impl PrefixCache {
    pub fn new(num_blocks: usize, hash: BlockHash) -> Self {
        Self { hash, by_hash: HashMap::new(), entries: vec![None; num_blocks] }
    }

    pub fn contains(&self, block: u32) -> bool {
        self.entries[block as usize].is_some()
    }

    /// The block that continues `chain` with `tokens`, and the chain up to it.
    pub fn find(&self, chain: Chain, tokens: &[u32; BLOCK_SIZE]) -> Option<(Chain, u32)> {
        let hash = (self.hash)(chain.hash, tokens);
        let block = *self.by_hash.get(&hash)?;
        self.holds(block, chain, tokens).then(|| (chain.then(hash, block), block))
    }

    /// Registers `block` as what continues `chain` with `tokens`. Gives the chain up to it and the
    /// block that stands for the content, which is another one if it was registered before; `None`
    /// if the hash is taken by other content.
    pub fn insert(
        &mut self,
        chain: Chain,
        tokens: &[u32; BLOCK_SIZE],
        block: u32,
    ) -> Option<(Chain, u32)> {
        let hash = (self.hash)(chain.hash, tokens);
        let kept = *self.by_hash.entry(hash).or_insert(block);
        if kept == block {
            let Chain { root, last: parent, .. } = chain;
            self.entries[block as usize] = Some(Entry { root, hash, parent, tokens: *tokens });
        } else if !self.holds(kept, chain, tokens) {
            return None;
        }
        Some((chain.then(hash, kept), kept))
    }

    /// Forgets a registered block.
    pub fn remove(&mut self, block: u32) {
        if let Some(entry) = self.entries[block as usize].take() {
            self.by_hash.remove(&entry.hash);
        }
    }

    /// Forgets all blocks.
    pub fn clear(&mut self) {
        self.by_hash.clear();
        self.entries.fill(None);
    }

    fn holds(&self, block: u32, chain: Chain, tokens: &[u32; BLOCK_SIZE]) -> bool {
        self.entries[block as usize].as_ref().is_some_and(|entry| {
            entry.parent == chain.last && entry.root == chain.root && entry.tokens == *tokens
        })
    }

    /// Verifies that both indexes agree, that every block's predecessor is registered, and that it
    /// is held wherever the block is held.
    pub fn check(&self, references: &[u32]) -> Result<(), String> {
        let registered = self.entries.iter().flatten().count();
        if registered != self.by_hash.len() {
            return Err(format!("{registered} registered, {} hashes", self.by_hash.len()));
        }
        for (block, entry) in self.entries.iter().enumerate() {
            let Some(entry) = entry else { continue };
            if self.by_hash.get(&entry.hash) != Some(&(block as u32)) {
                return Err(format!("block {block} is not found under its hash"));
            }
            let Some(parent) = entry.parent else { continue };
            if !self.contains(parent) {
                return Err(format!("block {block} continues {parent}, which is gone"));
            }
            if references[parent as usize] < references[block] {
                return Err(format!("block {block} has more holders than its parent {parent}"));
            }
        }
        Ok(())
    }
}

/// Takes a word into a hash.
pub(crate) fn fold(hash: u64, word: u64) -> u64 {
    let product = (hash ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    product ^ (product >> 32)
}

/// The usual hash: two tokens at a time, multiplied and folded.
pub(super) fn mix(parent: u64, tokens: &[u32; BLOCK_SIZE]) -> u64 {
    let pairs = tokens.as_chunks::<2>().0;
    let words = pairs.iter().map(|&[low, high]| u64::from(low) | u64::from(high) << 32);
    words.fold(fold(parent, BLOCK_SIZE as u64), fold)
}
