//! How the rows of a batch become items: cut where a span is long, put together where sequences
//! begin with the same blocks.

use std::ops::Range;

use super::{BLOCK, Batch, CHUNK, MAX_ROWS, Span};

/// Query rows (positions times heads of the group) that one item aims at.
const ITEM_ROWS: usize = 8 * MAX_ROWS;

/// Runs that there should be at least.
const FEWEST_RUNS: usize = 16;
/// Items of a run at most.
const LONGEST_RUN: usize = 6;

/// One KV head, for some consecutive rows of the batch.
pub(super) struct Item<'a> {
    pub(super) head: usize,
    /// Spans whose rows follow each other; at least one.
    pub(super) members: &'a [Span<'a>],
    /// Tokens, from the first on, that lie in the same blocks for all members and that all their
    /// rows see: whole chunks. 0 for a member alone.
    pub(super) shared: usize,
}

impl Item<'_> {
    /// The item's rows of the batch.
    pub(super) fn rows(&self) -> Range<usize> {
        self.members[0].rows.start..self.members[self.members.len() - 1].rows.end
    }

    /// Something that grows with the time that the item takes.
    fn cost(&self, window: usize) -> usize {
        let own = self.members.iter().map(|member| {
            let seen = (member.first_position + member.rows.len()).min(window);
            member.rows.len() * (seen - self.shared)
        });
        own.sum::<usize>() + self.rows().len() * self.shared
    }
}

/// The batch's spans, cut so that each makes about the rows of one item.
pub(super) fn cut<'a>(batch: &Batch<'a>) -> Vec<Span<'a>> {
    let most = (ITEM_ROWS / batch.group.max(1)).max(1);
    let mut parts = Vec::with_capacity(batch.spans.len());
    for span in batch.spans {
        parts.extend(span.rows.clone().step_by(most).map(|start| Span {
            rows: start..span.rows.end.min(start + most),
            first_position: span.first_position + start - span.rows.start,
            blocks: span.blocks,
        }));
    }
    parts
}

/// The items of `parts`, the longest ones first.
pub(super) fn items<'a>(batch: &Batch, parts: &'a [Span<'a>]) -> Vec<Item<'a>> {
    let mut items = Vec::new();
    let mut rest = parts;
    while !rest.is_empty() {
        let (count, shared) = family(batch, rest);
        let (members, others) = rest.split_at(count);
        rest = others;
        items.extend((0..batch.pages.kv_heads).map(|head| Item { head, members, shared }));
    }
    items.sort_by_key(|item| std::cmp::Reverse(item.cost(batch.window)));
    items
}

/// How many runs of how many items a thread takes at a time: it knows then what comes next, and can
/// ask for it early. Runs are short where items are few, so that all threads end together.
pub(super) fn runs(items: &[Item]) -> (usize, usize) {
    let run = (items.len() / FEWEST_RUNS).clamp(1, LONGEST_RUN);
    (items.len().div_ceil(run), run)
}

/// How many of the first parts make an item together, and how many tokens they share. A part joins
/// if its rows fit and the others do not lose more than half of what they share.
fn family(batch: &Batch, parts: &[Span]) -> (usize, usize) {
    let first = &parts[0];
    let (mut rows, mut shared) = (first.rows.len(), sharable(batch, first));
    for (count, part) in parts.iter().enumerate().skip(1) {
        rows += part.rows.len();
        let common = shared.min(sharable(batch, part)).min(common_tokens(first, part));
        if rows * batch.group > ITEM_ROWS || common == 0 || (count > 1 && common < shared / 2) {
            return (count, if count > 1 { shared } else { 0 });
        }
        shared = common;
    }
    (parts.len(), if parts.len() > 1 { shared } else { 0 })
}

/// Tokens that all rows of a part see, in whole chunks; none if the window hides some.
fn sharable(batch: &Batch, part: &Span) -> usize {
    let hidden = part.first_position + part.rows.len() > batch.window;
    if hidden { 0 } else { part.first_position / CHUNK * CHUNK }
}

/// Tokens that lie in the same blocks, in whole chunks.
fn common_tokens(a: &Span, b: &Span) -> usize {
    let same = a.blocks.iter().zip(b.blocks).take_while(|(a, b)| a == b).count();
    same * BLOCK / CHUNK * CHUNK
}
