//! The samples that get a token in a step, and what their grammars allow there.

use super::request::LiveRequest;
use crate::{
    kernels::disjoint,
    sequence::{SeqId, Sequence},
};
use onpolicy_plugin_api::{EngineError, RequestId};
use std::collections::HashMap;

/// One sample that gets a token from a logits row.
pub struct Target {
    pub request: RequestId,
    pub seq: SeqId,
    pub index: usize,
    /// How many guesses stand between the sample's tokens and this one.
    pub ahead: usize,
}

impl Target {
    pub fn of(sequence: &Sequence, ahead: usize) -> Self {
        Self { request: sequence.group, seq: sequence.id, index: sequence.index, ahead }
    }
}

/// Works out what the grammars of the targets, each given with its row, allow next: requests at the
/// same time, the samples of one after one another, because they share what is known about their
/// grammar. Gives the requests that cannot go on.
pub fn look(
    live: &mut HashMap<RequestId, LiveRequest>,
    targets: &[(usize, Target)],
) -> HashMap<RequestId, EngineError> {
    let live = live.iter_mut().filter(|(_, live)| live.has_grammar());
    let mut due: Vec<_> = live.map(|(&id, live)| (id, live, None)).collect();
    disjoint::for_each_chunk(&mut due, 1, &|_, due| {
        let (id, live, error) = &mut due[0];
        let mut own = targets.iter().filter(|(_, target)| target.request == *id);
        *error = own.find_map(|(_, target)| live.look(target.index).err());
    });
    due.into_iter().filter_map(|(id, _, error)| Some((id, error?))).collect()
}
