//! What holds between any two calls of a scheduler, and of every step.

use super::{BLOCK, World, digest, pure};
use onpolicy_engine::scheduler::{Chunk, Step};
use onpolicy_plugin_api::RequestId;

impl World {
    pub(super) fn check(&self) {
        let s = &self.scheduler;
        s.check().unwrap_or_else(|wrong| panic!("{wrong}"));
        assert_eq!(s.blocks_free() + s.blocks_used(), self.config.num_blocks);
        assert!(s.running() <= self.config.max_num_seqs);
        assert!(s.waiting() <= self.config.max_waiting);
    }

    pub(super) fn check_step(&mut self, step: &Step) {
        assert_eq!(step.version, self.version);
        assert!(step.num_tokens() <= self.config.max_batched_tokens);
        let guesses = step.chunks.iter().any(|chunk| chunk.drafts > 0);
        assert!(!guesses || step.num_tokens() <= self.config.drafts.rows);
        self.note_beginnings(step);
        let age = |chunk: &Chunk| {
            let group = self.scheduler.sequence(chunk.seq).expect("a live sequence").group;
            (self.begun.iter().position(|&begun| begun == group), chunk.seq)
        };
        assert!(step.chunks.is_sorted_by(|a, b| age(a) < age(b)), "oldest first, each once");
        for chunk in &step.chunks {
            let sequence = self.scheduler.sequence(chunk.seq).expect("a live sequence");
            let request = &self.requests[&sequence.group];
            let generated = &request.samples[sequence.index].0;
            let known = sequence.tokens.len() - usize::from(sequence.expected.is_some());
            assert_eq!(sequence.tokens[..known], [&request.prompt[..], &generated[..]].concat());
            assert_eq!(sequence.computed, chunk.start);
            assert!(chunk.len > 0);
            let end = chunk.start + chunk.len;
            assert!(end < request.max_len, "a last token needs no KV");
            self.seen.expected += usize::from(sequence.expected.is_some() && chunk.sample);
            assert_eq!(chunk.drafts, sequence.drafts.len());
            assert_eq!(chunk.sample, end - chunk.drafts == sequence.tokens.len());
            assert!(chunk.drafts == 0 || request.draft && end < request.max_len);
            assert!(end <= sequence.blocks.len() * BLOCK);
            self.seen.cut_prefills += usize::from(!chunk.sample);
            self.seen.trace = digest(self.seen.trace, chunk.len as u32, end, chunk.seq.0);
        }
        self.seen.copies += step.copies.len();
    }

    /// A request begins when no other that waits has a lower priority, or the same and is older.
    pub(super) fn note_beginnings(&mut self, step: &Step) {
        for chunk in &step.chunks {
            let group = self.scheduler.sequence(chunk.seq).expect("a live sequence").group;
            if self.begun.contains(&group) {
                continue;
            }
            self.begun.push(group);
            let priority = |id: &RequestId| self.requests[id].priority;
            let waiting = self.live.iter().filter(|id| !self.begun.contains(id));
            let turn = (priority(&group), group);
            assert!(waiting.clone().all(|id| turn < (priority(id), *id)), "{group:?} jumped ahead");
            self.seen.overtaken += usize::from(waiting.clone().any(|id| *id < group));
        }
        let live = &self.live;
        self.begun.retain(|id| live.contains(id));
    }

    /// A sequence that has just been admitted starts from what the present weights computed.
    pub(super) fn check_admission(&mut self, chunk: &Chunk) {
        let sequence = self.scheduler.sequence(chunk.seq).expect("a live sequence");
        assert_eq!(chunk.start % BLOCK, 0);
        assert_eq!(sequence.kv_version, Some(self.version));
        let reuse = self.requests[&sequence.group].reuse_prefix || !sequence.generated().is_empty();
        assert!(chunk.start == 0 || reuse && self.config.prefix_cache);
        let salt = self.requests[&sequence.group].salt;
        let tokens = &self.tokens(chunk.seq)[..chunk.start];
        self.private.insert(chunk.seq, pure(tokens, self.version, salt));
    }
}
