//! What a run measures.
//!
//! - [`StepMetrics`]: one training step, one line of `metrics.jsonl`.
//! - [`log`]: writes and reads that file.
//! - [`summary`]: the closing table.
//! - [`staleness`]: how old the weights were that drew a step's tokens.
//! - [`memory`]: how much memory the process has used.

pub mod log;
pub mod memory;
pub mod staleness;
pub mod summary;

pub use log::{MetricsError, MetricsLog};
pub use staleness::Staleness;
pub use summary::Summary;

use serde::{Deserialize, Deserializer, Serialize};

/// One training step.
///
/// A number that could not be computed is NaN here and `null` in the file.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepMetrics {
    /// Number of the step, from 1.
    pub step: u64,
    /// Version of the weights after the step's update.
    pub weight_version: u64,

    /// Mean reward of the judged samples.
    #[serde(deserialize_with = "number_or_nan")]
    pub reward_mean: f64,
    /// Population standard deviation of the rewards.
    #[serde(deserialize_with = "number_or_nan")]
    pub reward_std: f64,
    /// Groups drawn.
    pub groups: usize,
    /// Groups whose rewards differ; only they teach something.
    pub groups_mixed: usize,
    /// Groups left out because a sample could not be judged.
    pub groups_failed: usize,

    /// Samples drawn.
    pub samples: usize,
    /// Tokens of the prompts, each prompt counted once.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
    /// Mean tokens of a sample.
    #[serde(deserialize_with = "number_or_nan")]
    pub completion_len_mean: f64,
    /// Share of the samples cut off by the token limit.
    #[serde(deserialize_with = "number_or_nan")]
    pub truncated_fraction: f64,
    /// Weight versions between a token's draw and the step's first update, mean over the tokens.
    #[serde(deserialize_with = "number_or_nan")]
    pub staleness_mean: f64,
    /// The same, largest.
    pub staleness_max: u64,

    /// Mean entropy of the generated tokens' distributions, in nats.
    #[serde(deserialize_with = "number_or_nan")]
    pub entropy: f64,
    /// Change of the mean entropy that the theory predicts for this update, in nats (logit
    /// space).
    #[serde(deserialize_with = "number_or_nan")]
    pub entropy_predicted: f64,
    /// Change of the mean entropy over the probe tokens from when they were drawn to after the
    /// update, in nats; none if it was not measured. With a staleness of 0 that is what the update
    /// did.
    pub entropy_measured: Option<f64>,
    /// Mean of the discriminator `S*`.
    #[serde(deserialize_with = "number_or_nan")]
    pub score_mean: f64,
    /// Population standard deviation of `S*`.
    #[serde(deserialize_with = "number_or_nan")]
    pub score_std: f64,
    /// Mean of `S* - E_p[S]`.
    #[serde(deserialize_with = "number_or_nan")]
    pub score_gap_mean: f64,
    /// Share of the tokens that the gate dropped.
    #[serde(deserialize_with = "number_or_nan")]
    pub dropped_fraction: f64,
    /// The same among tokens with a positive advantage.
    #[serde(deserialize_with = "number_or_nan")]
    pub dropped_positive: f64,
    /// The same among tokens with a negative advantage.
    #[serde(deserialize_with = "number_or_nan")]
    pub dropped_negative: f64,

    /// Mean loss of the kept tokens.
    #[serde(deserialize_with = "number_or_nan")]
    pub loss: f64,
    /// Share of the kept tokens on which PPO's clip took hold.
    #[serde(deserialize_with = "number_or_nan")]
    pub clip_fraction: f64,
    /// Global gradient norm before clipping.
    #[serde(deserialize_with = "number_or_nan")]
    pub grad_norm: f64,
    /// Learning rate of the update.
    #[serde(deserialize_with = "number_or_nan")]
    pub lr: f64,
    /// Mean importance ratio.
    #[serde(deserialize_with = "number_or_nan")]
    pub ratio_mean: f64,
    /// Largest `|ratio - 1|`.
    #[serde(deserialize_with = "number_or_nan")]
    pub ratio_max_deviation: f64,
    /// Estimated KL divergence of the old policy from the new one, in nats.
    #[serde(deserialize_with = "number_or_nan")]
    pub approx_kl: f64,
    /// Mean `|ln p_trainer - ln p_engine|` of the tokens before the update, in nats; with several
    /// updates of a batch and no correction, of the first update's tokens.
    #[serde(deserialize_with = "number_or_nan")]
    pub mismatch_mean: f64,
    /// The largest.
    #[serde(deserialize_with = "number_or_nan")]
    pub mismatch_max: f64,
    /// Share of those tokens whose ratio p_trainer / p_engine is outside of 0.9 to 1.1.
    #[serde(deserialize_with = "number_or_nan")]
    pub mismatch_far: f64,

    /// Seconds that the last update took to make the copies anew that are served in a narrow type;
    /// 0 without them.
    #[serde(deserialize_with = "number_or_nan")]
    pub refresh_seconds: f64,

    /// Rows of a forward and backward pass, at most: `train.micro_batch_tokens`, or less after memory
    /// has not sufficed.
    #[serde(default)]
    pub micro_batch_tokens: usize,
    /// How often memory did not suffice for a pass in this step, which was run again in smaller
    /// ones then.
    #[serde(default)]
    pub memory_retries: usize,

    /// Where the step's time went.
    pub seconds: Seconds,
    /// Generated tokens per second of the rollout.
    #[serde(deserialize_with = "number_or_nan")]
    pub tokens_per_second: f64,
    /// Most memory that the process has held so far, in MiB.
    #[serde(deserialize_with = "number_or_nan")]
    pub peak_memory_mb: f64,
    /// Most memory that tensors on a CUDA device have held so far, in MiB; none in main memory.
    #[serde(default)]
    pub peak_device_memory_mb: Option<f64>,
    /// Seconds since the run began.
    #[serde(deserialize_with = "number_or_nan")]
    pub elapsed_seconds: f64,
}

/// Wall time of a step by phase, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seconds {
    /// Drawing the samples: the engine's time, however much of it lay behind other phases.
    pub rollout: f64,
    /// Waiting for samples: the part of drawing them (or those of other steps) that held this step
    /// up.
    pub rollout_wait: f64,
    /// Judging them.
    pub reward: f64,
    /// Forward and backward passes.
    pub train: f64,
    /// Optimizer step and weight swap.
    pub update: f64,
    /// Measuring the entropy on the probe tokens.
    pub probe: f64,
    /// The whole step.
    pub total: f64,
}

impl Seconds {
    /// Drawing samples behind other phases.
    pub fn hidden(&self) -> f64 {
        (self.rollout - self.rollout_wait).max(0.0)
    }

    /// Time in none of the phases.
    pub fn other(&self) -> f64 {
        let named = self.rollout_wait + self.reward + self.train + self.update + self.probe;
        (self.total - named).max(0.0)
    }

    /// The phases by name, `other` included; they sum up to `total`. Of drawing samples only the
    /// waiting counts.
    pub fn phases(&self) -> [(&'static str, f64); 6] {
        [
            ("rollout", self.rollout_wait),
            ("reward", self.reward),
            ("train", self.train),
            ("update", self.update),
            ("probe", self.probe),
            ("other", self.other()),
        ]
    }
}

impl StepMetrics {
    /// Share of the groups whose rewards differ.
    pub fn mixed_share(&self) -> f64 {
        self.groups_mixed as f64 / self.groups.max(1) as f64
    }
}

/// Reads `null`, which is how JSON writes NaN, as NaN. A missing key stays an error.
fn number_or_nan<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Option::<f64>::deserialize(from).map(|number| number.unwrap_or(f64::NAN))
}
