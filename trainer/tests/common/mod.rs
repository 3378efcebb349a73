//! Batches of made-up tokens, packed and padded; shared by tests and benches.
#![allow(dead_code)] // each binary uses its part

use onpolicy_engine::{
    model::{config::ModelConfig, decoder::Decoder, loading::load},
    weights::Weights,
};
use onpolicy_trainer::{
    batch::{MicroBatch, TrainBatch, TrainGroup, TrainSample},
    entropy::KeepAll,
    loss::{LossSettings, PpoClip, token_stats},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

/// A checkpoint of the golden ones.
pub fn tiny(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tiny").join(name)
}

/// The real model; `scripts/setup` fetches it.
pub fn smollm2() -> PathBuf {
    let cache = std::env::var("ONPOLICY_CACHE").map(PathBuf::from).unwrap_or_else(|_| {
        Path::new(&std::env::var("HOME").expect("HOME is set")).join(".cache/onpolicy")
    });
    cache.join("models/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf")
}

/// A model with weights that collect gradients.
pub fn trainable(path: &Path) -> (ModelConfig, Weights, Decoder) {
    let checkpoint = load(path.to_str().expect("UTF-8")).expect("the checkpoint loads");
    let weights = Weights::new(checkpoint.tensors).share_trainable();
    let decoder = Decoder::new(&checkpoint.config, &weights);
    (checkpoint.config, weights, decoder)
}

/// Groups of random tokens: `count` prompts of lengths in `prompts`, `samples` responses each.
pub fn groups(
    [count, samples, vocab]: [usize; 3],
    prompts: RangeInclusive<usize>,
    responses: RangeInclusive<usize>,
) -> Vec<TrainGroup> {
    let mut rng = StdRng::seed_from_u64(3);
    let tokens = |rng: &mut StdRng, len: RangeInclusive<usize>| -> Vec<u32> {
        let len = rng.random_range(len);
        (0..len).map(|_| rng.random_range(0..vocab as u32)).collect()
    };
    let mut group = || {
        let prompt = tokens(&mut rng, prompts.clone());
        let samples = (0..samples).map(|number| {
            let tokens = tokens(&mut rng, responses.clone());
            let column = vec![0.0; tokens.len()];
            let advantage = if number % 2 == 0 { 0.5 } else { -1.0 };
            let (entropy, baseline) = (column.clone(), column.clone());
            TrainSample { tokens, logprob: column, entropy, baseline, advantage }
        });
        TrainGroup { prompt, samples: samples.collect(), teaches: true }
    };
    (0..count).map(|_| group()).collect()
}

/// The groups with log-probs near those of the policy, so that ratios are near 1.
pub fn drawn(decoder: &Decoder, mut groups: Vec<TrainGroup>, max_rows: usize) -> Vec<TrainGroup> {
    let batch = TrainBatch::new(groups.clone(), &KeepAll {});
    let packs = batch.mini_batches(1, max_rows);
    let micros = packs.iter().flat_map(|part| &part.micro_batches);
    let mut stats = micros.flat_map(|micro| token_stats(decoder, micro, 1.0));
    for (number, sample) in groups.iter_mut().flat_map(|g| &mut g.samples).enumerate() {
        for (place, logprob) in sample.logprob.iter_mut().enumerate() {
            let off = ((number + place) % 7) as f32 * 0.1 - 0.3;
            *logprob = stats.next().expect("one for every token").logprob + off;
        }
    }
    groups
}

/// The usual clipping over `kept` tokens.
pub fn settings(kept: usize) -> LossSettings {
    let clip = PpoClip { low: 0.2, high: 0.28, dual: 3.0 };
    LossSettings { clip, temperature: 1.0, kept, first: true, tis_cap: None }
}

/// The same batch as other trainers lay it out: every sample with a copy of its prompt, `rows`
/// samples at a time, filled up on the right to the longest of them. A row sees what stands before
/// it, so that the filling changes nothing.
pub fn padded(groups: &[TrainGroup], rows: usize) -> Vec<MicroBatch> {
    let samples = groups.iter().flat_map(|g| g.samples.iter().map(move |s| (&g.prompt, s)));
    let samples: Vec<(&Vec<u32>, &TrainSample)> = samples.collect();
    samples.chunks(rows).map(padded_batch).collect()
}

fn padded_batch(samples: &[(&Vec<u32>, &TrainSample)]) -> MicroBatch {
    let len = |(prompt, sample): &(&Vec<u32>, &TrainSample)| prompt.len() + sample.tokens.len();
    let longest = samples.iter().map(len).max().expect("a batch is not empty");
    let mut micro = MicroBatch::default();
    for (prompt, sample) in samples {
        let mut row = prompt.to_vec();
        row.extend(&sample.tokens);
        row.resize(longest, 0);
        let first = micro.pack.push(&row, &[]).prompt.start + prompt.len() - 1;
        micro.rows.extend((first..first + sample.tokens.len()).map(|row| row as i64));
        micro.targets.extend(&sample.tokens);
        micro.old_logprob.extend(&sample.logprob);
        micro.old_entropy.extend(&sample.entropy);
        micro.advantage.extend(vec![sample.advantage; sample.tokens.len()]);
        micro.keep.extend(vec![true; sample.tokens.len()]);
    }
    micro
}
