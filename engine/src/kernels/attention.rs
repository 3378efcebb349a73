//! Attention of query rows over the pages of their sequences.
//!
//! The work is cut into items (see `items`): one KV head of some rows, with all query heads of that
//! KV head. An item walks over the tokens in chunks and keeps, per query row, a running maximum, a
//! running sum and the weighted values so far (the online softmax of arXiv 1805.02867), so that no
//! row of scores is ever whole. Rows of several sequences that begin with the same blocks, as the
//! samples of a group do, first walk over these blocks together, then each over its own. Chunks lie
//! at fixed positions of the sequence, and every row meets them in order: its output is bitwise the
//! same whatever else is in the batch, however a prompt is cut, and whatever is shared.

mod items;
mod stretch;

use std::cell::RefCell;
use std::ops::Range;

use self::items::{Item, items};
use self::stretch::Stretch;
pub(super) use self::stretch::hide;
use super::disjoint::Shared;
pub use super::pages::{BLOCK, Pages, PagesMut, copy_block, write_pages};
use super::parallel::for_each;
use super::simd::{Kernel, LANES, Level, Line, Simd};
use super::tiles::{CHUNK, CHUNK_BLOCKS, MAX_ROWS, Running, Scores};

/// Query rows of one sequence, at consecutive positions.
#[derive(Debug, Clone)]
pub struct Span<'a> {
    /// Rows of `q`.
    pub rows: Range<usize>,
    /// Position of the first row; row `i` of the span attends to positions up to
    /// `first_position + i`.
    pub first_position: usize,
    /// The sequence's block table.
    pub blocks: &'a [u32],
}

/// Attention with scale `1 / sqrt(head_dim)`; `q` and `out` are `[rows, heads, head_dim]`. The
/// query heads of KV head `h` are those from `h * heads / kv_heads` on. With a window `w`,
/// position `p` sees positions `p - w + 1 ..= p`.
///
/// # Panics
/// If shapes do not fit, if the spans do not cover the rows in order, or if a block table is too
/// short or names a block outside of the pages.
pub fn paged_attention(
    q: &[f32],
    out: &mut [f32],
    pages: &Pages,
    spans: &[Span],
    window: Option<usize>,
) {
    attend(Level::best(), &Batch::new(q, pages, spans, window), out, None);
}

/// As [`paged_attention`]; the logarithm of the sum of exponentials of every row's scores goes to
/// the second part of `out`, `[rows, heads]`.
///
/// # Panics
/// As [`paged_attention`].
pub fn paged_attention_with_sums(
    q: &[f32],
    (out, log_sums): (&mut [f32], &mut [f32]),
    pages: &Pages,
    spans: &[Span],
    window: Option<usize>,
) {
    attend(Level::best(), &Batch::new(q, pages, spans, window), out, Some(log_sums));
}

/// The arguments, checked.
struct Batch<'a> {
    q: &'a [f32],
    pages: &'a Pages<'a>,
    spans: &'a [Span<'a>],
    window: usize,
    /// Query heads per KV head.
    group: usize,
}

impl<'a> Batch<'a> {
    fn new(
        q: &'a [f32],
        pages: &'a Pages<'a>,
        spans: &'a [Span<'a>],
        window: Option<usize>,
    ) -> Self {
        pages.check();
        let rows = check_spans(spans, pages.num_blocks());
        let kv_len = rows * pages.kv_heads * pages.head_dim;
        assert!(
            (rows == 0 && q.is_empty()) || (kv_len > 0 && q.len().is_multiple_of(kv_len)),
            "q must be [rows, heads, head_dim] with rows as in the spans and heads a multiple of \
             kv_heads"
        );
        assert_ne!(window, Some(0), "a window sees at least one position");
        let group = q.len().checked_div(kv_len).unwrap_or(0);
        Self { q, pages, spans, window: window.unwrap_or(usize::MAX), group }
    }

    /// Where the rows of the group of `head` lie in `q` and `out`, at row `row`.
    fn group_rows(&self, row: usize, head: usize) -> Range<usize> {
        let len = self.group * self.pages.head_dim;
        let start = (row * self.pages.kv_heads + head) * len;
        start..start + len
    }
}

/// Checks rows and block tables; returns the number of rows.
fn check_spans(spans: &[Span], num_blocks: usize) -> usize {
    let mut rows = 0;
    for span in spans {
        assert_eq!(span.rows.start, rows, "the spans must cover the rows in order");
        assert!(span.rows.end >= rows, "a span's rows end before they start");
        rows = span.rows.end;
        let needed = (span.first_position + span.rows.len()).div_ceil(BLOCK);
        assert!(span.blocks.len() >= needed, "a block table is too short for its span");
        assert!(
            span.blocks[..needed].iter().all(|&block| (block as usize) < num_blocks),
            "a block table names a block outside of the pages"
        );
    }
    rows
}

fn attend(level: Level, batch: &Batch, out: &mut [f32], log_sums: Option<&mut [f32]>) {
    assert_eq!(out.len(), batch.q.len(), "out has the shape of q");
    let rows_and_heads = batch.q.len() / batch.pages.head_dim;
    if let Some(log_sums) = &log_sums {
        assert_eq!(log_sums.len(), rows_and_heads, "a sum for every row and head");
    }
    let parts = items::cut(batch);
    let items = items(batch, &parts);
    let out = Shared::new(out);
    let log_sums = log_sums.map(Shared::new);
    let (runs, run) = items::runs(&items);
    for_each(runs, &|i| {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut items = items[i * run..].iter().take(run).peekable();
            while let Some(item) = items.next() {
                let next = items.peek().copied();
                level.run(Attend { batch, item, next, scratch: &mut *scratch });
                scratch.write(batch, item, &out);
                if let Some(log_sums) = &log_sums {
                    scratch.write_sums(batch, item, log_sums);
                }
            }
        });
    });
}

/// What an item works on; kept from item to item by each thread.
struct Scratch {
    /// The scaled queries of the stretch in work: per tile of `M` rows `[head_dim][M]`.
    queries: Vec<f32>,
    scores: [Scores; MAX_ROWS],
    /// One per row.
    running: Vec<Running>,
    /// Weighted values: per row `head_dim` floats in whole lines.
    sums: Vec<Line>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const {
        RefCell::new(Scratch {
            queries: Vec::new(),
            scores: [[Line([0.0; LANES]); CHUNK_BLOCKS]; MAX_ROWS],
            running: Vec::new(),
            sums: Vec::new(),
        })
    };
}

impl Scratch {
    /// Makes room for an item's rows, none of which has seen a token.
    fn start(&mut self, batch: &Batch, item: &Item) {
        let rows = item.rows().len() * batch.group;
        self.running.clear();
        self.running.resize(rows, Running::START);
        self.sums.clear();
        self.sums.resize(rows * batch.pages.head_dim.div_ceil(LANES), Line([0.0; LANES]));
        self.queries.resize(rows * batch.pages.head_dim, 0.0);
    }

    /// Packs the queries of a stretch's rows.
    fn pack(&mut self, stretch: &Stretch) {
        let (batch, item) = (stretch.batch, stretch.item);
        let dim = batch.pages.head_dim;
        let scale = 1.0 / (dim as f32).sqrt();
        for tile in tiles_of(&stretch.rows) {
            let packed = &mut self.queries[tile.start * dim..tile.end * dim];
            for (m, row) in tile.clone().enumerate() {
                let group = batch.group_rows(item.rows().start + row / batch.group, item.head);
                let query = &batch.q[group][row % batch.group * dim..][..dim];
                let packed = packed[m..].iter_mut().step_by(tile.len());
                packed.zip(query).for_each(|(packed, x)| *packed = x * scale);
            }
        }
    }

    /// Divides by the sums and writes the item's rows of `out`.
    fn write(&self, batch: &Batch, item: &Item, out: &Shared<f32>) {
        let dim = batch.pages.head_dim;
        let sums = self.sums.chunks_exact(dim.div_ceil(LANES));
        let mut rows = sums.zip(self.running.iter().map(|running| 1.0 / running.sum()));
        for row in item.rows() {
            let group = batch.group_rows(row, item.head);
            // SAFETY: each row and head belongs to one item, and each item is run once.
            let out = unsafe { out.part(group.start, group.len()) };
            for (out, (sums, factor)) in out.chunks_exact_mut(dim).zip(&mut rows) {
                let sums = sums.iter().flat_map(|line| &line.0);
                out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum * factor);
            }
        }
    }

    /// Writes the logarithms of the item's sums.
    fn write_sums(&self, batch: &Batch, item: &Item, log_sums: &Shared<f32>) {
        let mut sums = self.running.iter().map(Running::log_sum);
        for row in item.rows() {
            let start = (row * batch.pages.kv_heads + item.head) * batch.group;
            // SAFETY: each row and head belongs to one item, and each item is run once.
            let place = unsafe { log_sums.part(start, batch.group) };
            place.iter_mut().zip(&mut sums).for_each(|(place, sum)| *place = sum);
        }
    }
}

/// Cuts rows into tiles of at most [`MAX_ROWS`], about equal ones.
pub(super) fn tiles_of(rows: &Range<usize>) -> impl ExactSizeIterator<Item = Range<usize>> + use<> {
    let (first, rows) = (rows.start, rows.len());
    let count = rows.div_ceil(MAX_ROWS);
    (0..count).map(move |i| first + i * rows / count..first + (i + 1) * rows / count)
}

/// Runs one item up to the division by the sums.
struct Attend<'a> {
    batch: &'a Batch<'a>,
    item: &'a Item<'a>,
    /// What this thread does afterwards, if that is known.
    next: Option<&'a Item<'a>>,
    scratch: &'a mut Scratch,
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { batch, item, next, scratch } = self;
        scratch.start(batch, item);
        let (mut index, mut stretch) = (0, Stretch::nth(batch, item, 0));
        while let Some(current) = stretch {
            index += 1;
            stretch = Stretch::nth(batch, item, index);
            let first_of_next = || next.and_then(|item| Stretch::nth(batch, item, 0));
            let ahead = stretch.as_ref().map(Stretch::first_chunk);
            let ahead = ahead.or_else(|| first_of_next().map(|next| next.first_chunk()));
            current.attend(s, scratch, ahead.unwrap_or((&[], 0)));
        }
    }
}

#[cfg(test)]
mod tests;
