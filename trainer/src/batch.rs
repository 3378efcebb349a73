//! Scored groups become a training batch, and the batch becomes packs.

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

    /// About `count` samples, the first few of each group that teaches, as one pack.
    pub fn probe(&self, count: usize) -> MicroBatch {
        let mut probe = MicroBatch::default();
        let teaching = self.groups.iter().filter(|group| group.teaches).count();
        let per_group = count.div_ceil(teaching.max(1));
        let (mut token, mut taken) = (0, 0);
        for group in &self.groups {
            let samples = &group.samples[..per_group.min(group.samples.len())];
            if taken < count && group.teaches {
                probe.push(self, &group.prompt, samples, &mut token.clone());
                taken += samples.len();
            }
            token += group.tokens();
        }
        probe
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
    /// Log-prob of each token when it was drawn.
    pub old_logprob: Vec<f32>,
    /// Log-prob of each token under the trainer before the batch's first update, if they were
    /// computed; the first update's own forward pass gives them anyway.
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
mod tests {
    use super::*;

    struct DropEvery(usize);

    impl TokenGate for DropEvery {
        fn keep(&self, batch: &TokenBatch<'_>) -> Vec<bool> {
            (0..batch.len()).map(|token| token % self.0 != 0).collect()
        }
    }

    fn sample(tokens: &[u32], advantage: f32) -> TrainSample {
        let column = |scale: f32| tokens.iter().map(|&t| t as f32 * scale).collect();
        TrainSample {
            tokens: tokens.to_vec(),
            logprob: column(-0.125),
            entropy: column(0.25),
            baseline: column(0.5),
            advantage,
        }
    }

    fn batch() -> TrainBatch {
        let groups = vec![
            TrainGroup {
                prompt: vec![1, 2, 3],
                samples: vec![sample(&[10, 11, 12], 1.0), sample(&[13], -1.0)],
                teaches: true,
            },
            TrainGroup {
                prompt: vec![6],
                samples: vec![sample(&[30, 31, 32, 33], 0.0)],
                teaches: false,
            },
            TrainGroup { prompt: vec![4, 5], samples: vec![sample(&[20, 21], 0.5)], teaches: true },
        ];
        TrainBatch::new(groups, &DropEvery(3))
    }

    #[test]
    fn a_prompt_stands_once_and_every_token_knows_its_row() {
        let mini_batch = &batch().mini_batches(1, 100)[0];
        assert_eq!(mini_batch.micro_batches.len(), 1);
        let micro = &mini_batch.micro_batches[0];
        // Rows: 1 2 3 | 10 11 | (13 needs none) || 4 5 | 20
        assert_eq!(micro.pack.len(), 8);
        assert_eq!(micro.targets, [10, 11, 12, 13, 20, 21]);
        assert_eq!(micro.rows, [2, 3, 4, 2, 6, 7]);
        assert_eq!(micro.advantage, [1.0, 1.0, 1.0, -1.0, 0.5, 0.5]);
        assert_eq!(micro.keep, [false, true, true, false, true, false]);
        assert_eq!(micro.old_logprob[3], -1.625);
        assert_eq!(Vec::<i64>::try_from(micro.pack.positions()).unwrap(), [0, 1, 2, 3, 4, 0, 1, 2]);
        // Three of these and three of the group that teaches nothing.
        assert_eq!(mini_batch.kept, 6);
    }

    #[test]
    fn packs_respect_the_row_limit_and_lose_no_token() {
        for max_rows in 1..10 {
            let parts = batch().mini_batches(1, max_rows);
            let micros = &parts[0].micro_batches;
            let tokens: Vec<u32> = micros.iter().flat_map(|m| m.targets.clone()).collect();
            assert_eq!(tokens, [10, 11, 12, 13, 20, 21], "max_rows {max_rows}");
            let keep: Vec<bool> = micros.iter().flat_map(|m| m.keep.clone()).collect();
            assert_eq!(keep, [false, true, true, false, true, false], "max_rows {max_rows}");
            for micro in micros {
                assert!(micro.pack.len() <= max_rows.max(5), "max_rows {max_rows}");
            }
        }
        let packs = |max_rows| batch().mini_batches(1, max_rows)[0].micro_batches.len();
        assert_eq!(packs(5), 2);
        // The first group alone is too large: it is cut between its samples.
        assert_eq!(packs(4), 3);
    }

    #[test]
    fn a_probe_takes_samples_of_every_group() {
        assert_eq!(batch().probe(2).targets, [10, 11, 12, 20, 21]);
        assert_eq!(batch().probe(2).old_entropy[3], 5.0);
        assert_eq!(batch().probe(4).targets, [10, 11, 12, 13, 20, 21]);
        assert_eq!(batch().probe(1).targets, [10, 11, 12]);
    }

    #[test]
    fn mini_batches_hold_whole_groups() {
        let parts = batch().mini_batches(2, 100);
        assert_eq!(parts.len(), 2);
        assert_eq!(parts[1].micro_batches[0].targets, [20, 21]);
        assert_eq!(parts[1].micro_batches[0].keep, [true, false]);
        assert_eq!((parts[0].kept, parts[1].kept), (2, 4));
        // The group that teaches nothing makes no mini-batch of its own.
        assert_eq!(batch().mini_batches(3, 100).len(), 2);
        assert_eq!(batch().mini_batches(7, 100).len(), 2);
    }
}
