//! Token gates: which response tokens take part in the loss.

/// Statistics of all valid response tokens of one training batch, before any split into
/// micro-batches. All slices have the same length; entry `t` is about token `t`.
#[derive(Debug, Clone, Copy)]
pub struct TokenBatch<'a> {
    /// `ln p` of the token when it was drawn, in nats.
    pub logprob: &'a [f32],
    /// Entropy of its distribution, in nats.
    pub entropy: &'a [f32],
    /// Baseline `E_p[S]` of its distribution.
    pub baseline: &'a [f32],
    /// Advantage of the sample that the token belongs to.
    pub advantage: &'a [f32],
    /// Which sample of the batch the token belongs to.
    pub sample: &'a [usize],
}

impl TokenBatch<'_> {
    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.logprob.len()
    }

    /// True if there is no token.
    pub fn is_empty(&self) -> bool {
        self.logprob.is_empty()
    }

    /// The discriminator `S* = p (H + ln p)` of each token (arXiv 2602.03392).
    pub fn discriminator(&self) -> Vec<f32> {
        let pairs = self.logprob.iter().zip(self.entropy);
        pairs.map(|(logp, h)| logp.exp() * (h + logp)).collect()
    }
}

/// Decides which tokens stay in the loss. A dropped token leaves numerator and denominator of the
/// token mean; advantages do not change. Called once per training batch.
pub trait TokenGate: Send {
    /// For every token of the batch, whether it stays.
    fn keep(&self, batch: &TokenBatch<'_>) -> Vec<bool>;
}
