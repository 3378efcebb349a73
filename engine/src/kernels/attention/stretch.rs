//! Some rows of an item walking over the tokens of one block table, chunk by chunk.

use std::ops::Range;

use super::super::simd::{Simd, prefetch};
use super::super::tiles::{self, CHUNK, CHUNK_BLOCKS, Scores, Values};
use super::{BLOCK, Batch, Item, LANES, Scratch, Span, tiles_of};

/// Blocks of one KV head that are read next: asked for while something else is worked on, because
/// they are scattered, and the hardware sees no pattern across them.
pub(super) type Ahead<'a> = (&'a [u32], usize);

/// Some rows of an item, and the tokens of one block table that they walk over.
pub(super) struct Stretch<'a> {
    pub(super) batch: &'a Batch<'a>,
    pub(super) item: &'a Item<'a>,
    /// Rows of the item, each query head on its own.
    pub(super) rows: Range<usize>,
    blocks: &'a [u32],
    tokens: Range<usize>,
    /// Position of the first row; none if every row sees every token.
    position: Option<usize>,
}

impl<'a> Stretch<'a> {
    /// The item's stretch `index`: first what its members share, if anything, then each member's own.
    pub(super) fn nth(batch: &'a Batch<'a>, item: &'a Item<'a>, index: usize) -> Option<Self> {
        let shared = usize::from(item.shared > 0);
        if index < shared {
            return Some(Self::shared(batch, item));
        }
        item.members.get(index - shared).map(|member| Self::own(batch, item, member))
    }

    /// All rows, over the tokens that the item's members share.
    fn shared(batch: &'a Batch<'a>, item: &'a Item<'a>) -> Self {
        Self {
            batch,
            item,
            rows: 0..item.rows().len() * batch.group,
            blocks: item.members[0].blocks,
            tokens: 0..item.shared,
            position: None,
        }
    }

    /// The rows of `member`, over the tokens that it does not share.
    fn own(batch: &'a Batch<'a>, item: &'a Item<'a>, member: &'a Span<'a>) -> Self {
        let first = (member.first_position + 1).saturating_sub(batch.window).max(item.shared);
        let start = item.rows().start;
        Self {
            batch,
            item,
            rows: (member.rows.start - start) * batch.group
                ..(member.rows.end - start) * batch.group,
            blocks: member.blocks,
            tokens: first..member.first_position + member.rows.len(),
            position: Some(member.first_position),
        }
    }

    /// The blocks of its first chunk.
    pub(super) fn first_chunk(&self) -> Ahead<'a> {
        let Range { start, end } = self.tokens;
        let first = start - start % CHUNK;
        let blocks = start / BLOCK..end.min(first + CHUNK).div_ceil(BLOCK);
        (&self.blocks[blocks], self.item.head)
    }

    #[inline(always)]
    pub(super) fn attend<S: Simd>(&self, s: S, scratch: &mut Scratch, ahead: Ahead<'a>) {
        scratch.pack(self);
        let Range { start: first, end } = self.tokens;
        for start in (first - first % CHUNK..end).step_by(CHUNK) {
            let tokens = first.saturating_sub(start)..CHUNK.min(end - start);
            let chunk = Chunk::new(self, start, tokens, ahead);
            for tile in tiles_of(&self.rows) {
                match tile.len() {
                    1 => chunk.attend::<S, 1>(s, tile, scratch),
                    2 => chunk.attend::<S, 2>(s, tile, scratch),
                    3 => chunk.attend::<S, 3>(s, tile, scratch),
                    4 => chunk.attend::<S, 4>(s, tile, scratch),
                    5 => chunk.attend::<S, 5>(s, tile, scratch),
                    _ => chunk.attend::<S, 6>(s, tile, scratch),
                }
            }
        }
    }
}

/// Some tokens of a stretch.
struct Chunk<'a> {
    stretch: &'a Stretch<'a>,
    /// Position of the first token.
    start: usize,
    /// Tokens that some row of the stretch sees.
    tokens: Range<usize>,
    keys: [&'a [[f32; BLOCK]]; CHUNK_BLOCKS],
    values: [&'a [f32]; CHUNK_BLOCKS],
    /// Blocks of the next chunk.
    ahead: Ahead<'a>,
}

impl<'a> Chunk<'a> {
    #[inline(always)]
    fn new(stretch: &'a Stretch<'a>, start: usize, tokens: Range<usize>, after: Ahead<'a>) -> Self {
        let (pages, head) = (stretch.batch.pages, stretch.item.head);
        let mut keys: [&[[f32; BLOCK]]; CHUNK_BLOCKS] = [&[]; CHUNK_BLOCKS];
        let mut values: [&[f32]; CHUNK_BLOCKS] = [&[]; CHUNK_BLOCKS];
        for b in tokens.start / BLOCK..tokens.end.div_ceil(BLOCK) {
            let block = stretch.blocks[start / BLOCK + b];
            keys[b] = pages.keys_of(block, head);
            values[b] = pages.values_of(block, head);
        }
        let end = stretch.tokens.end.div_ceil(BLOCK);
        let next = (start / BLOCK + CHUNK_BLOCKS).min(end);
        let blocks = &stretch.blocks[next..(next + CHUNK_BLOCKS).min(end)];
        let ahead = if blocks.is_empty() { after } else { (blocks, head) };
        Self { stretch, start, tokens, keys, values, ahead }
    }

    /// The tokens that the item's row `row` sees.
    #[inline(always)]
    fn visible(&self, row: usize) -> Range<usize> {
        let Some(position) = self.stretch.position else { return 0..CHUNK };
        let batch = self.stretch.batch;
        let end = position + (row - self.stretch.rows.start) / batch.group + 1;
        let first = end.saturating_sub(batch.window);
        first.saturating_sub(self.start)..end.saturating_sub(self.start).min(CHUNK)
    }

    /// Takes the chunk into account in the item's `M` rows `tile`.
    #[inline(always)]
    fn attend<S: Simd, const M: usize>(&self, s: S, tile: Range<usize>, scratch: &mut Scratch) {
        let pages = self.stretch.batch.pages;
        let dim = pages.head_dim;
        let queries = &scratch.queries[tile.start * dim..tile.end * dim];
        let blocks = self.tokens.start / BLOCK..self.tokens.end.div_ceil(BLOCK);
        let scores = (&mut scratch.scores[..], blocks.start);
        let first_tile = tile.start == self.stretch.rows.start;
        if first_tile {
            for &block in self.ahead.0 {
                prefetch(pages.keys_of(block, self.ahead.1).as_flattened());
            }
        }
        tiles::score(s, queries.as_chunks::<M>().0, &self.keys[blocks], scores);
        for (scores, row) in scratch.scores[..M].iter_mut().zip(tile.clone()) {
            hide(scores, self.visible(row));
        }
        let running = &mut scratch.running[tile.clone()];
        let factors = tiles::weigh::<S, M>(s, &mut scratch.scores[..M], running);
        let values = Values { blocks: &self.values, tokens: self.tokens.clone(), head_dim: dim };
        if first_tile {
            for &block in self.ahead.0 {
                prefetch(pages.values_of(block, self.ahead.1));
            }
        }
        let lines = dim.div_ceil(LANES);
        let sums = &mut scratch.sums[tile.start * lines..tile.end * lines];
        tiles::accumulate::<S, M>(s, (&scratch.scores[..M], &factors), &values, sums);
    }
}

/// Sets all but the visible scores to minus infinity.
#[inline(always)]
pub(in crate::kernels) fn hide(scores: &mut Scores, visible: Range<usize>) {
    if visible == (0..CHUNK) {
        return;
    }
    for (b, line) in scores.iter_mut().enumerate() {
        for (t, score) in line.0.iter_mut().enumerate() {
            if !visible.contains(&(b * BLOCK + t)) {
                *score = f32::NEG_INFINITY;
            }
        }
    }
}
