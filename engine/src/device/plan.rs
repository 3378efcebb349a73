//! The tensors that a step of the engine is described by, brought to the device in two copies.

use super::{
    attention::{Paged, PagedPlan, attend, write_kv},
    upload,
    varlen::{Varlen, varlen_attention},
};
use crate::{
    cuda::{CudaError, attention as kernel, plan::Machine},
    kernels::attention::Span,
    model::rope::Rotation,
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
}

impl StepRows<'_> {
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
        // The kernels' plan has slots of its own.
        let sent = if machine.is_some() { &[][..] } else { &slots };
        let numbers = rows.tokens.iter().chain(&rows.positions).chain(&rows.sampled).chain(sent);
        let numbers: Vec<i64> = numbers.copied().collect();
        let (count, drawn) = (rows.tokens.len() as i64, rows.sampled.len() as i64);
        let numbers = upload(&numbers, device);
        let [tokens, positions] = [0, 1].map(|i| numbers.narrow(0, i * count, count));
        let begins = rows.spans.iter().all(|span| span.first_position == 0);
        let prompts = || Varlen::of_prompts(rows.spans.iter().map(|s| s.rows.clone()), device);
        Self {
            tokens,
            positions,
            sampled: numbers.narrow(0, 2 * count, drawn),
            paged: match machine {
                Some(machine) => {
                    let plan = kernel::PagedPlan::new(&rows.spans, &slots, machine, device);
                    Paging::Kernels(plan)
                }
                None => {
                    let slots = numbers.narrow(0, 2 * count + drawn, count);
                    Paging::Operations(PagedPlan::new(&rows.spans, slots, device))
                }
            },
            prompts: begins.then(prompts),
        }
    }

    /// A plan for kernels of our own without rows, with room for some: for graphs. Tokens are drawn
    /// from none of them.
    pub fn with_capacity(capacity: kernel::Capacity, machine: Machine, device: Device) -> Self {
        let numbers = Tensor::zeros([2, capacity.rows as i64], (Kind::Int64, device));
        let plan = kernel::PagedPlan::with_capacity(capacity, machine, device);
        Self {
            tokens: numbers.get(0),
            positions: numbers.get(1),
            sampled: numbers.flatten(0, 1).narrow(0, 0, 0),
            paged: Paging::Kernels(plan),
            prompts: None,
        }
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
        plan.refill(&rows.spans, &rows.slots())?;
        for (values, own) in [(&rows.tokens, &self.tokens), (&rows.positions, &self.positions)] {
            own.narrow(0, 0, values.len() as i64).copy_(&upload(values, own.device()));
        }
        Ok(())
    }

    /// Turns `q` (`[N, heads, head_dim]`) and `k`, writes `k` and `v` (`[N, kv_heads, head_dim]`) of one
    /// layer to their slots, and attends with scale `1 / sqrt(head_dim)`; `[N, heads * head_dim]`.
    ///
    /// # Panics
    /// What a kernel is refused for; `machine` vouched for the shapes.
    pub fn attend(
        &self,
        [q, k, v]: [&Tensor; 3],
        rotation: &Rotation,
        (k_pages, v_pages): (&Tensor, &Tensor),
        window: Option<usize>,
    ) -> Tensor {
        let (_, _, head_dim) = q.size3().expect("q has three axes");
        let scale = 1.0 / (head_dim as f64).sqrt();
        let turned = || [rotation.apply(q), rotation.apply(k)];
        match (&self.paged, &self.prompts) {
            (Paging::Kernels(plan), None) => {
                let (pages, angles) = ((k_pages, v_pages), rotation.angles());
                let q = &launched(kernel::turn_and_write([q, k, v], angles, pages, plan));
                launched(kernel::attend(&Paged { q, k_pages, v_pages, plan, scale, window }))
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
