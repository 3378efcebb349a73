//! How the backward pass is cut: an item is one KV head of some sequences of one group.
//!
//! Gradients of the keys and values of tails belong to one item each. Those of a prompt come from
//! its own rows and from all tails: each item leaves its share, and the shares are added up in
//! order afterwards.

use super::PackedAttention;
use super::backward::{Backward, SCRATCH};
use super::layout::{Layout, PageBuffers};
use crate::kernels::disjoint::Shared;
use crate::kernels::parallel::for_each;
use crate::kernels::simd::Level;
use std::ops::Range;

/// Most items that the tails of a group make for each KV head.
const PARTS: usize = 8;

/// What the forward pass left, and the gradient by its output.
#[derive(Clone, Copy)]
pub struct Saved<'a> {
    /// The output, `[rows, heads, head_dim]`.
    pub out: &'a [f32],
    /// `[rows, heads]`
    pub log_sums: &'a [f32],
    /// The gradient by the output, `[rows, heads, head_dim]`.
    pub gradient: &'a [f32],
}

/// Where the gradients go; shaped as what they are by.
pub struct Gradients<'a> {
    /// `[rows, heads, head_dim]`
    pub q: &'a mut [f32],
    /// `[rows, kv_heads, head_dim]`
    pub k: &'a mut [f32],
    /// `[rows, kv_heads, head_dim]`
    pub v: &'a mut [f32],
}

/// What every item reads and where it writes.
pub(super) struct Batch<'a> {
    pub attention: &'a PackedAttention<'a>,
    pub saved: &'a Saved<'a>,
    pub layout: &'a Layout,
    /// Pages of keys, transposed, and values.
    pub pages: &'a PageBuffers,
    /// The same the other way round: values, transposed, and keys.
    pub turned: &'a PageBuffers,
    pub by_q: Shared<'a, f32>,
    pub by_k: Shared<'a, f32>,
    pub by_v: Shared<'a, f32>,
    /// Each item's gradients by its prompt's keys and values, `[2][prompt][head_dim]`.
    pub shares: Shared<'a, f32>,
}

/// One KV head of some sequences of one group.
pub(super) struct Item {
    pub head: usize,
    pub sequences: Range<usize>,
    /// Positions of the group's prompt.
    pub prompt: usize,
    /// Where its share begins.
    pub share: usize,
}

/// A group's items of one KV head, whose shares follow each other.
struct Reduction {
    first_row: usize,
    prompt: usize,
    head: usize,
    share: usize,
    parts: usize,
}

pub(super) fn run(attention: &PackedAttention, saved: &Saved, by: &mut Gradients) {
    run_at(Level::best(), attention, saved, by);
}

pub(super) fn run_at(level: Level, attention: &PackedAttention, saved: &Saved, by: &mut Gradients) {
    let PackedAttention { q, k, v, kv_heads, head_dim, .. } = *attention;
    let log_sums = attention.rows() * attention.heads();
    assert!(
        saved.out.len() == q.len() && saved.gradient.len() == q.len() && by.q.len() == q.len(),
        "the output and its gradient have the shape of q"
    );
    assert!(by.k.len() == k.len() && by.v.len() == v.len(), "gradients as long as k and v");
    assert_eq!(saved.log_sums.len(), log_sums, "a sum for every row and head");
    let layout = Layout::new(attention.groups);
    let pages = PageBuffers::new(&layout, k, v, [kv_heads, head_dim]);
    let turned = PageBuffers::new(&layout, v, k, [kv_heads, head_dim]);
    let (mut items, reductions, shares) = cut(attention, &layout);
    let cost = |item: &Item| -> usize {
        let sequences = &layout.sequences[item.sequences.clone()];
        sequences.iter().map(|sequence| sequence.rows.len() * sequence.len()).sum()
    };
    items.sort_by_key(|item| std::cmp::Reverse(cost(item)));
    let mut shares = vec![0.0; shares];
    let batch = Batch {
        attention,
        saved,
        layout: &layout,
        pages: &pages,
        turned: &turned,
        by_q: Shared::new(&mut *by.q),
        by_k: Shared::new(&mut *by.k),
        by_v: Shared::new(&mut *by.v),
        shares: Shared::new(&mut shares),
    };
    for_each(items.len(), &|i| {
        SCRATCH.with_borrow_mut(|scratch| {
            level.run(Backward { batch: &batch, item: &items[i], scratch });
        });
    });
    let sums = [Shared::new(&mut *by.k), Shared::new(&mut *by.v)];
    for_each(reductions.len(), &|i| {
        reduce(attention, &reductions[i], &shares, [&sums[0], &sums[1]])
    });
}

/// The items, what is to be added up afterwards, and the length of all shares.
fn cut(attention: &PackedAttention, layout: &Layout) -> (Vec<Item>, Vec<Reduction>, usize) {
    let (mut items, mut reductions, mut share) = (Vec::new(), Vec::new(), 0);
    for (start, sequences) in by_group(layout) {
        let prompt = sequences[0].rows.len();
        let tails = start + 1..start + sequences.len();
        let size = tails.len().div_ceil(PARTS).max(1);
        let parts = tails.clone().step_by(size).map(|first| first..tails.end.min(first + size));
        let parts: Vec<_> = std::iter::once(start..start + 1).chain(parts).collect();
        for head in 0..attention.kv_heads {
            let first_row = sequences[0].rows.start;
            reductions.push(Reduction { first_row, prompt, head, share, parts: parts.len() });
            for sequences in parts.iter().cloned() {
                items.push(Item { head, sequences, prompt, share });
                share += 2 * prompt * attention.head_dim;
            }
        }
    }
    (items, reductions, share)
}

/// The sequences of each group with the number of the first.
fn by_group(layout: &Layout) -> impl Iterator<Item = (usize, &[super::layout::Sequence])> {
    let mut start = 0;
    layout.sequences.chunk_by(|a, b| a.group == b.group).map(move |sequences| {
        let first = start;
        start += sequences.len();
        (first, sequences)
    })
}

/// Adds the shares of a prompt's keys and values up, in order.
fn reduce(attention: &PackedAttention, work: &Reduction, shares: &[f32], by: [&Shared<f32>; 2]) {
    let dim = attention.head_dim;
    let half = work.prompt * dim;
    for (side, by) in by.into_iter().enumerate() {
        for position in 0..work.prompt {
            let row = work.first_row + position;
            // SAFETY: each row and head of a prompt belongs to one reduction, each is run once,
            // and the items are done.
            let sum = unsafe { by.part((row * attention.kv_heads + work.head) * dim, dim) };
            sum.fill(0.0);
            for part in 0..work.parts {
                let start = work.share + (2 * part + side) * half + position * dim;
                sum.iter_mut().zip(&shares[start..start + dim]).for_each(|(sum, x)| *sum += x);
            }
        }
    }
}
