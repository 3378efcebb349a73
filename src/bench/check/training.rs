//! Training: updates in place that lower the loss, and checkpoints that are the weights.

use super::{Check, Limit, Place};
use onpolicy_engine::{model::loading::load_to, weights::Weights};
use onpolicy_plugin_api::{Attempt, Score, Verifier};
use onpolicy_trainer::{
    checkpoint::{save_source, save_weights},
    metrics::StepMetrics,
    optimizer::{Optimizer, OptimizerSettings},
    run,
    served::Served,
    train::Trainer,
};
use std::{collections::VecDeque, path::Path};

const STEPS: usize = 20;
/// Steps whose mean reward is compared, at both ends.
const ENDS: usize = 4;
/// A reward that a model of random weights learns within a few steps: letters of one half.
const KEYS: [&str; 8] = [
    "rollout.prompts_per_step=4",
    "rollout.group_size=16",
    "rollout.max_new_tokens=16",
    "train.lr=3e-3",
    "train.seed=7",
    "gate.name=\"none\"",
    "engine.max_num_seqs=64",
    "train.micro_batch_tokens=512",
];

/// The share of digits below 5 among all digits, of which the tiny models' tokens are full.
struct SmallDigits;

impl Verifier for SmallDigits {
    fn verify(&self, attempts: &[Attempt<'_>]) -> Vec<Score> {
        let share = |text: &str| {
            let digits = || text.chars().filter(char::is_ascii_digit);
            let small = digits().filter(|digit| *digit < '5').count();
            small as f32 / digits().count().max(1) as f32
        };
        attempts.iter().map(|attempt| Score::Reward(share(attempt.completion))).collect()
    }
}

/// Twenty GRPO steps: the reward rises, the engine's log-probs are the trainer's, and the weights
/// stay where they are.
pub fn learns(place: &Place, path: &Path) -> Result<Vec<Check>, anyhow::Error> {
    let config = place.config(path, &KEYS)?;
    let checkpoint = load_to(&config.model.path, place.placement)?;
    let served = Served::over(checkpoint, &config, None)?;
    let addresses = addresses(&served.weights);
    let mut parts = run::parts(&config, |plugins| plugins)?;
    parts.verifier = Box::new(SmallDigits);
    let optimizer = Optimizer::new(&served.weights, OptimizerSettings::new(&config.train))?;
    let mut trainer = Trainer::new(config, parts, &served, optimizer, (0, VecDeque::new()));
    let steps = (0..STEPS).map(|_| trainer.step(&mut |_| {}));
    let steps = steps.collect::<Result<Vec<StepMetrics>, _>>()?;
    let moved = addresses.iter().zip(self::addresses(&served.weights)).filter(|(a, b)| *a != b);
    let moved = moved.count() as f64;
    served.shutdown();
    let mean = |steps: &[StepMetrics]| {
        steps.iter().map(|step| step.reward_mean).sum::<f64>() / steps.len() as f64
    };
    let (first, last) = (mean(&steps[..ENDS]), mean(&steps[STEPS - ENDS..]));
    let largest = |of: fn(&StepMetrics) -> f64| steps.iter().map(of).fold(0.0, f64::max);
    let updates = steps.last().map_or(0.0, |step| step.weight_version as f64);
    // A step without a mixed group, when all is learnt, has nothing to update for.
    let mixed = steps.iter().filter(|step| step.groups_mixed > 0).count();
    let mut rise = Check::new("20 GRPO steps: rise of the reward", last - first, Limit::Least(0.1));
    rise.note = format!("from {first:.3} to {last:.3}");
    Ok(vec![
        rise,
        Check::new("20 GRPO steps: updates", updates, Limit::Least(mixed as f64)),
        Check::new(
            "20 GRPO steps: engine against trainer, mean",
            largest(|s| s.mismatch_mean),
            place.most(1e-5, 3e-2),
        ),
        Check::new("20 GRPO steps: weights that moved", moved, Limit::Most(0.0)),
    ])
}

/// Saved weights, loaded again, are the same.
pub fn checkpoint(place: &Place, path: &Path) -> Result<Vec<Check>, anyhow::Error> {
    let config = place.config(path, &[])?;
    let checkpoint = load_to(&config.model.path, place.placement)?;
    let weights = Weights::new(checkpoint.tensors);
    let folder = tempfile::tempdir()?;
    save_weights(&weights, &folder.path().join("model.safetensors"))?;
    save_source(&checkpoint.source, &weights, folder.path())?;
    let again = load_to(&folder.path().to_string_lossy(), place.placement)?;
    let other = weights.iter().zip(&again.tensors).filter(|((_, a), (_, b))| !a.equal(b)).count();
    Ok(vec![Check::new("a checkpoint: tensors that differ", other as f64, Limit::Most(0.0))])
}

fn addresses(weights: &Weights) -> Vec<usize> {
    weights.iter().map(|(_, tensor)| tensor.data_ptr() as usize).collect()
}
