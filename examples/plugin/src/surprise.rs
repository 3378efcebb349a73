//! A token gate: tokens that were very unlikely when they were drawn leave the loss.

use onpolicy_plugin_api::{TokenBatch, TokenGate};
use serde::Deserialize;

/// Drops tokens whose surprise `-ln p` is more than `nats` above the entropy of their position.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Surprise {
    /// How much more than expected, in nats.
    nats: f32,
}

impl Default for Surprise {
    fn default() -> Self {
        Self { nats: 4.0 }
    }
}

impl TokenGate for Surprise {
    fn keep(&self, batch: &TokenBatch<'_>) -> Vec<bool> {
        let positions = batch.logprob.iter().zip(batch.entropy);
        positions.map(|(logprob, entropy)| -logprob - entropy <= self.nats).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_surprises_are_dropped() {
        let (logprob, entropy) = ([-0.1, -3.0, -6.0], [0.2, 0.5, 5.0]);
        let batch = TokenBatch {
            logprob: &logprob,
            entropy: &entropy,
            baseline: &[0.0; 3],
            advantage: &[1.0; 3],
            sample: &[0; 3],
        };
        assert_eq!(Surprise { nats: 2.0 }.keep(&batch), [true, false, true]);
    }
}
