//! Waiting and running sequences become the next step.
//!
//! Prefill and decode are the same thing: a [`Chunk`] of a sequence's tokens whose KV is still to
//! be computed. A chunk that ends where the tokens end gives a logits row to sample from. A decode
//! is a chunk of one token; a prompt too long for one step is several chunks; a preempted sequence
//! starts over from its tokens.
//!
//! One step: [`schedule`](Scheduler::schedule), run it, [`computed`](Scheduler::computed); then for
//! each chunk with a row, [`fork`](Scheduler::fork) says which sequences draw from it, and each of
//! them gets its token by [`append`](Scheduler::append) or ends by [`finish`](Scheduler::finish).
//! The next step may be planned before its tokens are known, once they are
//! [expected](Scheduler::expect); then they are appended before the step after that is planned.
//!
//! Requests begin by priority, those of equal priority in the order of arrival; from then on order
//! is that of beginning, and an older sequence is one that began earlier. A request is one unit
//! until its prompt is computed by its leader; then its samples part, sharing the prompt's blocks.
//! When blocks run out, the latest running sequence gives back its own and waits to be computed
//! again, before any request that has not begun. So all that runs is older than all that waits, and
//! the oldest sequence always goes on: it may take the blocks of all others, and a request that
//! needs more than the pool is refused.

mod admission;
mod config;
mod drafts;
mod group;
mod id_map;
mod integrity;

pub use config::SchedulerConfig;
pub use drafts::DraftLimits;

use crate::block_manager::{BlockHash, BlockManager};
use crate::draft::Drafter;
use crate::sequence::{Place, SeqId, Sequence};
use group::Group;
use id_map::IdMap;
use onpolicy_plugin_api::{EngineError, RequestId};
use std::collections::VecDeque;

/// A prompt, and how many samples of what length are wanted from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewRequest {
    /// Its name; no other live request has it.
    pub id: RequestId,
    /// Token ids; at least one.
    pub prompt: Vec<u32>,
    /// Number of samples.
    pub n: usize,
    /// Most new tokens per sample; less if the model's length is reached before.
    pub max_tokens: usize,
    /// False if all of the prompt must be computed, as its log-probs need.
    pub reuse_prefix: bool,
    /// False if a draw needs to know the tokens before: those must be drawn, not guessed.
    pub draft: bool,
    /// Of the requests that wait, those of lower numbers begin first.
    pub priority: i32,
    /// KV is shared with requests of the same salt alone.
    pub cache_salt: Option<String>,
}

/// Tokens `start..start + len` of a sequence, to be computed in this step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Whose tokens.
    pub seq: SeqId,
    /// Position of the first.
    pub start: usize,
    /// How many, guesses among them; at least one that is none.
    pub len: usize,
    /// True if the last row's logits are sampled: the chunk reaches the end of the tokens.
    pub sample: bool,
    /// How many follow the sequence's tokens as guesses ([`Sequence::drafts`]); their rows' logits
    /// are sampled too.
    pub drafts: usize,
}

/// What the engine does next.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Step {
    /// The tokens to compute, oldest sequence first; each sequence at most once.
    pub chunks: Vec<Chunk>,
    /// Blocks to copy before anything is computed, as (source, destination), in this order.
    pub copies: Vec<(u32, u32)>,
    /// The weight version that the step was planned for.
    pub version: u64,
}

impl Step {
    /// True if there is nothing to compute.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Number of tokens to compute.
    pub fn num_tokens(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.len).sum()
    }

    fn push(&mut self, sequence: &Sequence, len: usize) {
        self.chunks.push(Chunk {
            seq: sequence.id,
            start: sequence.computed,
            len,
            sample: len == sequence.pending(),
            drafts: 0,
        });
    }
}

/// Counters since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Tokens that were looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Tokens of them that were found there.
    pub prefix_hits: u64,
    /// Times that a sequence gave back its blocks because the pool was full.
    pub preemptions: u64,
    /// Tokens that were guessed.
    pub drafted: u64,
    /// Tokens of them that were drawn then.
    pub accepted: u64,
}

/// Decides what runs. Holds all sequences from `add` to `finish`.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    blocks: BlockManager,
    /// None if nothing is guessed.
    drafter: Option<Drafter>,
    sequences: IdMap<SeqId, Sequence>,
    groups: IdMap<RequestId, Group>,
    /// Leaders of requests that have not begun, by priority and age.
    waiting: VecDeque<SeqId>,
    /// Sequences that lost their blocks, by age; all older than those that wait.
    preempted: VecDeque<SeqId>,
    /// Sequences with blocks, by age; all older than those preempted.
    running: Vec<SeqId>,
    /// Unforked samples of running leaders; their places among the running ones are kept free.
    reserved: usize,
    /// True while no request may begin.
    held: bool,
    next_id: u64,
    /// Requests that have begun.
    begun: i64,
    version: u64,
    stats: Stats,
}

impl Scheduler {
    /// A scheduler without requests, at weight version 0.
    ///
    /// # Errors
    /// What [`SchedulerConfig::validate`] says.
    pub fn new(config: SchedulerConfig) -> Result<Self, EngineError> {
        config.validate()?;
        let blocks = BlockManager::new(config.num_blocks);
        Ok(Self::with_blocks(config, blocks))
    }

    /// The same with another hash for the prefix cache (see [`BlockManager::with_hash`]).
    ///
    /// # Errors
    /// What [`SchedulerConfig::validate`] says.
    pub fn with_hash(config: SchedulerConfig, hash: BlockHash) -> Result<Self, EngineError> {
        config.validate()?;
        let blocks = BlockManager::with_hash(config.num_blocks, hash);
        Ok(Self::with_blocks(config, blocks))
    }

    fn with_blocks(config: SchedulerConfig, blocks: BlockManager) -> Self {
        Self {
            drafter: config.drafts.drafter(),
            config,
            blocks,
            sequences: IdMap::default(),
            groups: IdMap::default(),
            waiting: VecDeque::new(),
            preempted: VecDeque::new(),
            running: Vec::new(),
            reserved: 0,
            held: false,
            next_id: 0,
            begun: 0,
            version: 0,
            stats: Stats::default(),
        }
    }

    /// Plans the next step: every running sequence that decodes, then what the token limit leaves
    /// for running prompts, then for admissions; then guesses, where rows are free.
    ///
    /// The step has to be run, or its sequences finished, before the next one is planned.
    pub fn schedule(&mut self) -> Step {
        let mut step = Step { version: self.version, ..Step::default() };
        let tokens_left = self.schedule_running(&mut step);
        self.schedule_admissions(&mut step, tokens_left);
        self.schedule_drafts(&mut step);
        step
    }

    /// Plans the running sequences, oldest first, and returns how many tokens may be added.
    fn schedule_running(&mut self, step: &mut Step) -> usize {
        step.chunks.reserve(self.running.len());
        let decodes = self.running.iter().filter(|id| self.sequences[id].pending() == 1).count();
        let mut tokens_left = self.config.max_batched_tokens - decodes;
        let mut next = 0;
        while let Some(&id) = self.running.get(next) {
            next += 1;
            let sequence = &self.sequences[&id];
            let pending = sequence.pending();
            let len = if pending == 1 { 1 } else { pending.min(tokens_left) };
            // One that is full ends with the token that it expects.
            if len == 0 || sequence.is_full() {
                continue;
            }
            if !self.make_room(id, len, &mut step.copies) {
                break;
            }
            if pending > 1 {
                tokens_left -= len;
            }
            step.push(&self.sequences[&id], len);
        }
        tokens_left
    }

    /// Makes the next `len` tokens of a running sequence writable, preempting the latest sequences
    /// as far as needed. False if it was the latest itself and is preempted.
    fn make_room(&mut self, id: SeqId, len: usize, copies: &mut Vec<(u32, u32)>) -> bool {
        loop {
            let sequence = self.sequences.get_mut(&id).expect("a running sequence");
            let span = sequence.computed..sequence.computed + len;
            if self.blocks.prepare(&mut sequence.blocks, span, copies) {
                return true;
            }
            self.stats.preemptions += 1;
            if self.preempt_latest() == Some(id) {
                return false;
            }
        }
    }

    /// Takes the blocks from the latest running sequence; it will be computed from the start.
    fn preempt_latest(&mut self) -> Option<SeqId> {
        let id = self.running.pop()?;
        self.reserved -= self.unforked_siblings(id);
        let sequence = self.sequences.get_mut(&id).expect("a running sequence");
        self.blocks.release_table(&mut sequence.blocks);
        sequence.computed = 0;
        sequence.place = Place::Preempted;
        self.preempted.push_front(id);
        Some(id)
    }

    /// Takes note that a step has been run: its tokens, but for guesses, have KV now, and the blocks that became full
    /// are registered in the prefix cache. Sequences that ended meanwhile are passed over.
    pub fn computed(&mut self, step: &Step) {
        for chunk in &step.chunks {
            let Some(sequence) = self.sequences.get_mut(&chunk.seq) else { continue };
            if sequence.place != Place::Running || sequence.computed != chunk.start {
                continue;
            }
            sequence.computed += chunk.len - chunk.drafts;
            if step.version != self.version {
                sequence.mark_mixed();
            }
            sequence.register_blocks(&mut self.blocks);
        }
    }

    /// True if no running sequence has to take another's blocks for what it computes next; the tokens that
    /// the step under way draws count, whether they are known or not.
    pub fn has_room(&self) -> bool {
        let needs = |id: &SeqId| {
            let sequence = &self.sequences[id];
            let end = sequence.tokens.len() + usize::from(sequence.pending() == 0);
            let span = sequence.computed..end.min(sequence.max_len - 1);
            self.blocks.missing(&sequence.blocks, &span)
        };
        self.running.iter().map(needs).sum::<usize>() <= self.blocks.free()
    }

    /// Counts on a token that has been drawn for a running sequence and is not known yet, number `draw`
    /// of the step under way: the next step may be planned with it. An unknown sequence is passed over.
    pub fn expect(&mut self, seq: SeqId, draw: usize) {
        let Some(sequence) = self.sequences.get_mut(&seq) else { return };
        debug_assert_eq!(sequence.pending(), 0, "a token is drawn from the last one's logits");
        sequence.tokens.push(0);
        sequence.expected = Some(draw);
    }

    /// Adds a drawn token to a sequence, or says which one it was that was expected. True if the
    /// sequence has reached its greatest length: it must be finished. An unknown sequence is passed over.
    ///
    /// If the token is the next one that was guessed, its KV is there already, and the next row of
    /// the step is the one that the next token is drawn from: the sequence
    /// [`draws`](Self::draws) again. If not, the other guesses are worth nothing.
    pub fn append(&mut self, seq: SeqId, token: u32) -> bool {
        let Some(sequence) = self.sequences.get_mut(&seq) else { return false };
        if sequence.expected.take().is_some() {
            *sequence.tokens.last_mut().expect("the token that is expected") = token;
            sequence.register_blocks(&mut self.blocks);
        } else {
            debug_assert_eq!(sequence.pending(), 0, "a token is drawn from the last one's logits");
            sequence.tokens.push(token);
        }
        if sequence.drafts.first() == Some(&token) {
            sequence.drafts.remove(0);
            sequence.computed += 1;
            self.stats.accepted += 1;
        } else {
            sequence.drafts.clear();
        }
        if let Some(drafter) = &mut self.drafter {
            drafter.learn(sequence.salt, &sequence.tokens, sequence.tokens.len() - 1);
        }
        sequence.is_full()
    }

    /// True if all tokens of a live sequence are computed: its next token may be drawn.
    pub fn draws(&self, seq: SeqId) -> bool {
        self.sequences.get(&seq).is_some_and(|sequence| sequence.pending() == 0)
    }

    /// Takes note that the weights have changed; call it between two steps. A version names one
    /// state of the weights. No later request uses KV computed before.
    ///
    /// With `recompute`, all running sequences are computed again under the new weights; without,
    /// they go on with the KV that they have. Nothing happens if the version is the present one.
    pub fn set_version(&mut self, version: u64, recompute: bool) {
        if version != self.version {
            self.change_version(version, recompute);
        }
    }

    /// As [`set_version`](Self::set_version), also where other weights get the present version.
    pub fn change_version(&mut self, version: u64, recompute: bool) {
        self.version = version;
        if recompute {
            while self.preempt_latest().is_some() {}
        }
        self.blocks.forget_all();
        for id in &self.running {
            let sequence = self.sequences.get_mut(id).expect("a running sequence");
            if sequence.computed > 0 {
                sequence.mark_mixed();
            } else {
                sequence.kv_version = Some(version);
                sequence.chain = sequence.chain.map(|chain| chain.restart(version));
            }
        }
    }

    /// Forgets the KV of earlier requests, and what guesses are made from: no later one uses what is
    /// computed by now. Those that run keep their KV.
    pub fn reset_prefix_cache(&mut self) {
        self.drafter.iter_mut().for_each(Drafter::forget);
        self.blocks.forget_all();
        for id in &self.running {
            let sequence = self.sequences.get_mut(id).expect("a running sequence");
            sequence.chain = sequence.chain.filter(|_| sequence.computed == 0);
        }
    }

    /// With `held`, no request begins until called without; what has begun goes on to its end.
    pub fn hold_admissions(&mut self, held: bool) {
        self.held = held;
    }

    /// True if no request has begun that has not ended.
    pub fn is_drained(&self) -> bool {
        self.running.is_empty() && self.preempted.is_empty()
    }

    /// A live sequence.
    pub fn sequence(&self, seq: SeqId) -> Option<&Sequence> {
        self.sequences.get(&seq)
    }

    /// True if no request is left.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Requests that have not begun.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Sequences that have lost their blocks and wait to go on.
    pub fn preempted(&self) -> usize {
        self.preempted.len()
    }

    /// Sequences that hold blocks.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Blocks that sequences hold.
    pub fn blocks_used(&self) -> usize {
        self.blocks.used()
    }

    /// Blocks that can be had: free ones, and cached ones that no sequence holds.
    pub fn blocks_free(&self) -> usize {
        self.blocks.free()
    }

    /// Size of the pool.
    pub fn blocks_total(&self) -> usize {
        self.blocks.total()
    }

    /// The weight version that new KV is computed under.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The counters.
    pub fn stats(&self) -> Stats {
        self.stats
    }
}

#[cfg(test)]
mod tests;
