//! The samples of one request: how they part, and how they end.

use super::Scheduler;
use crate::sequence::{Place, SeqId, Sequence};
use onpolicy_plugin_api::RequestId;

/// A request's live samples.
#[derive(Debug)]
pub(super) struct Group {
    /// Id of sample 0, live or not; sample `i` has this plus `i`.
    pub first: SeqId,
    /// The live samples by index. Until they fork, the first of them is the leader.
    pub members: Vec<SeqId>,
    /// Whether the prompt has been computed and each sample stands on its own.
    pub forked: bool,
    /// Whether the prompt may come from the prefix cache.
    pub reuse_prefix: bool,
    /// Whether its tokens may be guessed.
    pub draft: bool,
}

impl Group {
    pub fn new(first: SeqId, n: usize, reuse_prefix: bool, draft: bool) -> Self {
        let members = (first.0..first.0 + n as u64).map(SeqId).collect();
        Self { first, members, forked: false, reuse_prefix, draft }
    }
}

impl Scheduler {
    /// The sequences that draw their next token from the logits row of `seq`'s last token: after
    /// its prompt, all samples of its group that are alive, by index; later, itself. None if its
    /// tokens are not all computed, or it has ended.
    pub fn fork(&mut self, seq: SeqId) -> Vec<SeqId> {
        let Some(leader) = self.sequences.get(&seq).filter(|leader| leader.pending() == 0) else {
            return Vec::new();
        };
        if leader.place != Place::Running {
            return Vec::new();
        }
        let group = self.groups.get_mut(&leader.group).expect("the group of a live sequence");
        if std::mem::replace(&mut group.forked, true) || group.members.len() == 1 {
            return vec![seq];
        }
        let members = group.members.clone();
        let leader = leader.clone();
        for &id in &members[1..] {
            self.blocks.share(&leader.blocks);
            let sample = self.sequences.get_mut(&id).expect("a live sample");
            *sample = Sequence { id, index: sample.index, ..leader.clone() };
        }
        let siblings = &members[1..];
        self.reserved -= siblings.len();
        let at = self.place_of(seq).expect("a running leader stands in its line") + 1;
        self.running.splice(at..at, siblings.iter().copied());
        members
    }

    /// The live sample `index` of a request, also before it was forked.
    pub fn sample(&self, request: RequestId, index: usize) -> Option<SeqId> {
        let first = self.groups.get(&request)?.first;
        let id = SeqId(first.0.checked_add(index as u64)?);
        self.sequences.get(&id).filter(|sequence| sequence.group == request).map(|_| id)
    }

    /// The live samples of a request, by index.
    pub fn samples(&self, request: RequestId) -> &[SeqId] {
        self.groups.get(&request).map_or(&[], |group| &group.members)
    }

    /// Ends one sample, at any stage; its blocks are given back. If it was to compute the prompt of
    /// its group, the next sample does it from where it stands. An unknown one is passed over.
    pub fn finish(&mut self, seq: SeqId) {
        let Some(sequence) = self.sequences.get(&seq) else { return };
        let request = sequence.group;
        let group = self.groups.get_mut(&request).expect("the group of a live sequence");
        let leader = group.members[0];
        group.members.retain(|&id| id != seq);
        let heir = group.members.first().copied();
        let unforked = !group.forked;
        match heir {
            Some(heir) if unforked => {
                self.reserved -= usize::from(self.sequences[&leader].place == Place::Running);
                if seq == leader {
                    self.hand_over(leader, heir);
                } else {
                    self.discard(seq);
                }
            }
            Some(_) => self.discard(seq),
            None => {
                self.groups.remove(&request);
                self.discard(seq);
            }
        }
    }

    /// Ends all samples of a request, at any stage. An unknown one is passed over.
    pub fn abort(&mut self, request: RequestId) {
        let Some(group) = self.groups.remove(&request) else { return };
        if let Some(leader) = group.members.first().filter(|_| !group.forked)
            && self.sequences[leader].place == Place::Running
        {
            self.reserved -= group.members.len() - 1;
        }
        for seq in group.members {
            self.discard(seq);
        }
    }

    /// How many unforked samples wait for this sequence to compute their prompt.
    pub(super) fn unforked_siblings(&self, leader: SeqId) -> usize {
        let group = &self.groups[&self.sequences[&leader].group];
        if group.forked { 0 } else { group.members.len() - 1 }
    }

    /// A sequence's turn in its line.
    pub(super) fn turn(&self, seq: SeqId) -> (i64, SeqId) {
        (self.sequences[&seq].turn, seq)
    }

    /// Where a sequence stands in its line, if it stands in one.
    fn place_of(&self, seq: SeqId) -> Option<usize> {
        let (turn, of) = (self.turn(seq), |id: &SeqId| self.turn(*id));
        let found = match self.sequences[&seq].place {
            Place::Unforked => return None,
            Place::Waiting => self.waiting.binary_search_by_key(&turn, of),
            Place::Preempted => self.preempted.binary_search_by_key(&turn, of),
            Place::Running => self.running.binary_search_by_key(&turn, of),
        };
        found.ok()
    }

    /// Takes a sequence out of whatever line it stands in.
    pub(super) fn leave_line(&mut self, seq: SeqId) {
        let Some(at) = self.place_of(seq) else { return };
        match self.sequences[&seq].place {
            Place::Unforked => {}
            Place::Waiting => {
                self.waiting.remove(at);
            }
            Place::Preempted => {
                self.preempted.remove(at);
            }
            Place::Running => {
                self.running.remove(at);
            }
        }
    }

    /// Removes the leader of a group that has not forked; `heir`, its next sample, goes on with its
    /// tokens and blocks, in its place in line.
    fn hand_over(&mut self, leader: SeqId, heir: SeqId) {
        let at = self.place_of(leader).expect("a leader stands in its line");
        match self.sequences[&leader].place {
            Place::Unforked => unreachable!("a leader stands in a line"),
            Place::Waiting => self.waiting[at] = heir,
            Place::Preempted => self.preempted[at] = heir,
            Place::Running => self.running[at] = heir,
        }
        let old = self.sequences.remove(&leader).expect("a live sample");
        let sample = self.sequences.get_mut(&heir).expect("a live sample");
        *sample = Sequence { id: heir, index: sample.index, ..old };
    }

    /// Removes a sequence and gives back its blocks.
    fn discard(&mut self, seq: SeqId) {
        self.leave_line(seq);
        if let Some(mut sequence) = self.sequences.remove(&seq) {
            self.blocks.release_table(&mut sequence.blocks);
        }
    }
}
