//! Token statistics from a forward pass of the trainer's own, where the engine tells none.

use crate::{
    batch::{TrainBatch, TrainGroup, TrainSample},
    entropy::KeepAll,
    error::TrainError,
    loss::token_stats,
    room::Room,
};
use onpolicy_engine::model::decoder::Decoder;

/// Fills in the entropies and baselines that the engine did not tell, by the weights as they are
/// now, in passes for which there is `room`. The log-probs stay those of the engine.
///
/// # Errors
/// Memory that does not suffice for one sample.
pub fn complete(
    decoder: &Decoder,
    groups: &mut [TrainGroup],
    room: &mut Room,
    temperature: f32,
) -> Result<(), TrainError> {
    if !groups.iter().flat_map(|group| &group.samples).any(lacks_stats) {
        return Ok(());
    }
    // The gate looks at all groups, those that teach nothing too.
    let all = groups.iter().map(|group| TrainGroup { teaches: true, ..group.clone() });
    let batch = TrainBatch::new(all.collect(), &KeepAll {});
    let own = room.run(batch.span(), |rows| {
        let packs = batch.mini_batches(1, rows);
        let micro_batches = packs.iter().flat_map(|pack| &pack.micro_batches);
        let stats = micro_batches.flat_map(|micro| token_stats(decoder, micro, temperature));
        Ok(stats.collect::<Vec<_>>())
    })?;
    let mut own = own.into_iter();
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
    Ok(())
}

fn lacks_stats(sample: &TrainSample) -> bool {
    sample.entropy.iter().chain(&sample.baseline).any(|number| number.is_nan())
}
