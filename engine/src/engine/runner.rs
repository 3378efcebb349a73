//! One step's tensors: a batch of chunks in, tokens and log-probs out.

use crate::{
    block_manager::BLOCK_SIZE,
    head::Head,
    kernels::attention::Span,
    kv_cache::KvCache,
    model::{
        attention::{Attention, PagedBatch},
        config::ModelConfig,
        decoder::Decoder,
    },
    profile::{Phase, timed},
    sampler::{Draw, Drawn},
    scheduler::{Chunk, Scheduler, Step},
    torch::slices::floats,
    weights::Weights,
};
use tch::Tensor;

/// The model and its pages.
pub struct Runner {
    decoder: Decoder,
    cache: KvCache,
    eos_token_ids: Vec<u32>,
}

/// Hidden states of one step.
pub struct StepOutput {
    /// `[N, hidden]`, all rows of the step.
    hidden: Tensor,
    /// First row of each chunk.
    first_rows: Vec<usize>,
}

impl Runner {
    /// A runner over handles to `weights`, with `num_blocks` blocks of KV.
    pub fn new(config: &ModelConfig, weights: &Weights, num_blocks: usize) -> Self {
        Self {
            decoder: Decoder::new(config, weights),
            cache: KvCache::new(config, num_blocks),
            eos_token_ids: config.eos_token_ids.clone(),
        }
    }

    /// Tokens that end a sample.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
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
        Head::new(self.decoder.head()).sample(floats(&hidden), draws)
    }

    /// Log-probs, at temperature 1, of the tokens that follow the rows of chunk `index`: row `i`
    /// of the chunk predicts `next[i]`.
    pub fn next_logprobs(&self, output: &StepOutput, index: usize, next: &[u32]) -> Vec<f32> {
        let start = output.first_rows[index] as i64;
        let hidden = output.hidden.narrow(0, start, next.len() as i64);
        Head::new(self.decoder.head()).logprobs(floats(&hidden), next)
    }
}

/// The prompt tokens that the rows of `chunk` predict, and the position of the first of them.
pub fn predicted_prompt(chunk: &Chunk, tokens: &[u32], prompt_len: usize) -> (usize, Vec<u32>) {
    let first = chunk.start + 1;
    let end = (first + chunk.len).min(prompt_len);
    (first, tokens.get(first..end).unwrap_or_default().to_vec())
}
