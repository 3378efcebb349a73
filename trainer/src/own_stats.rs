//! Token statistics from a forward pass of the trainer's own, where the engine tells none.

use crate::{
    batch::{TrainBatch, TrainGroup, TrainSample},
    entropy::KeepAll,
    loss::token_stats,
};
use onpolicy_engine::model::decoder::Decoder;

/// Fills in the entropies and baselines that the engine did not tell, by the weights as they are
/// now, in passes of about `max_rows` rows. The log-probs stay those of the engine.
pub fn complete(decoder: &Decoder, groups: &mut [TrainGroup], max_rows: usize, temperature: f32) {
    if !groups.iter().flat_map(|group| &group.samples).any(lacks_stats) {
        return;
    }
    // The gate looks at all groups, those that teach nothing too.
    let all = groups.iter().map(|group| TrainGroup { teaches: true, ..group.clone() });
    let batch = TrainBatch::new(all.collect(), &KeepAll {});
    let packs = batch.mini_batches(1, max_rows);
    let micro_batches = packs.iter().flat_map(|pack| &pack.micro_batches);
    let mut own = micro_batches.flat_map(|micro| token_stats(decoder, micro, temperature));
    for sample in groups.iter_mut().flat_map(|group| &mut group.samples) {
        for (entropy, baseline) in sample.entropy.iter_mut().zip(&mut sample.baseline) {
            let own = own.next().expect("a batch holds every token once");
            if entropy.is_nan() {
                *entropy = own.entropy;
            }
            if baseline.is_nan() {
                *baseline = own.baseline;
            }
        }
    }
}

fn lacks_stats(sample: &TrainSample) -> bool {
    sample.entropy.iter().chain(&sample.baseline).any(|number| number.is_nan())
}
