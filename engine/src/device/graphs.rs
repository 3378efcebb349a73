//! Decode steps recorded as CUDA graphs, one for each of some sizes of batch: a step then costs one
//! launch, not some hundred, which is what bounds small models and small batches.
//!
//! A batch takes the smallest size that holds it; rows beyond it write nothing and attend to nothing.
//! What changes from step to step lies in a [`StepPlan`] that is filled anew where it lies. A size is
//! recorded when it is first needed: that step runs as it always does, later ones run the graph.

use super::{
    distance,
    pages::DevicePages,
    plan::{StepPlan, StepRows},
};
use crate::{
    cuda::{CudaError, attention::Capacity, launch::overlapping, plan::Machine},
    model::{
        attention::{Attention, DeviceBatch},
        decoder::Decoder,
    },
    profile::{Phase, timed, untimed},
    torch::{
        TorchError,
        graph::{Graph, Pool},
    },
};
use std::collections::BTreeMap;
use tch::{Device, Tensor};

/// Larger batches are bound by arithmetic, not by launches.
const MOST_ROWS: usize = 512;
/// How far a recorded step may be from the same step as it ran, as a part of its largest number: products
/// may be summed in another order.
const SAME: f64 = 1.0 / 16.0;

/// The recorded steps of a model on a device.
pub struct DecodeGraphs {
    device: Device,
    machine: Machine,
    /// Most blocks of a sequence.
    blocks: usize,
    /// Where the tensors of all graphs lie; they never run at the same time.
    pool: Option<Pool>,
    /// By rows.
    steps: BTreeMap<usize, Recorded>,
    /// Steps that ran as a graph.
    runs: u64,
    /// Recording has failed, and is not tried again.
    off: bool,
    /// Kernels of a graph may overlap.
    overlaps: bool,
}

struct Recorded {
    plan: StepPlan,
    replay: Replay,
}

/// What a recorded step does.
enum Replay {
    /// The graph; hidden states, `[size, hidden]`, which each run fills.
    Graph(Graph, Tensor),
    /// The same operations once more.
    #[cfg(test)]
    Again,
}

impl Recorded {
    fn forward(plan: &StepPlan, decoder: &Decoder, pages: &DevicePages) -> Tensor {
        let attention = &mut Attention::OnDevice(DeviceBatch { pages, plan });
        decoder.hidden(&plan.tokens, &plan.positions, attention)
    }

    #[cfg_attr(not(test), expect(unused_variables, reason = "a graph knows them"))]
    fn run(
        &mut self,
        rows: &StepRows<'_>,
        decoder: &Decoder,
        pages: &DevicePages,
    ) -> Result<Tensor, CudaError> {
        self.plan.refill(rows)?;
        match &mut self.replay {
            Replay::Graph(graph, hidden) => {
                timed(Phase::Recorded, || graph.run())?;
                Ok(hidden.shallow_clone())
            }
            #[cfg(test)]
            Replay::Again => Ok(Self::forward(&self.plan, decoder, pages)),
        }
    }
}

/// The size of graph for a batch; none if it is run without one.
fn size_for(rows: usize) -> Option<usize> {
    match rows {
        0 => None,
        1..=8 => Some(rows.next_power_of_two()),
        9..=64 => Some(rows.next_multiple_of(8)),
        65..=256 => Some(rows.next_multiple_of(32)),
        257..=MOST_ROWS => Some(rows.next_multiple_of(64)),
        _ => None,
    }
}

impl DecodeGraphs {
    /// No graphs yet, for sequences of up to `blocks` blocks. They are of use where kernels of our own
    /// run, which `machine` is about.
    pub fn new(device: Device, machine: Machine, blocks: usize) -> Self {
        let (pool, steps) = (None, BTreeMap::new());
        Self { device, machine, blocks, pool, steps, runs: 0, off: false, overlaps: true }
    }

    /// Steps that ran as a graph.
    pub fn runs(&self) -> u64 {
        self.runs
    }

    /// Forgets the graphs: the weights or the pages will lie elsewhere.
    pub fn clear(&mut self) {
        self.steps.clear();
        self.pool = None;
    }

    /// Hidden states of a decode step, `[rows, hidden]`, until the next one; none if it has to be run
    /// without a graph.
    ///
    /// # Panics
    /// If the device fails.
    pub fn hidden(
        &mut self,
        rows: &StepRows<'_>,
        decoder: &Decoder,
        pages: &DevicePages,
    ) -> Option<Tensor> {
        let size = size_for(rows.tokens.len()).filter(|_| !self.off && rows.is_decode())?;
        let hidden = match self.steps.get_mut(&size) {
            Some(recorded) => {
                self.runs += 1;
                recorded.run(rows, decoder, pages).unwrap_or_else(|error| panic!("{error}"))
            }
            None => self.record(size, rows, decoder, pages),
        };
        Some(hidden.narrow(0, 0, rows.tokens.len() as i64))
    }

    /// Runs a step, and records it for the next one of this size.
    fn record(
        &mut self,
        size: usize,
        rows: &StepRows<'_>,
        decoder: &Decoder,
        pages: &DevicePages,
    ) -> Tensor {
        let capacity = Capacity::of_decode(size, self.blocks, &self.machine);
        let mut plan = StepPlan::with_capacity(capacity, self.machine, self.device);
        plan.refill(rows).unwrap_or_else(|error| panic!("{error}"));
        let now = Recorded::forward(&plan, decoder, pages);
        let used = now.narrow(0, 0, rows.tokens.len() as i64);
        match self.replay(&plan, &used, decoder, pages) {
            Ok(replay) => {
                self.steps.insert(size, Recorded { plan, replay });
            }
            Err(error) => {
                tracing::warn!(%error, size, "decode steps cannot be recorded; going on without");
                self.off = true;
                self.clear();
            }
        }
        now
    }

    /// A step that repeats the one whose hidden states are `now`, which it is made to do once.
    fn replay(
        &mut self,
        plan: &StepPlan,
        now: &Tensor,
        decoder: &Decoder,
        pages: &DevicePages,
    ) -> Result<Replay, TorchError> {
        let forward = || Recorded::forward(plan, decoder, pages);
        let (replay, again) = self.repeat(&forward)?;
        let distance = distance(&again.narrow(0, 0, now.size()[0]), now);
        if distance <= SAME {
            return Ok(replay);
        }
        let error = TorchError(format!("numbers are off by {distance:.1e} of the largest"));
        if !self.overlaps {
            return Err(error);
        }
        self.without_overlap(&error);
        self.replay(plan, now, decoder, pages)
    }

    /// A recorded step, and the hidden states of its first run.
    fn repeat(&mut self, forward: &dyn Fn() -> Tensor) -> Result<(Replay, Tensor), TorchError> {
        let Device::Cuda(index) = self.device else {
            #[cfg(test)]
            return Ok((Replay::Again, forward()));
            #[cfg(not(test))]
            return Err(TorchError(format!("there are no graphs on {:?}", self.device)));
        };
        let body = || if self.overlaps { overlapping(forward) } else { forward() };
        let recorded = untimed(|| Graph::record(index, self.pool, body));
        let (mut graph, hidden) = match recorded {
            Err(error) if self.overlaps => {
                self.without_overlap(&error);
                return self.repeat(forward);
            }
            recorded => recorded?,
        };
        if self.pool.is_none() {
            self.pool = Some(graph.pool()?);
        }
        graph.run()?;
        let again = hidden.shallow_clone();
        Ok((Replay::Graph(graph, hidden), again))
    }

    /// From here on kernels do not overlap.
    fn without_overlap(&mut self, error: &TorchError) {
        tracing::warn!(%error, "a step of kernels that overlap; going on with kernels that do not");
        self.overlaps = false;
        self.clear();
    }
}

#[cfg(test)]
pub(crate) mod tests;
