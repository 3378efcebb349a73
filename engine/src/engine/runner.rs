//! One step's tensors: a batch of chunks in, tokens and log-probs out.

use crate::{
    block_manager::BLOCK_SIZE,
    cuda::{plan::Machine, takes},
    device::{
        self, agreement, download,
        drawing::Drawing,
        graphs::DecodeGraphs,
        pages::DevicePages,
        plan::{StepPlan, StepRows},
        stats,
        tuning::tune,
    },
    head::Head,
    kv_cache::KvCache,
    logits::batch_stats,
    model::{
        attention::{Attention, DeviceBatch, PagedBatch},
        config::ModelConfig,
        decoder::Decoder,
    },
    profile::{Phase, timed, untimed},
    sampler::{Draw, place, sample},
    scheduler::{Chunk, Scheduler, Step},
    torch::{
        TorchError,
        memory::give_back,
        no_grad,
        slices::{bytes, floats, floats_mut},
        storage::{Storages, empty_cache},
        stream::synchronize,
    },
    weights::{ServeDtype, Weights},
};
use onpolicy_plugin_api::{Memory, PromptToken};
use rapidhash::v3::rapidhash_v3;
use std::time::{Duration, Instant};
use tch::{Device, Tensor};

/// Rows whose logits are in memory at a time when a prompt's log-probs are wanted.
const HEAD_ROWS: usize = 256;

/// The model and its pages.
pub struct Runner {
    decoder: Decoder,
    weights: Weights,
    pages: Pages,
    /// For kernels of our own, where there are some for this device and model.
    machine: Option<Machine>,
    /// Decode steps that are recorded, where the machine has kernels.
    graphs: Option<DecodeGraphs>,
    eos_token_ids: Vec<u32>,
    copied_bytes: usize,
}

/// K and V, where the weights are.
enum Pages {
    /// f32 on the CPU.
    Native(KvCache),
    /// On any device, in any type; the storages are the weights'.
    OnDevice(DevicePages, Storages),
}

/// Hidden states of one step.
pub struct StepOutput {
    /// `[N, hidden]`, all rows of the step.
    hidden: Tensor,
    /// First row of each chunk.
    first_rows: Vec<usize>,
    /// Rows that tokens are drawn from, i64; none if it is all of them.
    sampled: Option<Tensor>,
}

impl Runner {
    /// A runner over handles to `weights`, which serves them as `dtype`, with `num_blocks` blocks
    /// of KV: those of `pages`, unless the weights are native. On a CUDA device decode steps of
    /// sequences of up to `recorded` tokens are recorded as graphs, of the kernels that are fastest
    /// there; none are if that is 0.
    pub fn new(
        config: &ModelConfig,
        (weights, dtype): (&Weights, ServeDtype),
        (pages, num_blocks): (Option<DevicePages>, usize),
        recorded: usize,
    ) -> Self {
        let mut decoder = Decoder::serving(config, weights, dtype);
        let device = decoder.placement().device;
        let blocks = recorded.div_ceil(BLOCK_SIZE).min(num_blocks);
        let machine = pages.as_ref().filter(|_| takes(device)).and_then(|pages| {
            let machine = agreement::machine(config, decoder.placement());
            untimed(|| prepare(&decoder, pages, (machine, blocks > 0)))
        });
        let graphs = machine.filter(|_| blocks > 0);
        let storages = || Storages::of(weights.iter().map(|(_, tensor)| tensor));
        Self {
            copied_bytes: decoder.copied_bytes(),
            decoder,
            weights: weights.share(),
            pages: match pages {
                Some(pages) => Pages::OnDevice(pages, storages()),
                None => Pages::Native(KvCache::new(config, num_blocks)),
            },
            machine,
            graphs: graphs.map(|machine| DecodeGraphs::new(device, machine, blocks)),
            eos_token_ids: config.eos_token_ids.clone(),
        }
    }

    /// Tokens that end a sample.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }

    /// Bytes of the weights' copies in a narrow type; 0 where f32 is served.
    pub fn copied_bytes(&self) -> usize {
        self.copied_bytes
    }

    /// Waits until the weights' device has done all that it was given.
    ///
    /// # Errors
    /// What the device says.
    pub fn synchronize(&self) -> Result<(), String> {
        match self.decoder.placement().device {
            Device::Cuda(index) => synchronize(index).map_err(|error| error.to_string()),
            _ => Ok(()),
        }
    }

    /// Whether attention and decode steps are by kernels of our own.
    #[cfg(test)]
    pub fn by_kernels(&self) -> bool {
        self.machine.is_some() && self.graphs.is_some()
    }

    /// Decode steps that ran as a recorded graph.
    pub fn graph_steps(&self) -> u64 {
        self.graphs.as_ref().map_or(0, DecodeGraphs::runs)
    }

    /// Makes those copies anew, out of the weights as they are now; says how long it took: no time
    /// where f32 is served.
    pub fn refresh(&mut self) -> Duration {
        if self.copied_bytes == 0 {
            return Duration::ZERO;
        }
        let started = Instant::now();
        self.decoder.refresh();
        started.elapsed()
    }

    /// Overwrites the served weights with `tensors`, which have their order and shapes.
    ///
    /// # Panics
    /// If they have not.
    pub fn load(&mut self, tensors: &[(String, Tensor)]) {
        for ((name, served), (read, tensor)) in self.weights.iter().zip(tensors) {
            assert_eq!(name, read, "weights are checked before they are written");
            served.shallow_clone().copy_(tensor);
        }
    }

    /// Overwrites the served weights with random numbers.
    pub fn reset_weights(&mut self) {
        for (_, served) in self.weights.iter() {
            let _ = served.shallow_clone().uniform_(-0.05, 0.05);
        }
    }

    /// A hash of the bytes of each weight, by name: rapidhash V3, the same on every machine.
    pub fn checksums(&self) -> Vec<(String, u64)> {
        let hash = |tensor: &Tensor| match &self.pages {
            Pages::Native(_) => rapidhash_v3(bytes(tensor)),
            Pages::OnDevice(..) => rapidhash_v3(&device::bytes(tensor)),
        };
        self.weights.iter().map(|(name, tensor)| (name.to_string(), hash(tensor))).collect()
    }

    /// Gives the memory of all pages back to the system; false if it does not take it.
    pub fn give_back_pages(&mut self) -> bool {
        let device = self.decoder.placement().device;
        // They read and write where the pages are now.
        self.graphs.iter_mut().for_each(DecodeGraphs::clear);
        match &mut self.pages {
            Pages::Native(cache) => cache.give_back(),
            Pages::OnDevice(pages, _) => {
                pages.give_back();
                empty_cache(device).is_ok()
            }
        }
    }

    /// Gives the memory of the weights and of their copies back to the system; false if it does
    /// not take all of it. Handles to the weights stay, and what they hold is worth nothing.
    pub fn give_back_weights(&mut self) -> bool {
        if let Pages::OnDevice(_, weights) = &mut self.pages {
            return weights.give_back().is_ok();
        }
        let copies = self.decoder.give_back_copies();
        let mut tensors = self.weights.iter();
        tensors.all(|(_, tensor)| give_back(floats_mut(&mut tensor.shallow_clone()))) && copies
    }

    /// Takes memory again that was given back; the system gives native memory as it is written.
    ///
    /// # Errors
    /// There is not as much.
    pub fn take(&mut self, memory: &[Memory]) -> Result<(), TorchError> {
        let Pages::OnDevice(pages, weights) = &mut self.pages else { return Ok(()) };
        for memory in memory {
            match memory {
                Memory::KvCache => pages.take()?,
                Memory::Weights => weights.take()?,
            }
        }
        Ok(())
    }

    /// Runs the chunks of `step` through the decoder; their K and V are in the pages afterwards.
    /// `drawn` are the tokens of the step before, if sequences expect one of them.
    pub fn forward(
        &mut self,
        step: &Step,
        scheduler: &Scheduler,
        drawn: Option<&Tensor>,
    ) -> StepOutput {
        timed(Phase::Gather, || self.run(step, scheduler, drawn))
    }

    fn run(&mut self, step: &Step, scheduler: &Scheduler, drawn: Option<&Tensor>) -> StepOutput {
        let mut rows = gather(step, scheduler);
        rows.unknown.drawn = drawn.map(Tensor::shallow_clone);
        let first_rows = rows.spans.iter().map(|span| span.rows.start).collect();
        match &mut self.pages {
            Pages::Native(cache) => {
                for &(from, to) in &step.copies {
                    cache.copy(from, to);
                }
                let sampled = Some(Tensor::from_slice(&rows.sampled));
                let [tokens, positions] =
                    [&rows.tokens, &rows.positions].map(|x| Tensor::from_slice(x));
                let batch = PagedBatch { cache, spans: rows.spans, slots: rows.slots };
                let attention = &mut Attention::Paged(batch);
                let hidden = self.decoder.hidden(&tokens, &positions, attention);
                StepOutput { hidden, first_rows, sampled }
            }
            Pages::OnDevice(pages, _) => {
                pages.copy(&step.copies);
                let graphs = self.graphs.as_mut();
                let recorded = graphs.and_then(|g| g.hidden(&rows, &self.decoder, pages));
                // Every row of a decode step is drawn from.
                if let Some(hidden) = recorded {
                    return StepOutput { hidden, first_rows, sampled: None };
                }
                let device = self.decoder.placement().device;
                let plan = StepPlan::new(&rows, device, self.machine);
                let attention = &mut Attention::OnDevice(DeviceBatch { pages, plan: &plan });
                let hidden = self.decoder.hidden(&plan.tokens, &plan.positions, attention);
                StepOutput { hidden, first_rows, sampled: Some(plan.sampled) }
            }
        }
    }

    /// Draws tokens; the rows of `draws` are the last ones of the chunks that sample and those of
    /// guesses, in the step's order.
    pub fn draw(&self, output: &StepOutput, draws: &[Draw]) -> Drawing {
        let hidden = match &output.sampled {
            Some(rows) => output.hidden.index_select(0, rows),
            None => output.hidden.shallow_clone(),
        };
        if let Pages::OnDevice(..) = &self.pages {
            return Drawing::start(&self.decoder.logits(&hidden), draws);
        }
        Drawing::known(if self.decoder.head_is_narrow() {
            let logits = self.decoder.logits(&hidden);
            sample(floats(&logits), self.decoder.head().size()[0] as usize, draws)
        } else {
            Head::new(self.decoder.head()).sample(floats(&hidden), draws)
        })
    }

    /// What chunk `index` says of the tokens that follow its rows: row `i` predicts `next[i]`. Ranks
    /// and likeliest tokens only if some of these are wanted (`top`): they need all logits.
    pub fn next_tokens(
        &self,
        output: &StepOutput,
        index: usize,
        next: &[u32],
        top: usize,
    ) -> Vec<PromptToken> {
        let start = output.first_rows[index] as i64;
        let hidden = output.hidden.narrow(0, start, next.len() as i64);
        if top > 0 {
            return self
                .by_rows(&hidden, next, |logits, vocab, next| place(logits, vocab, next, top));
        }
        let logprobs = match &self.pages {
            Pages::OnDevice(..) => self.logprobs_on_device(&hidden, next),
            Pages::Native(_) if self.decoder.head_is_narrow() => {
                self.by_rows(&hidden, next, |logits, vocab, next| {
                    let stats = batch_stats(logits, vocab, next, 1.0);
                    stats.iter().map(|stats| stats.logprob).collect()
                })
            }
            Pages::Native(_) => Head::new(self.decoder.head()).logprobs(floats(&hidden), next),
        };
        let token = |logprob| PromptToken { logprob, rank: None, top: Vec::new() };
        logprobs.into_iter().map(token).collect()
    }

    /// Log-probs, at temperature 1, of the tokens that follow; one copy to the host.
    fn logprobs_on_device(&self, hidden: &Tensor, next: &[u32]) -> Vec<f32> {
        let ids: Vec<i64> = next.iter().map(|&id| i64::from(id)).collect();
        let ids = device::upload(&ids, hidden.device());
        let starts = (0..next.len() as i64).step_by(HEAD_ROWS);
        let parts = starts.map(|start| {
            let len = (next.len() as i64 - start).min(HEAD_ROWS as i64);
            let logits = self.decoder.logits(&hidden.narrow(0, start, len));
            stats::batch_stats(&logits, &ids.narrow(0, start, len), 1.0).narrow(1, 0, 1)
        });
        let parts: Vec<Tensor> = parts.collect();
        if parts.is_empty() { Vec::new() } else { download(&Tensor::cat(&parts, 0)) }
    }

    /// What `each` makes of logits, their vocabulary and the tokens that follow, some rows at a time.
    fn by_rows<T>(
        &self,
        hidden: &Tensor,
        next: &[u32],
        each: impl Fn(&[f32], usize, &[u32]) -> Vec<T>,
    ) -> Vec<T> {
        let vocab = self.decoder.head().size()[0] as usize;
        let mut made = Vec::with_capacity(next.len());
        for next in next.chunks(HEAD_ROWS) {
            let rows = hidden.narrow(0, made.len() as i64, next.len() as i64);
            let logits = self.decoder.logits(&rows);
            made.extend(match &self.pages {
                Pages::Native(_) => each(floats(&logits), vocab, next),
                Pages::OnDevice(..) => each(&download(&logits), vocab, next),
            });
        }
        made
    }
}

/// The rows of a step's chunks.
fn gather<'a>(step: &Step, scheduler: &'a Scheduler) -> StepRows<'a> {
    let mut rows = StepRows::default();
    for chunk in &step.chunks {
        let sequence = scheduler.sequence(chunk.seq).expect("a scheduled sequence exists");
        let row = rows.tokens.len();
        if let Some(draw) = sequence.expected.filter(|_| chunk.sample) {
            rows.unknown.rows.push((row + chunk.len - 1) as i64);
            rows.unknown.draws.push(draw as i64);
        }
        let tokens = sequence.tokens[chunk.start..].iter().chain(&sequence.drafts);
        let tokens = tokens.take(chunk.len).map(|&token| i64::from(token));
        rows.push(tokens, chunk.start, &sequence.blocks);
        if chunk.sample {
            let last = row + chunk.len;
            rows.sampled.extend((last - chunk.drafts - 1..last).map(|row| row as i64));
        }
    }
    rows
}

/// Looks whether the kernels can be relied upon, and has the fastest of them make the products of steps that are
/// recorded. Gives what kernels of attention have to know, if they can be used.
fn prepare(
    decoder: &Decoder,
    pages: &DevicePages,
    (machine, records): (Option<Machine>, bool),
) -> Option<Machine> {
    let device = decoder.placement().device;
    let agreed = agreement::settle(decoder, pages, machine);
    let machine = machine.filter(|_| agreed);
    if let (Some(_), true, Device::Cuda(index)) = (machine, records, device) {
        no_grad(|| tune(index, &decoder.products()));
    }
    if let Err(error) = empty_cache(device) {
        tracing::warn!(%error, "what was tried may still hold memory");
    }
    machine
}

/// The prompt tokens that the rows of `chunk` predict, and the position of the first of them.
pub fn predicted_prompt(chunk: &Chunk, tokens: &[u32], prompt_len: usize) -> (usize, Vec<u32>) {
    let first = chunk.start + 1;
    let end = (first + chunk.len).min(prompt_len);
    (first, tokens.get(first..end).unwrap_or_default().to_vec())
}
