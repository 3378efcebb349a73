//! The ways to attend: over packed groups with gradients, or over pages.

pub use crate::kernels::packed::PackedGroup;
use crate::{
    device::{
        is_native,
        pages::DevicePages,
        plan::StepPlan,
        varlen::{Varlen, varlen_attention},
    },
    kernels::attention::{Span, paged_attention},
    kv_cache::KvCache,
    model::rope::Turn,
    ops::packed_attention::packed_attention,
    profile::{Phase, timed},
    torch::slices::{floats, floats_mut},
};
use std::{cell::OnceCell, sync::Arc};
use tch::{Device, Kind, Tensor};

/// How the rows of a batch attend to each other.
pub enum Attention<'a> {
    /// Rows of packed groups attend to what stands before them in their own sequence.
    Causal(&'a Pack),
    /// Rows attend to the pages of their sequences, their own K and V among them: native tensors.
    Paged(PagedBatch<'a>),
    /// The same for tensors of any device and type.
    OnDevice(DeviceBatch<'a>),
}

/// One engine step over pages on a device.
pub struct DeviceBatch<'a> {
    /// The pages, which are there.
    pub pages: &'a DevicePages,
    /// Which rows read and write which pages.
    pub plan: &'a StepPlan,
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
    /// Attends with `q` `[N, heads, head_dim]` and `k` `[N, kv_heads, head_dim]`, after both are
    /// normed and rotated, and `v` of the shape of `k`; scale is `1 / sqrt(head_dim)`. Returns `[N, heads *
    /// head_dim]`.
    pub fn attend(
        &mut self,
        [q, k, v]: [&Tensor; 3],
        turn: &Turn<'_>,
        layer: LayerShape,
    ) -> Tensor {
        let turned = || turn.apply([q, k]);
        match self {
            Attention::Causal(pack) => {
                let [q, k] = turned();
                timed(Phase::Attention, || pack.attend([&q, &k, v], layer.window))
            }
            Attention::Paged(batch) => {
                let [q, k] = turned();
                timed(Phase::Attention, || batch.attend(&q, &k, v, layer))
            }
            Attention::OnDevice(batch) => timed(Phase::Attention, || {
                let pages = batch.pages.layer(layer.index);
                batch.plan.attend([q, k, v], turn, pages, layer.window)
            }),
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

/// Groups packed into one batch without padding. A prompt stands once, however many tails it has:
/// each tail attends to the prompt and to itself.
#[derive(Debug, Default)]
pub struct Pack {
    tokens: Vec<i64>,
    positions: Vec<i64>,
    groups: Arc<Vec<PackedGroup>>,
    /// The groups' sequences, made for the first layer that asks, on its device.
    varlen: OnceCell<Varlen>,
}

impl Pack {
    /// Attention of the pack's rows, already rotated.
    fn attend(&self, qkv: [&Tensor; 3], window: Option<usize>) -> Tensor {
        match is_native(qkv[0]) {
            true => packed_attention(qkv, &self.groups, window),
            false => varlen_attention(qkv, self.varlen(qkv[0].device()), window),
        }
    }

    /// Appends a group and returns where its rows are.
    pub fn push(&mut self, prompt: &[u32], tails: &[&[u32]]) -> &PackedGroup {
        self.varlen.take();
        let start = self.tokens.len();
        let mut append = |tokens: &[u32], first: usize| {
            self.tokens.extend(tokens.iter().map(|&token| i64::from(token)));
            self.positions.extend((first..first + tokens.len()).map(|p| p as i64));
        };
        append(prompt, 0);
        tails.iter().for_each(|tail| append(tail, prompt.len()));
        Arc::make_mut(&mut self.groups).push(PackedGroup {
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

    fn varlen(&self, device: Device) -> &Varlen {
        self.varlen.get_or_init(|| Varlen::of_groups(&self.groups, device))
    }

    /// The groups.
    pub fn groups(&self) -> &Arc<Vec<PackedGroup>> {
        &self.groups
    }
}
