//! The tensors that a step of the engine is described by, on the device.

use super::{
    attention::{Paged, PagedPlan, attend, write_kv},
    upload,
    varlen::{Varlen, varlen_attention},
};
use crate::{
    block_manager::BLOCK_SIZE,
    cuda::{CudaError, attention as kernel, plan::Machine},
    kernels::attention::Span,
    model::rope::Turn,
};
use tch::{Device, Kind, Tensor};

/// The rows of a step, as the host gathers them; one for each token.
#[derive(Debug, Default)]
pub struct StepRows<'a> {
    /// Token of each row.
    pub tokens: Vec<i64>,
    /// Position of each row in its sequence.
    pub positions: Vec<i64>,
    /// Slot of each row: block times block size plus offset.
    pub slots: Vec<u32>,
    /// Rows, first position and block table of each sequence, in the order of the rows.
    pub spans: Vec<Span<'a>>,
    /// Rows that tokens are drawn from.
    pub sampled: Vec<i64>,
    /// Rows whose tokens only the device knows yet.
    pub unknown: Unknown,
}

/// Rows of a step whose tokens the step before has drawn, and that the host does not know yet.
#[derive(Debug, Default)]
pub struct Unknown {
    /// The rows.
    pub rows: Vec<i64>,
    /// For each, which draw has made its token.
    pub draws: Vec<i64>,
    /// Tokens of all draws of that step, i64, on the device; there if a row is unknown.
    pub drawn: Option<Tensor>,
}

impl Unknown {
    /// Writes the tokens into those of all rows, on the device.
    fn fill_in(&self, tokens: &Tensor) {
        if self.rows.is_empty() {
            return;
        }
        let drawn = self.drawn.as_ref().expect("the tokens of unknown rows");
        let count = self.rows.len() as i64;
        let first = |numbers: &[i64]| numbers.iter().copied().eq(0..count);
        if first(&self.rows) && first(&self.draws) {
            tokens.narrow(0, 0, count).copy_(&drawn.narrow(0, 0, count));
            return;
        }
        let places: Vec<i64> = self.rows.iter().chain(&self.draws).copied().collect();
        let places = upload(&places, tokens.device());
        let drawn = drawn.index_select(0, &places.narrow(0, count, count));
        let _ = tokens.shallow_clone().index_copy_(0, &places.narrow(0, 0, count), &drawn);
    }
}

impl<'a> StepRows<'a> {
    /// Appends a sequence's rows: these tokens, from `first_position` on.
    pub fn push(
        &mut self,
        tokens: impl Iterator<Item = i64>,
        first_position: usize,
        blocks: &'a [u32],
    ) {
        let first = self.tokens.len();
        self.tokens.extend(tokens);
        let rows = first..self.tokens.len();
        let positions = first_position..first_position + rows.len();
        self.positions.extend(positions.clone().map(|position| position as i64));
        self.slots.extend(positions.map(|position| {
            blocks[position / BLOCK_SIZE] * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32
        }));
        self.spans.push(Span { rows, first_position, blocks });
    }

    /// Whether every sequence has one row, all before it in the pages, and draws a token.
    pub fn is_decode(&self) -> bool {
        let decodes = |span: &Span<'_>| span.rows.len() == 1 && span.first_position > 0;
        self.sampled.len() == self.tokens.len() && self.spans.iter().all(decodes)
    }

    fn slots(&self) -> Vec<i64> {
        self.slots.iter().map(|&slot| i64::from(slot)).collect()
    }
}

/// The same on a device.
#[derive(Debug)]
pub struct StepPlan {
    /// i64 `[N]`
    pub tokens: Tensor,
    /// i64 `[N]`
    pub positions: Tensor,
    /// i64 `[rows that are drawn from]`
    pub sampled: Tensor,
    /// Which rows read and write which pages.
    paged: Paging,
    /// The sequences, if all of them begin in this step: then their pages need not be read.
    prompts: Option<Varlen>,
}

/// The same, for what computes with it.
#[derive(Debug)]
enum Paging {
    /// Kernels of our own, on a CUDA device.
    Kernels(kernel::PagedPlan),
    /// Tensor operations, anywhere.
    Operations(PagedPlan),
}

impl StepPlan {
    /// Brings the rows to `device`; attention is by kernels of our own if `machine` is given, which
    /// says for what device and heads.
    pub fn new(rows: &StepRows<'_>, device: Device, machine: Option<Machine>) -> Self {
        let slots = rows.slots();
        let (spans, sampled) = (&rows.spans, upload(&rows.sampled, device));
        let plan = match machine {
            Some(machine) => {
                let tokens_and_slots = [&rows.tokens[..], &slots];
                let plan = kernel::PagedPlan::new(spans, tokens_and_slots, machine, device);
                Self::of_kernels(plan, sampled)
            }
            None => {
                let numbers = [&rows.tokens[..], &rows.positions, &slots].concat();
                let numbers = upload(&numbers, device).view([3, -1]);
                Self {
                    tokens: numbers.get(0),
                    positions: numbers.get(1),
                    sampled,
                    paged: Paging::Operations(PagedPlan::new(spans, numbers.get(2), device)),
                    prompts: None,
                }
            }
        };
        rows.unknown.fill_in(&plan.tokens);
        let begins = spans.iter().all(|span| span.first_position == 0);
        let prompts = || Varlen::of_prompts(spans.iter().map(|s| s.rows.clone()), device);
        Self { prompts: begins.then(prompts), ..plan }
    }

    fn of_kernels(plan: kernel::PagedPlan, sampled: Tensor) -> Self {
        let [tokens, positions] = [&plan.tokens, &plan.positions].map(Tensor::shallow_clone);
        Self { tokens, positions, sampled, paged: Paging::Kernels(plan), prompts: None }
    }

    /// A plan for kernels of our own without rows, with room for some: for graphs. Tokens are drawn
    /// from none of them.
    pub fn with_capacity(capacity: kernel::Capacity, machine: Machine, device: Device) -> Self {
        let plan = kernel::PagedPlan::with_capacity(capacity, machine, device);
        Self::of_kernels(plan, Tensor::zeros([0], (Kind::Int64, device)))
    }

    /// Overwrites a plan that was made with room for these rows, where it lies. Rows beyond them are
    /// not in use.
    ///
    /// # Errors
    /// If there is no room, or the plan was made for other rows.
    pub fn refill(&mut self, rows: &StepRows<'_>) -> Result<(), CudaError> {
        let Paging::Kernels(plan) = &mut self.paged else {
            return Err(CudaError::Unsupported("a plan that is not the kernels'".into()));
        };
        plan.refill(&rows.spans, [&rows.tokens, &rows.slots()])?;
        rows.unknown.fill_in(&self.tokens);
        Ok(())
    }

    /// Norms and turns `q` (`[N, heads, head_dim]`) and `k`, writes `k` and `v` (`[N, kv_heads, head_dim]`) of
    /// one layer to their slots, and attends with scale `1 / sqrt(head_dim)`; `[N, heads * head_dim]`.
    ///
    /// # Panics
    /// What a kernel is refused for; `machine` vouched for the shapes.
    pub fn attend(
        &self,
        [q, k, v]: [&Tensor; 3],
        turn: &Turn<'_>,
        (k_pages, v_pages): (&Tensor, &Tensor),
        window: Option<usize>,
    ) -> Tensor {
        let (_, _, head_dim) = q.size3().expect("q has three axes");
        let scale = 1.0 / (head_dim as f64).sqrt();
        let turned = || turn.apply([q, k]);
        match (&self.paged, &self.prompts) {
            (Paging::Kernels(plan), None) => {
                let paged = Paged { q, k_pages, v_pages, plan, scale, window };
                launched(kernel::turn_and_attend(&paged, [k, v], turn))
            }
            (Paging::Kernels(plan), Some(prompts)) => {
                let [q, k] = &turned();
                launched(kernel::write_kv(k, v, k_pages, v_pages, plan));
                varlen_attention([q, k, v], prompts, window)
            }
            (Paging::Operations(plan), prompts) => {
                let [q, k] = &turned();
                write_kv(k, v, k_pages, v_pages, plan);
                match prompts {
                    Some(prompts) => varlen_attention([q, k, v], prompts, window),
                    None => attend(&Paged { q, k_pages, v_pages, plan, scale, window }),
                }
            }
        }
    }
}

/// What a kernel has made. That it takes these shapes was vouched for.
fn launched<T>(made: Result<T, CudaError>) -> T {
    made.unwrap_or_else(|error| panic!("{error}"))
}
