//! The two ways to attend: over packed groups with gradients, or over pages.

use crate::{
    kernels::attention::{Span, paged_attention},
    kv_cache::KvCache,
    torch::slices::{floats, floats_mut},
};
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// How the rows of a batch attend to each other.
pub enum Attention<'a> {
    /// Rows of packed groups attend to what stands before them in their own sequence.
    Causal(&'a Pack),
    /// Rows attend to the pages of their sequences, their own K and V among them.
    Paged(PagedBatch<'a>),
}

/// One engine step: which rows belong to which sequence, and where their K and V go.
pub struct PagedBatch<'a> {
    /// The pages.
    pub cache: &'a mut KvCache,
    /// Rows, first position and block table of each sequence.
    pub spans: Vec<Span<'a>>,
    /// Slot of each row: block times block size plus offset.
    pub slots: Vec<u32>,
}

/// The layer that attention is computed for.
#[derive(Debug, Clone, Copy)]
pub struct LayerShape {
    /// Number of the layer.
    pub index: usize,
    /// Positions that a row sees, its own included; all before it if none.
    pub window: Option<usize>,
}

impl Attention<'_> {
    /// Attends with `q` `[N, heads, head_dim]`, `k` and `v` `[N, kv_heads, head_dim]`, already
    /// rotated; scale is `1 / sqrt(head_dim)`. Returns `[N, heads * head_dim]`.
    pub fn attend(&mut self, q: &Tensor, k: &Tensor, v: &Tensor, layer: LayerShape) -> Tensor {
        match self {
            Attention::Causal(pack) => pack.attend(q, k, v, layer.window),
            Attention::Paged(batch) => batch.attend(q, k, v, layer),
        }
    }
}

impl PagedBatch<'_> {
    fn attend(&mut self, q: &Tensor, k: &Tensor, v: &Tensor, layer: LayerShape) -> Tensor {
        let (q, k, v) = (q.contiguous(), k.contiguous(), v.contiguous());
        self.cache.write(layer.index, floats(&k), floats(&v), &self.slots);
        let (rows, heads, head_dim) = q.size3().expect("q has three axes");
        let mut out = Tensor::empty([rows, heads * head_dim], (Kind::Float, Device::Cpu));
        let pages = self.cache.pages(layer.index);
        paged_attention(floats(&q), floats_mut(&mut out), &pages, &self.spans, layer.window);
        out
    }
}

/// One prompt and the tails (response tokens) that continue it, as rows of a pack. The prompt's
/// rows come first, the tails follow one after the other without gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedGroup {
    /// Rows of the prompt; at least one.
    pub prompt: Range<usize>,
    /// Length of each tail in rows; may be 0.
    pub tails: Vec<usize>,
}

impl PackedGroup {
    /// First row of tail `index`.
    pub fn tail_start(&self, index: usize) -> usize {
        self.prompt.end + self.tails[..index].iter().sum::<usize>()
    }
}

/// Groups packed into one batch without padding. A prompt stands once, however many tails it has:
/// each tail attends to the prompt and to itself.
#[derive(Debug, Default)]
pub struct Pack {
    tokens: Vec<i64>,
    positions: Vec<i64>,
    groups: Vec<PackedGroup>,
}

impl Pack {
    /// Appends a group and returns where its rows are.
    pub fn push(&mut self, prompt: &[u32], tails: &[&[u32]]) -> &PackedGroup {
        let start = self.tokens.len();
        let mut append = |tokens: &[u32], first: usize| {
            self.tokens.extend(tokens.iter().map(|&token| i64::from(token)));
            self.positions.extend((first..first + tokens.len()).map(|p| p as i64));
        };
        append(prompt, 0);
        tails.iter().for_each(|tail| append(tail, prompt.len()));
        self.groups.push(PackedGroup {
            prompt: start..start + prompt.len(),
            tails: tails.iter().map(|tail| tail.len()).collect(),
        });
        &self.groups[self.groups.len() - 1]
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// True if nothing was pushed.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Token ids, `[N]`, i64.
    pub fn tokens(&self) -> Tensor {
        Tensor::from_slice(&self.tokens)
    }

    /// Positions, `[N]`, i64.
    pub fn positions(&self) -> Tensor {
        Tensor::from_slice(&self.positions)
    }

    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, window: Option<usize>) -> Tensor {
        let parts: Vec<Tensor> = self
            .groups
            .iter()
            .flat_map(|group| attend_group(&Rows { q, k, v }, group, window))
            .collect();
        Tensor::cat(&parts, 0)
    }
}

/// Queries, keys and values of all rows, `[N, heads, head_dim]`.
struct Rows<'a> {
    q: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
}

/// Outputs of the prompt's rows and of the tails' rows, in row order, `[rows, heads * head_dim]`.
fn attend_group(rows: &Rows<'_>, group: &PackedGroup, window: Option<usize>) -> Vec<Tensor> {
    let prompt_len = group.prompt.len() as i64;
    let narrow = |t: &Tensor| t.narrow(0, group.prompt.start as i64, prompt_len).unsqueeze(0);
    let (prompt_k, prompt_v) = (narrow(rows.k), narrow(rows.v));
    let mask = causal_mask(prompt_len, prompt_len, window);
    let mut outputs =
        vec![grouped_sdpa(&narrow(rows.q), &prompt_k, &prompt_v, &mask).squeeze_dim(0)];
    let longest = group.tails.iter().copied().max().unwrap_or(0) as i64;
    if longest > 0 {
        let samples = group.tails.len() as i64;
        let (padded, real) = tail_indices(group, longest as usize);
        let gather = |t: &Tensor| {
            let (_, heads, head_dim) = t.size3().expect("rows have three axes");
            t.index_select(0, &padded).view([samples, longest, heads, head_dim])
        };
        let with_prompt = |prompt: &Tensor, tail: &Tensor| {
            let (_, p, heads, head_dim) = prompt.size4().expect("a prompt has four axes");
            Tensor::cat(&[&prompt.expand([samples, p, heads, head_dim], false), tail], 1)
        };
        let k = with_prompt(&prompt_k, &gather(rows.k));
        let v = with_prompt(&prompt_v, &gather(rows.v));
        let mask = causal_mask(longest, prompt_len + longest, window);
        let out = grouped_sdpa(&gather(rows.q), &k, &v, &mask);
        outputs.push(out.flatten(0, 1).index_select(0, &real));
    }
    outputs
}

/// For tails padded to `longest`: the row that each padded place is filled from (padding repeats
/// a row; nothing real attends to it), and the padded places that are real.
fn tail_indices(group: &PackedGroup, longest: usize) -> (Tensor, Tensor) {
    let (mut padded, mut real) = (Vec::new(), Vec::new());
    for (sample, &len) in group.tails.iter().enumerate() {
        let start = group.tail_start(sample);
        for place in 0..longest {
            padded.push(if place < len { start + place } else { group.prompt.start } as i64);
            if place < len {
                real.push((sample * longest + place) as i64);
            }
        }
    }
    (Tensor::from_slice(&padded), Tensor::from_slice(&real))
}

/// `[rows, columns]`, true where row `r` (the last `rows` positions of `columns`) may look.
fn causal_mask(rows: i64, columns: i64, window: Option<usize>) -> Tensor {
    let full = Tensor::ones([rows, columns], (Kind::Bool, Device::Cpu));
    let seen = full.tril(columns - rows);
    match window {
        Some(window) => seen.triu(columns - rows - window as i64 + 1),
        None => seen,
    }
}

/// Scaled dot-product attention, `q` `[B, R, heads, d]`, `k` and `v` `[B, C, kv_heads, d]`, `mask`
/// `[R, C]`; returns `[B, R, heads * d]`. The query heads of one KV head become more rows of it,
/// so that K and V are never repeated.
fn grouped_sdpa(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Tensor {
    let (batch, rows, heads, head_dim) = q.size4().expect("q has four axes");
    let kv_heads = k.size()[2];
    let per_kv = heads / kv_heads;
    let q = q.view([batch, rows, kv_heads, per_kv, head_dim]).permute([0, 2, 3, 1, 4]).reshape([
        batch,
        kv_heads,
        per_kv * rows,
        head_dim,
    ]);
    let out = Tensor::scaled_dot_product_attention(
        &q,
        &k.transpose(1, 2),
        &v.transpose(1, 2),
        Some(mask.repeat([per_kv, 1])),
        0.0,
        false,
        None,
        false,
    );
    out.view([batch, kv_heads, per_kv, rows, head_dim]).permute([0, 3, 1, 2, 4]).reshape([
        batch,
        rows,
        heads * head_dim,
    ])
}
