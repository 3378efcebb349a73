//! From a request to running sequences.

use super::{Group, NewRequest, Scheduler, Step};
use crate::block_manager::{BLOCK_SIZE, Chain, Root, Salt, blocks_for};
use crate::sequence::{Place, SeqId, Sequence};
use onpolicy_plugin_api::EngineError;

impl Scheduler {
    /// Takes a request. Its samples end one by one through [`finish`](Self::finish), or together
    /// through [`abort`](Self::abort).
    ///
    /// # Errors
    /// [`EngineError::Invalid`] if it can never be served, [`EngineError::Overloaded`] if too many
    /// wait, [`EngineError::Internal`] if a live request has the same id.
    pub fn add(&mut self, request: NewRequest) -> Result<(), EngineError> {
        let NewRequest { id, prompt, n, max_tokens, reuse_prefix, draft, priority, cache_salt } =
            request;
        let max_len = self.config.admissible_len(prompt.len(), n, max_tokens)?;
        if self.waiting.len() >= self.config.max_waiting {
            return Err(EngineError::Overloaded { waiting: self.waiting.len() });
        }
        if self.groups.contains_key(&id) {
            return Err(EngineError::Internal(format!("request {} is there already", id.0)));
        }
        let first = self.next_id;
        self.next_id += n as u64;
        let leader = SeqId(first);
        let sequence = Sequence {
            id: leader,
            group: id,
            index: 0,
            tokens: Vec::new(),
            expected: None,
            prompt_len: prompt.len(),
            max_len,
            computed: 0,
            drafts: Vec::new(),
            blocks: Vec::new(),
            kv_version: None,
            place: Place::Unforked,
            turn: i64::from(priority),
            salt: cache_salt.as_deref().map_or_else(Salt::default, Salt::of),
            chain: None,
        };
        for (index, seq) in (first..self.next_id).map(SeqId).enumerate().skip(1) {
            self.sequences.insert(seq, Sequence { id: seq, index, ..sequence.clone() });
        }
        self.learn(sequence.salt, &prompt);
        let sequence = Sequence { tokens: prompt, place: Place::Waiting, ..sequence };
        self.sequences.insert(leader, sequence);
        self.groups.insert(id, Group::new(leader, n, reuse_prefix, draft));
        let turn = (i64::from(priority), leader);
        let at = self.waiting.partition_point(|&id| self.turn(id) < turn);
        self.waiting.insert(at, leader);
        Ok(())
    }

    /// Admits what was preempted by age, then what waits by priority and age, while there is room,
    /// giving out up to `tokens_left` tokens.
    pub(super) fn schedule_admissions(&mut self, step: &mut Step, mut tokens_left: usize) {
        if self.preempted.is_empty() && self.waiting.is_empty() {
            return;
        }
        // What running prompts will need: blocks for their rest, and to part when they fork.
        let rest = |id: &SeqId| self.sequences[id].missing_blocks();
        let promised = self.running.iter().map(rest).sum::<usize>() + self.reserved;
        while tokens_left > 0 {
            let begins = if self.held { None } else { self.waiting.front() };
            let Some(&id) = self.preempted.front().or(begins) else { break };
            // One that is full has lost its blocks, and ends with the token that it expects.
            if self.sequences[&id].is_full() || !self.admit(id, promised) {
                break;
            }
            let sequence = self.sequences.get_mut(&id).expect("an admitted sequence");
            let len = sequence.pending().min(tokens_left);
            let span = sequence.computed..sequence.computed + len;
            let fits = self.blocks.prepare(&mut sequence.blocks, span, &mut step.copies);
            assert!(fits, "admission has counted the blocks");
            step.push(sequence, len);
            tokens_left -= len;
        }
    }

    /// Moves the first sequence that waits to the running ones, if there is a place for each of
    /// its group's samples, and blocks for all its tokens and one more for each sample.
    fn admit(&mut self, id: SeqId, promised: usize) -> bool {
        let siblings = self.unforked_siblings(id);
        let samples = 1 + siblings;
        if self.running.len() + self.reserved + samples > self.config.max_num_seqs {
            return false;
        }
        let sequence = &self.sequences[&id];
        let reuse = self.reuses_prefix(sequence);
        let limit = if reuse { sequence.reusable_blocks() } else { 0 };
        let root = Root { version: self.version, salt: sequence.salt };
        let (chain, found) = self.blocks.lookup(root, &sequence.tokens, limit);
        let fresh = blocks_for(sequence.tokens.len()) - found.len();
        let spare = if self.running.is_empty() { 0 } else { promised + samples };
        if fresh + self.blocks.count_idle(&found) + spare > self.blocks.free() {
            return false;
        }
        if reuse {
            self.stats.prefix_queries += sequence.tokens.len() as u64;
            self.stats.prefix_hits += (found.len() * BLOCK_SIZE) as u64;
        }
        self.blocks.share(&found);
        self.leave_line(id);
        self.running.push(id);
        self.reserved += siblings;
        self.start(id, chain, found);
        true
    }

    fn start(&mut self, id: SeqId, chain: Chain, found: Vec<u32>) {
        let sequence = self.sequences.get_mut(&id).expect("an admitted sequence");
        if sequence.place == Place::Waiting {
            sequence.turn = self.begun;
            self.begun += 1;
        }
        sequence.computed = found.len() * BLOCK_SIZE;
        sequence.blocks = found;
        sequence.kv_version = Some(self.version);
        sequence.chain = self.config.prefix_cache.then_some(chain);
        sequence.place = Place::Running;
    }

    /// Whether a sequence may start from cached blocks. One that has generated tokens may in any
    /// case: its prompt has been computed before.
    fn reuses_prefix(&self, sequence: &Sequence) -> bool {
        let group = &self.groups[&sequence.group];
        self.config.prefix_cache && (group.reuse_prefix || !sequence.generated().is_empty())
    }
}
