//! One sample of a request: its tokens, its block table, and how far its KV is computed.

use crate::block_manager::{BLOCK_SIZE, BlockManager, Chain, Salt, blocks_for};
use onpolicy_plugin_api::RequestId;

/// Names a sequence for as long as the scheduler lives. Ids grow with arrival: a request's samples
/// have consecutive ids, and a later request has larger ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

/// Where a sequence stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Shares the prompt that its group's leader computes; has no tokens of its own yet.
    Unforked,
    /// The leader of a request that has not begun.
    Waiting,
    /// Has begun, and lost its blocks; goes on before any waiting request begins.
    Preempted,
    /// Holds blocks, and is part of the steps.
    Running,
}

/// One sample of a request.
#[derive(Debug, Clone)]
pub struct Sequence {
    /// Its name.
    pub id: SeqId,
    /// The request that it belongs to.
    pub group: RequestId,
    /// Which of the request's samples it is, from 0.
    pub index: usize,
    /// Prompt, then what was generated; empty while unforked.
    pub tokens: Vec<u32>,
    /// The last token is not known yet, something else stands for it: it is this one of those that the
    /// step under way draws.
    pub expected: Option<usize>,
    /// How many of the tokens are the prompt.
    pub prompt_len: usize,
    /// The most tokens it may have: prompt and `max_tokens`, within the model's length.
    pub max_len: usize,
    /// How many tokens have their KV in the blocks.
    pub computed: usize,
    /// Guesses at the tokens that follow, computed in the step that is under way; none between steps.
    pub drafts: Vec<u32>,
    /// The blocks of its tokens: token `t` is in `blocks[t / 16]` at offset `t % 16`.
    pub blocks: Vec<u32>,
    /// The weight version that computed all of its KV; `None` if there was more than one. Set when
    /// it starts to run.
    pub kv_version: Option<u64>,
    /// Where it stands.
    pub place: Place,
    /// Its turn in its line, lower ones first and of equal ones that with the lower id: the
    /// request's priority while it waits, then the number of the request among those begun.
    pub turn: i64,
    /// Whom it shares KV with.
    pub salt: Salt,
    /// How much of its table is in the prefix cache; `None` if no more may be registered.
    pub(crate) chain: Option<Chain>,
}

impl Sequence {
    /// Tokens without KV. A generating sequence has one: the token drawn last.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// True at its greatest length: its last token needs no KV.
    pub fn is_full(&self) -> bool {
        self.tokens.len() >= self.max_len
    }

    /// The tokens generated so far.
    pub fn generated(&self) -> &[u32] {
        self.tokens.get(self.prompt_len..).unwrap_or_default()
    }

    /// Blocks that it still needs for the tokens it has, leaving copies of shared ones aside.
    pub(crate) fn missing_blocks(&self) -> usize {
        blocks_for(self.tokens.len()).saturating_sub(self.blocks.len())
    }

    /// The most registered blocks it can use: at least one token is left to compute.
    pub(crate) fn reusable_blocks(&self) -> usize {
        self.tokens.len().saturating_sub(1) / BLOCK_SIZE
    }

    /// Full, computed blocks that are not in the prefix cache yet, and whose tokens are known.
    fn has_unregistered_block(&self) -> bool {
        let known = self.tokens.len() - usize::from(self.expected.is_some());
        let computed = self.computed.min(known);
        self.chain.is_some_and(|chain| (chain.len() + 1) * BLOCK_SIZE <= computed)
    }

    /// Brings such blocks into the prefix cache.
    pub(crate) fn register_blocks(&mut self, manager: &mut BlockManager) {
        while self.has_unregistered_block() {
            let Self { chain, tokens, blocks, .. } = &mut *self;
            *chain = chain.and_then(|chain| manager.register(chain, tokens, blocks));
        }
    }

    /// From here on its KV comes from several weight versions, and is not registered.
    pub(crate) fn mark_mixed(&mut self) {
        self.kv_version = None;
        self.chain = None;
    }
}
