//! Guesses at what running sequences draw next, computed in the same step as the token before.
//!
//! A step of few rows takes as long as reading the weights, however many rows it has; more rows
//! are free. So a decode may bring guesses (see [`Drafter`]) at the tokens that follow. Each of its
//! rows is drawn from as it would be in a step of its own, and as long as a drawn token is the one
//! that was guessed, the next row is what the next step would compute: bit for bit, since a row
//! does not depend on its batch. What is drawn does not depend on the guesses.

use super::{Chunk, Scheduler, Step};
use crate::{
    block_manager::{BLOCK_SIZE, Salt},
    draft::Drafter,
};

/// How many tokens are guessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DraftLimits {
    /// Most for one sequence in a step; nothing is guessed if it is 0.
    pub per_sequence: usize,
    /// Most rows of a step that has guesses: as many as are free.
    pub rows: usize,
}

impl DraftLimits {
    /// A drafter, if anything is to be guessed.
    pub(super) fn drafter(self) -> Option<Drafter> {
        (self.per_sequence > 0 && self.rows > 1).then(Drafter::default)
    }
}

impl Scheduler {
    /// Adds guesses to the decodes of a step, as many as rows are free: as evenly as can be, the
    /// older first.
    pub(super) fn schedule_drafts(&mut self, step: &mut Step) {
        let most = self.config.drafts.rows.min(self.config.max_batched_tokens);
        let mut rows = most.saturating_sub(step.num_tokens());
        if rows == 0 {
            return;
        }
        let Some(drafter) = self.drafter.take() else { return };
        let mut decodes = step.chunks.iter().filter(|chunk| self.may_draft(chunk)).count();
        for at in 0..step.chunks.len() {
            if rows == 0 || decodes == 0 {
                break;
            }
            if self.may_draft(&step.chunks[at]) {
                let share = rows.div_ceil(decodes);
                rows -= self.draft(&drafter, &mut step.chunks[at], share);
                decodes -= 1;
            }
        }
        self.drafter = Some(drafter);
    }

    /// True of a decode whose request lets its tokens be guessed.
    fn may_draft(&self, chunk: &Chunk) -> bool {
        let sequence = &self.sequences[&chunk.seq];
        chunk.sample
            && chunk.len == 1
            && !sequence.generated().is_empty()
            && self.groups[&sequence.group].draft
    }

    /// Guesses up to `share` tokens after a decode; how many there are.
    fn draft(&mut self, drafter: &Drafter, chunk: &mut Chunk, share: usize) -> usize {
        // Every other sequence still finds a block if it needs one next.
        let spare = self.blocks.free() > self.running.len();
        let sequence = self.sequences.get_mut(&chunk.seq).expect("a scheduled sequence");
        let tokens = sequence.tokens.len();
        let held = sequence.blocks.len() * BLOCK_SIZE;
        let room = if spare { held + BLOCK_SIZE } else { held };
        // The last token is drawn, not guessed, and needs no KV.
        let most = (sequence.max_len - 1).min(room).saturating_sub(tokens);
        let most = most.min(share).min(self.config.drafts.per_sequence);
        sequence.drafts = drafter.guess(sequence.salt, &sequence.tokens, most);
        let span = chunk.start..tokens + sequence.drafts.len();
        let copies = &mut Vec::new();
        let fits = self.blocks.prepare(&mut sequence.blocks, span, copies);
        assert!(fits && copies.is_empty(), "the decode has its block, and there is one to spare");
        chunk.drafts = sequence.drafts.len();
        chunk.len += chunk.drafts;
        self.stats.drafted += chunk.drafts as u64;
        chunk.drafts
    }

    /// Learns from a prompt.
    pub(super) fn learn(&mut self, salt: Salt, prompt: &[u32]) {
        if let Some(drafter) = &mut self.drafter {
            drafter.learn(salt, prompt, 0);
        }
    }
}
