//! The backward pass of one item.
//!
//! With scores `S = scale Q K^T` and weights `P = exp(S - log_sum)`: `dV = P^T dO`,
//! `dS = P (dO V^T - D)` with `D` the sum of `dO O` over a row, `dQ = scale dS K` and
//! `dK = scale dS^T Q`. Some query rows at a time walk over the tokens in chunks.

use super::items::{Batch, Item};
use super::layout::Sequence;
use crate::kernels::attention::{BLOCK, Pages, hide, tiles_of};
use crate::kernels::simd::{Kernel, LANES, Line, Simd, exp};
use crate::kernels::tiles::{self, CHUNK, CHUNK_BLOCKS, MAX_ROWS, Scores, Values};
use std::cell::RefCell;
use std::ops::Range;

/// Query rows (positions times heads of the group) that are worked on at once.
const BLOCK_ROWS: usize = 16 * MAX_ROWS;

/// What an item works on; kept from item to item by each thread.
pub(super) struct Scratch {
    /// The scaled queries, and the gradients by their outputs: per tile of `M` rows
    /// `[head_dim][M]`.
    queries: Vec<f32>,
    gradients: Vec<f32>,
    /// Per query row: `log_sum` and `D`.
    log_sums: Vec<f32>,
    deltas: Vec<f32>,
    /// Per query row, of one chunk: `P` and `dS`.
    weights: Vec<Scores>,
    slopes: Vec<Scores>,
    /// Per query row `head_dim` floats in whole lines.
    by_q: Vec<Line>,
    /// The same per position of the sequence.
    by_k: Vec<Line>,
    by_v: Vec<Line>,
}

thread_local! {
    pub(super) static SCRATCH: RefCell<Scratch> = const {
        RefCell::new(Scratch {
            queries: Vec::new(),
            gradients: Vec::new(),
            log_sums: Vec::new(),
            deltas: Vec::new(),
            weights: Vec::new(),
            slopes: Vec::new(),
            by_q: Vec::new(),
            by_k: Vec::new(),
            by_v: Vec::new(),
        })
    };
}

const ZERO: Line = Line([0.0; LANES]);

/// Runs one item.
pub(super) struct Backward<'a> {
    pub batch: &'a Batch<'a>,
    pub item: &'a Item,
    pub scratch: &'a mut Scratch,
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { batch, item, scratch } = self;
        let (pages, turned) = (batch.pages.pages(), batch.turned.pages());
        let sequences = &batch.layout.sequences[item.sequences.clone()];
        let longest = sequences.iter().map(Sequence::len).max().unwrap_or(0);
        let lines = pages.head_dim.div_ceil(LANES);
        let len = longest.next_multiple_of(CHUNK) * lines;
        for buffer in [&mut scratch.by_k, &mut scratch.by_v] {
            buffer.clear();
            buffer.resize(len, ZERO);
        }
        let heads = batch.attention.heads();
        let group = heads / pages.kv_heads;
        let step = (BLOCK_ROWS / group).max(1);
        for sequence in sequences {
            for start in sequence.rows.clone().step_by(step) {
                let rows = start..sequence.rows.end.min(start + step);
                let position = sequence.first_position + start - sequence.rows.start;
                let window = batch.attention.window.unwrap_or(usize::MAX);
                let head = item.head;
                let (pages, turned) = (&pages, &turned);
                let queries = Queries {
                    batch,
                    pages,
                    turned,
                    sequence,
                    head,
                    heads,
                    group,
                    rows,
                    position,
                    window,
                };
                queries.run(s, scratch);
            }
            write_own(batch, item, sequence, scratch);
        }
        write_share(batch, item, scratch);
    }
}

/// Some rows of one sequence, with the query heads of one KV head.
struct Queries<'a> {
    batch: &'a Batch<'a>,
    pages: &'a Pages<'a>,
    turned: &'a Pages<'a>,
    sequence: &'a Sequence,
    head: usize,
    heads: usize,
    /// Query heads per KV head.
    group: usize,
    rows: Range<usize>,
    /// Position of the first row.
    position: usize,
    window: usize,
}

impl Queries<'_> {
    /// Query rows.
    fn count(&self) -> usize {
        self.rows.len() * self.group
    }

    /// Number of query row `m` among all rows and heads.
    #[inline(always)]
    fn number(&self, m: usize) -> usize {
        (self.rows.start + m / self.group) * self.heads + self.head * self.group + m % self.group
    }

    /// Query row `m` of `data`, `[rows, heads, head_dim]`.
    #[inline(always)]
    fn row<'b>(&self, data: &'b [f32], m: usize) -> &'b [f32] {
        let dim = self.pages.head_dim;
        &data[self.number(m) * dim..][..dim]
    }

    #[inline(always)]
    fn run<S: Simd>(&self, s: S, scratch: &mut Scratch) {
        self.start(s, scratch);
        let end = self.position + self.rows.len();
        let first = (self.position + 1).saturating_sub(self.window);
        for start in (first - first % CHUNK..end).step_by(CHUNK) {
            let tokens = first.saturating_sub(start)..CHUNK.min(end - start);
            self.chunk(s, start, tokens, scratch);
        }
        let scale = 1.0 / (self.pages.head_dim as f32).sqrt();
        let dim = self.pages.head_dim;
        for (m, sums) in scratch.by_q.chunks_exact(dim.div_ceil(LANES)).enumerate() {
            // SAFETY: each row and head belongs to one item, and each item is run once.
            let by_q = unsafe { self.batch.by_q.part(self.number(m) * dim, dim) };
            by_q.iter_mut().zip(Line::flatten(sums)).for_each(|(to, x)| *to = x * scale);
        }
    }

    /// Makes room, packs queries and gradients, and computes `D`.
    #[inline(always)]
    fn start<S: Simd>(&self, s: S, scratch: &mut Scratch) {
        let (dim, count) = (self.pages.head_dim, self.count());
        let saved = self.batch.saved;
        scratch.queries.resize(count * dim, 0.0);
        scratch.gradients.resize(count * dim, 0.0);
        scratch.weights.resize(count, [ZERO; CHUNK_BLOCKS]);
        scratch.slopes.resize(count, [ZERO; CHUNK_BLOCKS]);
        scratch.by_q.clear();
        scratch.by_q.resize(count * dim.div_ceil(LANES), ZERO);
        scratch.log_sums.clear();
        scratch.log_sums.extend((0..count).map(|m| saved.log_sums[self.number(m)]));
        scratch.deltas.clear();
        for m in 0..count {
            scratch.deltas.push(dot(s, self.row(saved.gradient, m), self.row(saved.out, m)));
        }
        let scale = 1.0 / (dim as f32).sqrt();
        for tile in tiles_of(&(0..count)) {
            for m in tile.clone() {
                let place = tile.start * dim + m - tile.start;
                let sides = [
                    (&mut scratch.queries, self.row(self.batch.attention.q, m), scale),
                    (&mut scratch.gradients, self.row(saved.gradient, m), 1.0),
                ];
                for (packed, row, scale) in sides {
                    let packed = packed[place..].iter_mut().step_by(tile.len());
                    packed.zip(row).for_each(|(packed, x)| *packed = x * scale);
                }
            }
        }
    }

    /// Takes `tokens` of the chunk that begins at position `start` into account.
    #[inline(always)]
    fn chunk<S: Simd>(&self, s: S, start: usize, tokens: Range<usize>, scratch: &mut Scratch) {
        let chunk = Chunk::new(self, start, tokens);
        for tile in tiles_of(&(0..self.count())) {
            match tile.len() {
                1 => chunk.tile::<S, 1>(s, tile, scratch),
                2 => chunk.tile::<S, 2>(s, tile, scratch),
                3 => chunk.tile::<S, 3>(s, tile, scratch),
                4 => chunk.tile::<S, 4>(s, tile, scratch),
                5 => chunk.tile::<S, 5>(s, tile, scratch),
                _ => chunk.tile::<S, 6>(s, tile, scratch),
            }
        }
        let lines = self.pages.head_dim.div_ceil(LANES);
        let place = start * lines..(start + CHUNK) * lines;
        let Scratch { weights, slopes, by_k, by_v, .. } = scratch;
        let gradient = |m: usize| self.row(self.batch.saved.gradient, m);
        let query = |m: usize| self.row(self.batch.attention.q, m);
        let keys = chunk.tokens.clone();
        let count = self.count();
        tiles::scatter(s, &weights[..count], (&gradient, keys.clone()), &mut by_v[place.clone()]);
        tiles::scatter(s, &slopes[..count], (&query, keys), &mut by_k[place]);
    }
}

/// Some tokens of a sequence.
struct Chunk<'a> {
    queries: &'a Queries<'a>,
    /// Position of the first token.
    start: usize,
    /// Tokens that some row sees.
    tokens: Range<usize>,
    keys: [&'a [f32]; CHUNK_BLOCKS],
    keys_turned: [&'a [[f32; BLOCK]]; CHUNK_BLOCKS],
    values_turned: [&'a [[f32; BLOCK]]; CHUNK_BLOCKS],
}

impl<'a> Chunk<'a> {
    #[inline(always)]
    fn new(queries: &'a Queries<'a>, start: usize, tokens: Range<usize>) -> Self {
        let mut chunk = Self {
            queries,
            start,
            tokens: tokens.clone(),
            keys: [&[]; CHUNK_BLOCKS],
            keys_turned: [&[]; CHUNK_BLOCKS],
            values_turned: [&[]; CHUNK_BLOCKS],
        };
        for b in tokens.start / BLOCK..tokens.end.div_ceil(BLOCK) {
            let block = queries.sequence.blocks[start / BLOCK + b];
            chunk.keys[b] = queries.turned.values_of(block, queries.head);
            chunk.keys_turned[b] = queries.pages.keys_of(block, queries.head);
            chunk.values_turned[b] = queries.turned.keys_of(block, queries.head);
        }
        chunk
    }

    /// The tokens that query row `m` sees.
    #[inline(always)]
    fn visible(&self, m: usize) -> Range<usize> {
        let end = self.queries.position + m / self.queries.group + 1;
        let first = end.saturating_sub(self.queries.window);
        first.saturating_sub(self.start)..end.saturating_sub(self.start).min(CHUNK)
    }

    /// `P` and `dS` of the `M` rows `tile`, and what they add to `dQ`.
    #[inline(always)]
    fn tile<S: Simd, const M: usize>(&self, s: S, tile: Range<usize>, scratch: &mut Scratch) {
        let dim = self.queries.pages.head_dim;
        let packed = tile.start * dim..tile.end * dim;
        let blocks = self.tokens.start / BLOCK..self.tokens.end.div_ceil(BLOCK);
        let (weights, slopes) =
            (&mut scratch.weights[tile.clone()], &mut scratch.slopes[tile.clone()]);
        let queries = scratch.queries[packed.clone()].as_chunks::<M>().0;
        tiles::score(s, queries, &self.keys_turned[blocks.clone()], (&mut *weights, blocks.start));
        let gradients = scratch.gradients[packed].as_chunks::<M>().0;
        tiles::score(
            s,
            gradients,
            &self.values_turned[blocks.clone()],
            (&mut *slopes, blocks.start),
        );
        for m in 0..M {
            hide(&mut weights[m], self.visible(tile.start + m));
            let log_sum = s.splat(scratch.log_sums[tile.start + m]);
            let delta = s.splat(scratch.deltas[tile.start + m]);
            for b in 0..CHUNK_BLOCKS {
                let weight = exp(s, s.sub(s.load(&weights[m][b].0), log_sum));
                s.store(weight, &mut weights[m][b].0);
                let slope = s.mul(weight, s.sub(s.load(&slopes[m][b].0), delta));
                s.store(slope, &mut slopes[m][b].0);
            }
        }
        let keys = Values { blocks: &self.keys, tokens: self.tokens.clone(), head_dim: dim };
        let lines = dim.div_ceil(LANES);
        let sums = &mut scratch.by_q[tile.start * lines..tile.end * lines];
        tiles::accumulate::<S, M>(s, (&*slopes, &Line([1.0; LANES])), &keys, sums);
    }
}

/// The sum of products.
#[inline(always)]
fn dot<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = s.splat(0.0);
    for (a, b) in a.iter().zip(b) {
        sums = s.mul_add(s.load(a), s.load(b), sums);
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    s.to_array(sums).iter().sum::<f32>() + rest
}

/// Writes the gradients by the keys and values of a sequence's own rows, and clears their places;
/// a prompt's own are part of its share.
fn write_own(batch: &Batch, item: &Item, sequence: &Sequence, scratch: &mut Scratch) {
    let (dim, kv_heads) = (batch.attention.head_dim, batch.attention.kv_heads);
    if sequence.first_position == 0 {
        return;
    }
    let lines = dim.div_ceil(LANES);
    let scale = 1.0 / (dim as f32).sqrt();
    let sides = [(&mut scratch.by_k, &batch.by_k, scale), (&mut scratch.by_v, &batch.by_v, 1.0)];
    for (sums, by, scale) in sides {
        let sums = &mut sums[sequence.first_position * lines..sequence.len() * lines];
        for (row, sums) in sequence.rows.clone().zip(sums.chunks_exact_mut(lines)) {
            // SAFETY: each row and head of a tail belongs to one item, and each item is run once.
            let by = unsafe { by.part((row * kv_heads + item.head) * dim, dim) };
            by.iter_mut().zip(Line::flatten(sums)).for_each(|(to, x)| *to = x * scale);
            sums.fill(ZERO);
        }
    }
}

/// Writes the item's share of the gradients by its prompt's keys and values.
fn write_share(batch: &Batch, item: &Item, scratch: &Scratch) {
    let dim = batch.attention.head_dim;
    let lines = dim.div_ceil(LANES);
    let scale = 1.0 / (dim as f32).sqrt();
    // SAFETY: the share of one item, which is run once.
    let share = unsafe { batch.shares.part(item.share, 2 * item.prompt * dim) };
    let (by_k, by_v) = share.split_at_mut(item.prompt * dim);
    for (by, sums, scale) in [(by_k, &scratch.by_k, scale), (by_v, &scratch.by_v, 1.0)] {
        for (by, sums) in by.chunks_exact_mut(dim).zip(sums.chunks_exact(lines)) {
            by.iter_mut().zip(Line::flatten(sums)).for_each(|(to, x)| *to = x * scale);
        }
    }
}
