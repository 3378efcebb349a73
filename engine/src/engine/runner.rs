//! One step's tensors: a batch of chunks in, tokens and log-probs out.

use crate::{
    block_manager::BLOCK_SIZE,
    head::Head,
    kernels::attention::Span,
    kv_cache::KvCache,
    logits::batch_stats,
    model::{
        attention::{Attention, PagedBatch},
        config::ModelConfig,
        decoder::Decoder,
    },
    profile::{Phase, timed},
    sampler::{Draw, Drawn, place, sample},
    scheduler::{Chunk, Scheduler, Step},
    torch::{
        memory::give_back,
        slices::{bytes, floats, floats_mut},
    },
    weights::{ServeDtype, Weights},
};
use onpolicy_plugin_api::PromptToken;
use rapidhash::v3::rapidhash_v3;
use std::time::{Duration, Instant};
use tch::Tensor;

/// Rows whose logits are in memory at a time when a prompt's log-probs are wanted.
const HEAD_ROWS: usize = 256;

/// The model and its pages.
pub struct Runner {
    decoder: Decoder,
    weights: Weights,
    cache: KvCache,
    eos_token_ids: Vec<u32>,
    copied_bytes: usize,
}

/// Hidden states of one step.
pub struct StepOutput {
    /// `[N, hidden]`, all rows of the step.
    hidden: Tensor,
    /// First row of each chunk.
    first_rows: Vec<usize>,
}

impl Runner {
    /// A runner over handles to `weights`, which serves them as `dtype`, with `num_blocks` blocks
    /// of KV.
    pub fn new(
        config: &ModelConfig,
        (weights, dtype): (&Weights, ServeDtype),
        num_blocks: usize,
    ) -> Self {
        let mut decoder = Decoder::serving(config, weights, dtype);
        Self {
            copied_bytes: decoder.copied_bytes(),
            decoder,
            weights: weights.share(),
            cache: KvCache::new(config, num_blocks),
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
        let weights = self.weights.iter();
        weights.map(|(name, tensor)| (name.to_string(), rapidhash_v3(bytes(tensor)))).collect()
    }

    /// Gives the memory of all pages back to the system; false if it does not take it.
    pub fn give_back_pages(&mut self) -> bool {
        self.cache.give_back()
    }

    /// Gives the memory of the weights and of their copies back to the system; false if it does
    /// not take all of it. The weights stay where they are, and are worth nothing.
    pub fn give_back_weights(&mut self) -> bool {
        let copies = self.decoder.give_back_copies();
        let mut tensors = self.weights.iter();
        tensors.all(|(_, tensor)| give_back(floats_mut(&mut tensor.shallow_clone()))) && copies
    }

    /// Runs the chunks of `step` through the decoder; their K and V are in the pages afterwards.
    pub fn forward(&mut self, step: &Step, scheduler: &Scheduler) -> StepOutput {
        timed(Phase::Gather, || self.run(step, scheduler))
    }

    fn run(&mut self, step: &Step, scheduler: &Scheduler) -> StepOutput {
        for &(from, to) in &step.copies {
            self.cache.copy(from, to);
        }
        let rows = step.num_tokens();
        let (mut tokens, mut positions) = (Vec::with_capacity(rows), Vec::with_capacity(rows));
        let (mut slots, mut spans) = (Vec::with_capacity(rows), Vec::new());
        let mut first_rows = Vec::with_capacity(step.chunks.len());
        for chunk in &step.chunks {
            let sequence = scheduler.sequence(chunk.seq).expect("a scheduled sequence exists");
            let (row, range) = (tokens.len(), chunk.start..chunk.start + chunk.len);
            tokens.extend(sequence.tokens[range.clone()].iter().map(|&token| i64::from(token)));
            positions.extend(range.clone().map(|position| position as i64));
            slots.extend(range.map(|position| {
                sequence.blocks[position / BLOCK_SIZE] * BLOCK_SIZE as u32
                    + (position % BLOCK_SIZE) as u32
            }));
            spans.push(Span {
                rows: row..row + chunk.len,
                first_position: chunk.start,
                blocks: &sequence.blocks,
            });
            first_rows.push(row);
        }
        let (tokens, positions) = (Tensor::from_slice(&tokens), Tensor::from_slice(&positions));
        let batch = PagedBatch { cache: &mut self.cache, spans, slots };
        let hidden = self.decoder.hidden(&tokens, &positions, &mut Attention::Paged(batch));
        StepOutput { hidden, first_rows }
    }

    /// Draws tokens; the rows of `draws` are the last ones of the chunks that sample, in the step's
    /// order.
    pub fn sample(
        &self,
        step: &Step,
        output: &StepOutput,
        draws: &[Draw],
    ) -> Vec<Result<Drawn, String>> {
        let chunks = step.chunks.iter().zip(&output.first_rows);
        let rows: Vec<i64> = chunks
            .filter(|(chunk, _)| chunk.sample)
            .map(|(chunk, first)| (first + chunk.len - 1) as i64)
            .collect();
        let hidden = output.hidden.index_select(0, &Tensor::from_slice(&rows));
        if self.decoder.head_is_narrow() {
            let logits = self.decoder.logits(&hidden);
            return sample(floats(&logits), self.decoder.head().size()[0] as usize, draws);
        }
        Head::new(self.decoder.head()).sample(floats(&hidden), draws)
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
        let logprobs = if self.decoder.head_is_narrow() {
            self.by_rows(&hidden, next, |logits, vocab, next| {
                let stats = batch_stats(logits, vocab, next, 1.0);
                stats.iter().map(|stats| stats.logprob).collect()
            })
        } else {
            Head::new(self.decoder.head()).logprobs(floats(&hidden), next)
        };
        let token = |logprob| PromptToken { logprob, rank: None, top: Vec::new() };
        logprobs.into_iter().map(token).collect()
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
            made.extend(each(floats(&self.decoder.logits(&rows)), vocab, next));
        }
        made
    }
}

/// The prompt tokens that the rows of `chunk` predict, and the position of the first of them.
pub fn predicted_prompt(chunk: &Chunk, tokens: &[u32], prompt_len: usize) -> (usize, Vec<u32>) {
    let first = chunk.start + 1;
    let end = (first + chunk.len).min(prompt_len);
    (first, tokens.get(first..end).unwrap_or_default().to_vec())
}
