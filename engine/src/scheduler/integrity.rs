//! The rules that hold between any two calls.

use super::Scheduler;
use crate::block_manager::BLOCK_SIZE;
use crate::sequence::{Place, SeqId, Sequence};

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what()) }
}

impl Scheduler {
    /// Verifies all bookkeeping; takes time proportional to the pool. For tests, and for the engine
    /// when it has nothing else to do.
    ///
    /// # Errors
    /// Says what is wrong; always a bug.
    pub fn check(&self) -> Result<(), String> {
        self.blocks.check(self.sequences.values().map(|sequence| sequence.blocks.as_slice()))?;
        self.check_lines()?;
        self.check_groups()?;
        self.sequences.values().try_for_each(|sequence| self.check_sequence(sequence))
    }

    /// Every sequence stands in its line, and the lines are ordered: those of what has begun by age,
    /// together, and that of what waits by priority and age.
    fn check_lines(&self) -> Result<(), String> {
        let lines = [
            (Place::Running, self.running.clone()),
            (Place::Preempted, self.preempted.iter().copied().collect()),
            (Place::Waiting, self.waiting.iter().copied().collect()),
        ];
        for (place, line) in &lines {
            let right =
                line.iter().all(|id| self.sequences.get(id).map(|s| s.place) == Some(*place));
            ensure(right, || format!("{place:?} holds another's sequence: {line:?}"))?;
            let standing = self.sequences.values().filter(|s| s.place == *place).count();
            ensure(standing == line.len(), || format!("{standing} {place:?}, line: {line:?}"))?;
        }
        let [running, preempted, waiting] = lines.map(|(_, line)| line);
        for line in [[running, preempted].concat(), waiting] {
            let turns: Vec<(i64, SeqId)> = line.iter().map(|&id| self.turn(id)).collect();
            ensure(turns.is_sorted_by(|a, b| a < b), || format!("not in order: {turns:?}"))?;
        }
        let places = self.running.len() + self.reserved;
        ensure(places <= self.config.max_num_seqs, || format!("{places} places are taken"))
    }

    /// Groups and sequences name each other, and the reserved places are those of unforked samples.
    fn check_groups(&self) -> Result<(), String> {
        let mut reserved = 0;
        let mut members = 0;
        for (request, group) in &self.groups {
            members += group.members.len();
            ensure(!group.members.is_empty(), || format!("{request:?} has no samples"))?;
            for (i, id) in group.members.iter().enumerate() {
                let sample = self.sequences.get(id).filter(|sample| sample.group == *request);
                let unforked = sample.is_some_and(|sample| sample.place == Place::Unforked);
                let right = sample.is_some() && unforked == (!group.forked && i > 0);
                ensure(right, || format!("{request:?}: sample {id:?} does not fit"))?;
            }
            let leader = &self.sequences[&group.members[0]];
            if !group.forked && leader.place == Place::Running {
                reserved += group.members.len() - 1;
            }
        }
        ensure(members == self.sequences.len(), || format!("{members} samples in groups"))?;
        ensure(reserved == self.reserved, || format!("{reserved}, not {}, wait", self.reserved))
    }

    /// A sequence's blocks hold what it says is computed.
    fn check_sequence(&self, sequence: &Sequence) -> Result<(), String> {
        let Sequence { id, computed, tokens, drafts, blocks, chain, .. } = sequence;
        ensure(*computed <= tokens.len() && tokens.len() <= sequence.max_len, || {
            format!("{id:?}: {computed} computed of {}", tokens.len())
        })?;
        ensure(computed + drafts.len() <= blocks.len() * BLOCK_SIZE, || {
            let (drafts, blocks) = (drafts.len(), blocks.len());
            format!("{id:?}: {computed} computed, {drafts} guessed in {blocks} blocks")
        })?;
        if sequence.place != Place::Running {
            return ensure(blocks.is_empty(), || format!("{id:?} holds blocks and does not run"));
        }
        let Some(chain) = chain else { return Ok(()) };
        let last = chain.len().checked_sub(1).map(|at| blocks[at]);
        ensure(chain.last() == last, || format!("{id:?} does not hold its registered blocks"))
    }
}
