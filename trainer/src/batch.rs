//! Scored groups become a training batch, and the batch becomes packs.

use crate::room::Span;
use onpolicy_engine::{collect::Sample, model::attention::Pack};
use onpolicy_plugin_api::{TokenBatch, TokenGate};

/// One group as the trainer sees it: a prompt, its samples, and an advantage for each.
#[derive(Debug, Clone)]
pub struct TrainGroup {
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// The samples; every one has at least one token.
    pub samples: Vec<TrainSample>,
    /// False if all advantages are 0. Such a group counts in every mean over the batch, but its
    /// gradient is 0, so it is not run through the model.
    pub teaches: bool,
}

impl TrainGroup {
    fn tokens(&self) -> usize {
        self.samples.iter().map(|sample| sample.tokens.len()).sum()
    }
}

/// One sample with what the engine reported when it was drawn.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TrainSample {
    /// Response tokens.
    pub tokens: Vec<u32>,
    /// Log-prob of each token when it was drawn.
    pub logprob: Vec<f32>,
    /// Entropy at each token.
    pub entropy: Vec<f32>,
    /// Baseline `E_p[S]` at each token.
    pub baseline: Vec<f32>,
    /// Advantage of the sample.
    pub advantage: f32,
}

impl TrainSample {
    /// What is needed of a sample that the engine made.
    pub fn new(sample: &Sample, advantage: f32) -> Self {
        let column = |f: fn(&onpolicy_plugin_api::TokenStats) -> f32| {
            sample.tokens.iter().map(|token| f(&token.stats)).collect()
        };
        Self {
            tokens: sample.tokens.iter().map(|token| token.id).collect(),
            logprob: column(|stats| stats.logprob),
            entropy: column(|stats| stats.entropy),
            baseline: column(|stats| stats.baseline),
            advantage,
        }
    }
}

/// All response tokens of a batch, flat: group by group, sample by sample, token by token.
#[derive(Debug, Default)]
pub struct TrainBatch {
    groups: Vec<TrainGroup>,
    logprob: Vec<f32>,
    entropy: Vec<f32>,
    baseline: Vec<f32>,
    advantage: Vec<f32>,
    sample: Vec<usize>,
    keep: Vec<bool>,
    /// The trainer's own log-probs before the batch's first update; NaN, or empty, where they are
    /// not known.
    own_logprob: Vec<f32>,
}

impl TrainBatch {
    /// Lays the groups out flat and asks `gate` which tokens stay in the loss.
    ///
    /// # Panics
    /// If the gate's mask has another length than the batch.
    pub fn new(groups: Vec<TrainGroup>, gate: &dyn TokenGate) -> Self {
        let mut batch = Self::default();
        let samples = groups.iter().flat_map(|group| &group.samples);
        for (number, sample) in samples.enumerate() {
            let len = sample.tokens.len();
            batch.logprob.extend_from_slice(&sample.logprob);
            batch.entropy.extend_from_slice(&sample.entropy);
            batch.baseline.extend_from_slice(&sample.baseline);
            batch.advantage.extend(std::iter::repeat_n(sample.advantage, len));
            batch.sample.extend(std::iter::repeat_n(number, len));
        }
        batch.groups = groups;
        batch.keep = gate.keep(&batch.tokens());
        assert_eq!(batch.keep.len(), batch.logprob.len(), "a gate answers for every token");
        batch
    }

    /// The statistics of all tokens.
    pub fn tokens(&self) -> TokenBatch<'_> {
        TokenBatch {
            logprob: &self.logprob,
            entropy: &self.entropy,
            baseline: &self.baseline,
            advantage: &self.advantage,
            sample: &self.sample,
        }
    }

    /// For every token, whether it stays in the loss.
    pub fn keep(&self) -> &[bool] {
        &self.keep
    }

    /// Notes log-probs of the tokens of `micro` under the trainer before the batch's first update.
    /// Packs that are made from now on carry them.
    pub fn note_own_logprobs(&mut self, micro: &MicroBatch, logprobs: impl Iterator<Item = f32>) {
        self.own_logprob.resize(self.logprob.len(), f32::NAN);
        for (&token, logprob) in micro.tokens.iter().zip(logprobs) {
            self.own_logprob[token] = logprob;
        }
    }

    /// Rows of the longest sample and of all groups, each with its prompt; only what teaches counts.
    pub fn span(&self) -> Span {
        let mut span = Span { least: 1, most: 0 };
        for group in self.groups.iter().filter(|group| group.teaches) {
            let tails = || group.samples.iter().map(|sample| sample.tokens.len() - 1);
            span.least = span.least.max(group.prompt.len() + tails().max().unwrap_or(0));
            span.most += group.prompt.len() + tails().sum::<usize>();
        }
        span
    }

    /// Number of groups.
    pub fn groups(&self) -> &[TrainGroup] {
        &self.groups
    }

    /// Splits the batch into `parts` mini-batches of whole groups, as even as they come, each cut
    /// into packs of about `max_rows` rows. A group that is larger is cut between samples, and its
    /// prompt repeated. Mini-batches that teach nothing are left out.
    pub fn mini_batches(&self, parts: usize, max_rows: usize) -> Vec<MiniBatch> {
        let count = self.groups.len();
        let bounds = (0..parts).map(|part| part * count / parts..(part + 1) * count / parts);
        let mut token = 0;
        let mini_batches = bounds.map(|groups| {
            let first = token;
            let micro_batches = self.packs(groups, max_rows, &mut token);
            MiniBatch { micro_batches, kept: kept(&self.keep[first..token]) }
        });
        mini_batches.filter(|mini_batch| !mini_batch.micro_batches.is_empty()).collect()
    }

    /// About `count` samples, the first few of each group that teaches, in packs of about
    /// `max_rows` rows.
    pub fn probe(&self, count: usize, max_rows: usize) -> Vec<MicroBatch> {
        let mut packs = vec![MicroBatch::default()];
        let teaching = self.groups.iter().filter(|group| group.teaches).count();
        let per_group = count.div_ceil(teaching.max(1));
        let (mut token, mut taken) = (0, 0);
        for group in &self.groups {
            let chosen = if taken < count && group.teaches { per_group } else { 0 };
            let mut samples = &group.samples[..chosen.min(group.samples.len())];
            let mut next = token;
            while !samples.is_empty() {
                let open = packs.last_mut().expect("one at least");
                let mut fit = fitting(group.prompt.len(), samples, max_rows, open.pack.len());
                if fit == 0 && !open.pack.is_empty() {
                    packs.push(MicroBatch::default());
                    continue;
                }
                fit = fit.max(1);
                open.push(self, &group.prompt, &samples[..fit], &mut next);
                taken += fit;
                samples = &samples[fit..];
            }
            token += group.tokens();
        }
        packs
    }

    fn packs(
        &self,
        groups: std::ops::Range<usize>,
        max_rows: usize,
        token: &mut usize,
    ) -> Vec<MicroBatch> {
        let (mut done, mut open) = (Vec::new(), MicroBatch::default());
        for group in &self.groups[groups] {
            if !group.teaches {
                *token += group.tokens();
                continue;
            }
            let mut samples = &group.samples[..];
            while !samples.is_empty() {
                let mut fit = fitting(group.prompt.len(), samples, max_rows, open.pack.len());
                if fit == 0 && !open.pack.is_empty() {
                    done.push(std::mem::take(&mut open));
                    continue;
                }
                fit = fit.max(1);
                open.push(self, &group.prompt, &samples[..fit], token);
                samples = &samples[fit..];
            }
        }
        if !open.pack.is_empty() {
            done.push(open);
        }
        done
    }
}

/// How many of `samples` fit into a pack that holds `used` rows already. A group is only cut if it
/// would not fit into an empty pack either.
fn fitting(prompt: usize, samples: &[TrainSample], max_rows: usize, used: usize) -> usize {
    let tail = |sample: &TrainSample| sample.tokens.len() - 1;
    let whole = prompt + samples.iter().map(tail).sum::<usize>();
    if used + whole <= max_rows {
        return samples.len();
    }
    if used > 0 {
        return 0;
    }
    let mut rows = prompt;
    let fit = samples.iter().take_while(|sample| {
        rows += tail(sample);
        rows <= max_rows
    });
    fit.count()
}

/// Rows of one forward and backward pass, and for every response token in it: the row that
/// predicts it and what the loss needs.
#[derive(Debug, Default)]
pub struct MicroBatch {
    /// The packed rows.
    pub pack: Pack,
    /// Row whose logits predict each token.
    pub rows: Vec<i64>,
    /// The tokens.
    pub targets: Vec<u32>,
    /// Where each token stands in the batch.
    pub tokens: Vec<usize>,
    /// Log-prob of each token when it was drawn.
    pub old_logprob: Vec<f32>,
    /// Log-prob of each token under the trainer before the batch's first update; empty, or NaN,
    /// where they were not computed: the first update's own forward pass gives them anyway.
    pub own_logprob: Vec<f32>,
    /// Entropy at each token when it was drawn.
    pub old_entropy: Vec<f32>,
    /// Advantage of each token's sample.
    pub advantage: Vec<f32>,
    /// Whether each token stays in the loss.
    pub keep: Vec<bool>,
}

impl MicroBatch {
    fn push(
        &mut self,
        batch: &TrainBatch,
        prompt: &[u32],
        samples: &[TrainSample],
        token: &mut usize,
    ) {
        // The last token of a sample predicts nothing, so it needs no row.
        let tails: Vec<&[u32]> =
            samples.iter().map(|sample| &sample.tokens[..sample.tokens.len() - 1]).collect();
        let group = self.pack.push(prompt, &tails).clone();
        for (index, sample) in samples.iter().enumerate() {
            let start = group.tail_start(index);
            self.rows.push(group.prompt.end as i64 - 1);
            self.rows.extend((start..start + sample.tokens.len() - 1).map(|row| row as i64));
            let tokens = *token..*token + sample.tokens.len();
            self.targets.extend_from_slice(&sample.tokens);
            self.old_logprob.extend_from_slice(&batch.logprob[tokens.clone()]);
            self.old_entropy.extend_from_slice(&batch.entropy[tokens.clone()]);
            self.advantage.extend_from_slice(&batch.advantage[tokens.clone()]);
            self.keep.extend_from_slice(&batch.keep[tokens.clone()]);
            if !batch.own_logprob.is_empty() {
                self.own_logprob.extend_from_slice(&batch.own_logprob[tokens.clone()]);
            }
            self.tokens.extend(tokens.clone());
            *token = tokens.end;
        }
    }
}

/// What one update is computed from.
#[derive(Debug)]
pub struct MiniBatch {
    /// Packs of the groups that teach something.
    pub micro_batches: Vec<MicroBatch>,
    /// Tokens that stay in the loss, those of the other groups too: the mean's denominator.
    pub kept: usize,
}

fn kept(keep: &[bool]) -> usize {
    keep.iter().filter(|keep| **keep).count()
}

#[cfg(test)]
mod tests;
