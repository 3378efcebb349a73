//! How attention over pages is cut for a GPU: tiles of rows and tokens. No tensors.
//!
//! A tile is at most 64 query rows (positions times the query heads of one KV head) that read the same
//! tokens. Rows of a span make tiles of their own; where spans that follow each other begin with the
//! same blocks, as the samples of a group do, their rows share tiles over these blocks, which are so
//! read once. Long tiles are cut again, so that there are enough of them for the device: then a row
//! is put together out of pieces.

use crate::kernels::{attention::Span, pages::BLOCK};
use std::ops::Range;

/// Query rows, heads of the group counted, of a tile at most.
pub const MOST_ROWS: usize = 64;
/// Tokens that a tile is not cut below.
const LEAST_TOKENS: usize = 256;
/// Tokens that a thread block takes at a time.
const STEP: usize = 64;
/// Blocks that are worth sharing: the second cache has fewer for all that read them, and pieces take time
/// to be put together.
const LEAST_SHARED: usize = 16;

/// What the cut depends on besides the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// Query heads per KV head; 64 at most.
    pub group: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Thread blocks that the device runs at once.
    pub blocks: usize,
}

impl Machine {
    /// Rows of the batch that fit into a tile.
    fn rows_of_tile(&self) -> usize {
        (MOST_ROWS / self.group).max(1)
    }

    /// Tiles to aim at: each is run for every KV head, and twice as many thread blocks as run at once
    /// even out.
    fn wanted_tiles(&self) -> usize {
        (2 * self.blocks).div_ceil(self.kv_heads)
    }

    /// How much a batch of so many rows, each of a span of its own, can make at most.
    pub fn most_of_decode(&self, rows: usize) -> Sizes {
        let cuts = self.wanted_tiles();
        Sizes {
            tiles: 2 * rows + cuts,
            tile_rows: 2 * rows,
            pieces: 2 * rows + (self.rows_of_tile() + 1) * cuts,
        }
    }
}

/// How much a cut has made, or may make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Tiles.
    pub tiles: usize,
    /// Entries of [`Work::tile_rows`].
    pub tile_rows: usize,
    /// Pieces of rows.
    pub pieces: usize,
}

/// Some rows and some tokens that all of them may see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tile {
    /// The rows' places in [`Work::tile_rows`].
    pub rows: Range<usize>,
    /// The span whose block table is read.
    pub span: usize,
    /// Tokens; the first is a multiple of 16.
    pub tokens: Range<usize>,
    /// Which piece of each of its rows the tile makes.
    pub ordinal: usize,
}

/// The work of one batch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Work {
    /// The tiles, the longest ones first.
    pub tiles: Vec<Tile>,
    /// Rows of the batch, as tiles have them.
    pub tile_rows: Vec<usize>,
    /// Pieces of each row; 0 where one tile makes all of it.
    pub pieces: Vec<usize>,
}

impl Work {
    /// Cuts the attention of `spans`, whose rows follow each other from 0 on.
    ///
    /// # Panics
    /// If the group is larger than a tile.
    pub fn new(spans: &[Span], machine: &Machine) -> Self {
        assert!((1..=MOST_ROWS).contains(&machine.group), "a group fits into a tile");
        let families = families(spans, machine.rows_of_tile() > 1);
        let whole = uncut(spans, &families, machine.rows_of_tile());
        let tokens: usize = whole.iter().map(|tile| tile.tokens.len()).sum();
        let most = tokens.div_ceil(machine.wanted_tiles()).max(LEAST_TOKENS);
        let rows = spans.last().map_or(0, |span| span.rows.end);
        let mut work = Self { pieces: vec![0; rows], ..Self::default() };
        for Uncut { rows, span, tokens } in whole {
            let first = work.tile_rows.len();
            work.tile_rows.extend(rows.clone());
            let ordinal = work.pieces[rows.start];
            let parts = cut(&tokens, most);
            rows.for_each(|row| work.pieces[row] += parts.len());
            let places = first..work.tile_rows.len();
            work.tiles.extend(parts.into_iter().enumerate().map(|(i, tokens)| Tile {
                rows: places.clone(),
                span,
                tokens,
                ordinal: ordinal + i,
            }));
        }
        work.pieces.iter_mut().filter(|pieces| **pieces == 1).for_each(|pieces| *pieces = 0);
        work.tiles.sort_by_key(|tile| std::cmp::Reverse(tile.tokens.len()));
        work
    }

    /// How much it is.
    pub fn sizes(&self) -> Sizes {
        Sizes {
            tiles: self.tiles.len(),
            tile_rows: self.tile_rows.len(),
            pieces: self.pieces.iter().sum(),
        }
    }
}

/// A tile before it is cut along the tokens.
struct Uncut {
    rows: Range<usize>,
    span: usize,
    tokens: Range<usize>,
}

/// Tiles over what families share come before those of their members' own tokens.
fn uncut(spans: &[Span], families: &[Family], most: usize) -> Vec<Uncut> {
    let mut tiles = Vec::new();
    for Family { members, shared } in families {
        let own = &spans[members.clone()];
        if *shared > 0 {
            let rows = own[0].rows.start..own[own.len() - 1].rows.end;
            let (span, tokens) = (members.start, 0..*shared);
            tiles.extend(pieces_of(&rows, most).map(|rows| Uncut {
                rows,
                span,
                tokens: tokens.clone(),
            }));
        }
        for (span, index) in own.iter().zip(members.clone()) {
            tiles.extend(pieces_of(&span.rows, most).map(|rows| {
                let end = span.first_position + rows.end - span.rows.start;
                Uncut { rows, span: index, tokens: *shared..end }
            }));
        }
    }
    tiles
}

/// A range in about equal parts of at most `most`.
fn pieces_of(rows: &Range<usize>, most: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let (first, len) = (rows.start, rows.len());
    let count = len.div_ceil(most);
    (0..count).map(move |i| first + i * len / count..first + (i + 1) * len / count)
}

/// Tokens in about equal parts of about `most` at most, each of whole steps but the last one.
fn cut(tokens: &Range<usize>, most: usize) -> Vec<Range<usize>> {
    let parts = tokens.len().div_ceil(most).max(1);
    let each = tokens.len().div_ceil(parts).next_multiple_of(STEP).max(STEP);
    tokens.clone().step_by(each).map(|start| start..tokens.end.min(start + each)).collect()
}

/// Spans that follow each other, and the tokens of the blocks that they begin with.
struct Family {
    members: Range<usize>,
    shared: usize,
}

fn families(spans: &[Span], sharing: bool) -> Vec<Family> {
    let mut families = Vec::new();
    let mut first = 0;
    while first < spans.len() {
        let (members, shared) = if sharing { family(&spans[first..]) } else { (1, 0) };
        families.push(Family { members: first..first + members, shared: shared * BLOCK });
        first += members;
    }
    families
}

/// How many of the first spans belong together, and how many blocks they share. A span joins if the
/// others do not lose more than half of what they share.
fn family(spans: &[Span]) -> (usize, usize) {
    let mut shared = 0;
    for (count, span) in spans.iter().enumerate().skip(1) {
        let common = common_blocks(&spans[0], span);
        let common = if count == 1 { common } else { common.min(shared) };
        if common < LEAST_SHARED || common < shared / 2 {
            return (count, shared);
        }
        shared = common;
    }
    (spans.len(), shared)
}

/// Blocks that both begin with and all rows of both see.
fn common_blocks(a: &Span, b: &Span) -> usize {
    let seen = a.first_position.min(b.first_position) / BLOCK;
    a.blocks.iter().zip(b.blocks).take(seen).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests;
