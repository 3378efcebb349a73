//! Attention over pages in tensor operations, on any device: what a kernel of the device's own is
//! measured against, and what computes where it has none.

use super::{upload, varlen::causal};
use crate::{block_manager::BLOCK_SIZE, kernels::attention::Span};
use std::ops::Range;
use tch::{Device, Kind, Tensor};

const BLOCK: i64 = BLOCK_SIZE as i64;

/// Which rows belong to which sequence, and which pages these have.
#[derive(Debug)]
pub struct PagedPlan {
    /// Blocks of each span, i32 `[spans, max_blocks]`; 0 where a span has fewer.
    pub block_table: Tensor,
    /// Position of each row in its sequence, i32 `[N]`.
    pub row_position: Tensor,
    /// Where K and V of each row go: block times [`BLOCK_SIZE`] plus offset, i64 `[N]`.
    pub slots: Tensor,
    /// Rows and length of each span, in the order of the rows, known to the host.
    pub spans: Vec<SpanShape>,
}

/// Consecutive rows of one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpanShape {
    /// Rows of `q`.
    pub rows: Range<usize>,
    /// Tokens that the last of them sees, if there is no window.
    pub context: usize,
}

/// Attention of rows over pages; `Plan` is that of what computes it.
#[derive(Debug)]
pub struct Paged<'a, Plan> {
    /// `[N, heads, head_dim]`
    pub q: &'a Tensor,
    /// `[num_blocks, kv_heads, BLOCK_SIZE, head_dim]`
    pub k_pages: &'a Tensor,
    /// As `k_pages`.
    pub v_pages: &'a Tensor,
    /// Which rows read which pages.
    pub plan: &'a Plan,
    /// Factor of the products of `q` and `k`.
    pub scale: f64,
    /// Positions that a row sees, its own included; all before it if none.
    pub window: Option<usize>,
}

impl PagedPlan {
    /// The plan of `spans`, which cover the rows in order, and the slots of the rows; one copy to
    /// the device for each type of number.
    pub fn new(spans: &[Span<'_>], slots: Tensor, device: Device) -> Self {
        let shape = |span: &Span<'_>| SpanShape {
            rows: span.rows.clone(),
            context: span.first_position + span.rows.len(),
        };
        let shapes: Vec<SpanShape> = spans.iter().map(shape).collect();
        let width = shapes.iter().map(|s| s.context.div_ceil(BLOCK_SIZE)).max().unwrap_or(0);
        let rows = shapes.last().map_or(0, |span| span.rows.end);
        let mut numbers = Vec::with_capacity(spans.len() * width + rows);
        for (span, shape) in spans.iter().zip(&shapes) {
            let blocks = &span.blocks[..shape.context.div_ceil(BLOCK_SIZE)];
            numbers.extend(blocks.iter().map(|&block| block as i32));
            numbers.resize(numbers.len() + width - blocks.len(), 0);
        }
        for span in spans {
            numbers.extend((0..span.rows.len()).map(|row| (span.first_position + row) as i32));
        }
        let (numbers, table) = (upload(&numbers, device), (spans.len() * width) as i64);
        Self {
            block_table: numbers.narrow(0, 0, table).view([spans.len() as i64, width as i64]),
            row_position: numbers.narrow(0, table, rows as i64),
            slots,
            spans: shapes,
        }
    }

    /// Tokens of the longest span.
    pub fn longest(&self) -> usize {
        self.spans.iter().map(|span| span.context).max().unwrap_or(0)
    }
}

/// Stores K and V rows, `[N, kv_heads, head_dim]` each, in their slots.
pub fn write_kv(k: &Tensor, v: &Tensor, k_pages: &Tensor, v_pages: &Tensor, plan: &PagedPlan) {
    let block = plan.slots.divide_scalar_mode(BLOCK, "floor");
    let offset = plan.slots.remainder(BLOCK);
    let places = [Some(&block), Some(&offset)];
    for (rows, pages) in [(k, k_pages), (v, v_pages)] {
        let _ = pages.transpose(1, 2).index_put_(&places, rows, false);
    }
}

/// Attends; the rows' own K and V are in the pages. `[N, heads * head_dim]`.
///
/// # Panics
/// If a shape does not fit.
pub fn attend(paged: &Paged<'_, PagedPlan>) -> Tensor {
    let (rows, heads, head_dim) = paged.q.size3().expect("q has three axes");
    let out = if paged.plan.spans.iter().all(|span| span.rows.len() == 1) {
        attend_single_rows(paged)
    } else {
        let spans = paged.plan.spans.iter().enumerate();
        let outputs = spans.map(|(index, span)| attend_span(paged, index, span));
        Tensor::cat(&outputs.collect::<Vec<_>>(), 0)
    };
    out.reshape([rows, heads * head_dim])
}

/// Pages of some spans' blocks (`[spans, blocks]`) as `[spans, kv_heads, tokens, head_dim]`, as many
/// tokens as are asked for.
fn gather(pages: &Tensor, blocks: &Tensor, tokens: usize) -> Tensor {
    let (spans, width) = blocks.size2().expect("a table has two axes");
    let (_, kv_heads, _, head_dim) = pages.size4().expect("pages have four axes");
    let gathered = pages.index_select(0, &blocks.flatten(0, 1));
    let gathered = gathered.view([spans, width, kv_heads, BLOCK, head_dim]).transpose(1, 2);
    gathered.reshape([spans, kv_heads, width * BLOCK, head_dim]).narrow(2, 0, tokens as i64)
}

/// Scores that are in memory at a time, where libtorch writes them.
const SCORES: i64 = if cfg!(test) { 600 } else { 1 << 27 };

/// Several rows of one sequence, `[n, heads, head_dim]`.
fn attend_span(paged: &Paged<'_, PagedPlan>, index: usize, span: &SpanShape) -> Tensor {
    let q = paged.q.narrow(0, span.rows.start as i64, span.rows.len() as i64);
    let width = span.context.div_ceil(BLOCK_SIZE) as i64;
    let blocks = paged.plan.block_table.narrow(0, index as i64, 1).narrow(1, 0, width);
    let [k, v] = [paged.k_pages, paged.v_pages]
        .map(|pages| gather(pages, &blocks, span.context).squeeze_dim(0).transpose(0, 1));
    let (rows, heads, _) = q.size3().expect("q has three axes");
    let before = span.context as i64 - rows;
    let most = (SCORES / (heads * span.context as i64)).max(1);
    let parts = (0..rows).step_by(most as usize).map(|first| {
        let count = most.min(rows - first);
        let [k, v] = [&k, &v].map(|x| x.narrow(0, 0, before + first + count));
        causal([&q.narrow(0, first, count), &k, &v], paged.window, Some(paged.scale))
    });
    Tensor::cat(&parts.collect::<Vec<_>>(), 0)
}

/// Tokens whose K and V are in memory at a time, where every sequence has one row: libtorch may widen them, and
/// repeat them for every head.
const GATHERED: usize = if cfg!(test) { 200 } else { 1 << 14 };

/// One row of each sequence, `[N, heads, 1, head_dim]`.
fn attend_single_rows(paged: &Paged<'_, PagedPlan>) -> Tensor {
    let spans = &paged.plan.spans;
    let (mut parts, mut start) = (Vec::new(), 0);
    while start < spans.len() {
        let mut longest = 0;
        let fits = |(index, span): &(usize, &SpanShape)| {
            longest = longest.max(span.context);
            *index == 0 || (index + 1) * longest <= GATHERED
        };
        let count = spans[start..].iter().enumerate().take_while(fits).count();
        parts.push(attend_rows(paged, start..start + count));
        start += count;
    }
    Tensor::cat(&parts, 0)
}

/// Some of them.
fn attend_rows(paged: &Paged<'_, PagedPlan>, rows: Range<usize>) -> Tensor {
    let tokens = paged.plan.spans[rows.clone()].iter().map(|span| span.context).max().unwrap_or(0);
    let some = |tensor: &Tensor| tensor.narrow(0, rows.start as i64, rows.len() as i64);
    let width = tokens.div_ceil(BLOCK_SIZE) as i64;
    let blocks = some(&paged.plan.block_table).narrow(1, 0, width);
    let [k, v] = [paged.k_pages, paged.v_pages].map(|pages| gather(pages, &blocks, tokens));
    let token = Tensor::arange(tokens as i64, (Kind::Int, paged.q.device())).unsqueeze(0);
    let position = some(&paged.plan.row_position).unsqueeze(1);
    let mut hidden = token.gt_tensor(&position);
    if let Some(window) = paged.window {
        hidden = hidden.logical_or(&token.le_tensor(&(position - window as i64)));
    }
    // What lies behind the end of a sequence may be anything, and no number stays none.
    let unread = hidden.view([-1, 1, tokens as i64, 1]);
    let [k, v] = [k, v].map(|mut x| x.masked_fill_(&unread, 0.0));
    let seen = hidden.logical_not().view([-1, 1, 1, tokens as i64]);
    let q = some(paged.q).unsqueeze(2);
    let scale = Some(paged.scale);
    Tensor::scaled_dot_product_attention(&q, &k, &v, Some(seen), 0.0, false, scale, true)
}

#[cfg(test)]
mod tests;
