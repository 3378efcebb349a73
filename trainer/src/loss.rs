//! The policy-gradient loss: PPO's clipped objective per token, and its gradient through the model.

use crate::{
    batch::MicroBatch,
    config::Config,
    correction::{Correction, Mismatch, truncated_weight},
    head::Head,
};
use onpolicy_engine::{
    cuda::takes,
    model::{attention::Attention, checkpointing::Checkpoints, decoder::Decoder},
    ops::embedding::accumulate_embedding_gradient,
    torch::{TorchError, autograd::backward},
};
use onpolicy_plugin_api::TokenStats;
use tch::{Device, Tensor};

/// Rows of the head that exist at a time; `[rows, vocabulary]` is the largest tensor made. Kernels of a GPU take
/// more of them, because every chunk adds to the whole of the head's gradient.
pub fn head_rows(device: Device) -> usize {
    if takes(device) { 1024 } else { 256 }
}

/// The clipped objective of PPO (arXiv 1707.06347) with dual clip (arXiv 1912.09729).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PpoClip {
    /// The ratio counts down to `1 - low`.
    pub low: f32,
    /// The ratio counts up to `1 + high`.
    pub high: f32,
    /// Where the advantage is negative the objective is not below `dual * advantage`.
    pub dual: f32,
}

/// The objective of one token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenObjective {
    /// Its value, to be made large.
    pub value: f32,
    /// Its derivative by the token's log-prob.
    pub slope: f32,
    /// True if clipping changed the value.
    pub clipped: bool,
}

impl PpoClip {
    /// `min(r A, clip(r, 1 - low, 1 + high) A)`, at least `dual * A` where `A < 0`.
    pub fn objective(&self, ratio: f32, advantage: f32) -> TokenObjective {
        let free = ratio * advantage;
        let bounded = ratio.clamp(1.0 - self.low, 1.0 + self.high) * advantage;
        let mut value = free.min(bounded);
        let mut clipped = bounded < free;
        if advantage < 0.0 && value < self.dual * advantage {
            (value, clipped) = (self.dual * advantage, true);
        }
        TokenObjective { value, slope: if clipped { 0.0 } else { free }, clipped }
    }
}

/// What the loss of some tokens came to. Sums, so that micro-batches add up.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LossSums {
    /// Sum of the objective over kept tokens; the loss is minus its mean.
    pub objective: f64,
    /// Kept tokens whose objective was clipped.
    pub clipped: usize,
    /// All response tokens.
    pub tokens: usize,
    /// Sum of the importance ratios of all tokens.
    pub ratio: f64,
    /// Largest distance of a ratio from 1.
    pub ratio_deviation: f64,
    /// Sum of `r - 1 - ln r`, the k3 estimate of KL(old, new), over all tokens.
    pub kl: f64,
    /// The trainer's log-probs before the batch's first update against the engine's, over the
    /// tokens of which they are known.
    pub mismatch: Mismatch,
}

impl LossSums {
    /// Adds what another micro-batch came to.
    pub fn add(&mut self, other: &Self) {
        self.objective += other.objective;
        self.clipped += other.clipped;
        self.tokens += other.tokens;
        self.ratio += other.ratio;
        self.ratio_deviation = self.ratio_deviation.max(other.ratio_deviation);
        self.kl += other.kl;
        self.mismatch.add(&other.mismatch);
    }
}

/// Settings of the loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossSettings {
    /// The clipping.
    pub clip: PpoClip,
    /// Temperature that the samples were drawn at.
    pub temperature: f32,
    /// Kept tokens of the whole mini-batch: the mean's denominator.
    pub kept: usize,
    /// Whether the weights are still those before the batch's first update.
    pub first: bool,
    /// Cap of truncated importance sampling; none where the engine's log-probs are the old ones.
    pub tis_cap: Option<f32>,
}

impl LossSettings {
    /// The settings of `config` for a mini-batch that keeps so many tokens.
    pub fn new(config: &Config, kept: usize, first: bool) -> Self {
        let train = &config.train;
        Self {
            clip: PpoClip {
                low: train.clip_low as f32,
                high: train.clip_high as f32,
                dual: train.dual_clip as f32,
            },
            temperature: config.rollout.temperature as f32,
            kept,
            first,
            tis_cap: (train.correction == Correction::Tis).then_some(train.tis_cap as f32),
        }
    }

    /// PPO's old log-prob of a token and the weight of its loss. `before` is its log-prob under the
    /// trainer before the batch's first update.
    fn old_policy(&self, engine: f32, before: f32) -> (f32, f32) {
        match self.tis_cap {
            Some(cap) => (before, truncated_weight(before - engine, cap)),
            None => (engine, 1.0),
        }
    }
}

/// What of a forward pass is kept for the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activations {
    /// All that it needs.
    #[default]
    Kept,
    /// The inputs of the layers; each layer is run again.
    Recomputed,
}

/// Adds the gradient of the mini-batch's loss that comes from `micro` to the weights' gradients.
/// The head is computed for response tokens only, in chunks, forward and backward at once: its
/// gradient is known in closed form, `slope (onehot - softmax) / temperature`.
///
/// # Errors
/// What libtorch refuses.
pub fn accumulate_gradient(
    decoder: &Decoder,
    micro: &MicroBatch,
    settings: &LossSettings,
) -> Result<LossSums, TorchError> {
    accumulate_gradient_with(decoder, micro, settings, Activations::Kept)
}

/// As [`accumulate_gradient`], with a choice of what is kept in between.
///
/// # Errors
/// What libtorch refuses.
pub fn accumulate_gradient_with(
    decoder: &Decoder,
    micro: &MicroBatch,
    settings: &LossSettings,
    activations: Activations,
) -> Result<LossSums, TorchError> {
    let tokens = micro.pack.tokens();
    let embedded = onpolicy_engine::torch::no_grad(|| decoder.embed(&tokens));
    let mut sums = LossSums::default();
    let gradient = match activations {
        Activations::Kept => {
            let embedded = embedded.set_requires_grad(true);
            let rows = predicting_rows(decoder, micro, embedded.shallow_clone());
            backward(&rows, &head_gradient(decoder, micro, settings, &rows, &mut sums))?;
            embedded.grad()
        }
        Activations::Recomputed => {
            let checkpoints = Checkpoints::run(decoder, embedded, &micro.pack);
            let rows = predicting(&checkpoints.hidden(), micro);
            backward(&rows, &head_gradient(decoder, micro, settings, &rows, &mut sums))?;
            checkpoints.backward()?
        }
    };
    accumulate_embedding_gradient(decoder.embedding(), &tokens, &gradient)?;
    Ok(sums)
}

/// Runs `rows` (`[tokens, hidden]`) through the head and the loss: adds to the head's gradient and
/// to `sums`, and gives the gradient by `rows`.
fn head_gradient(
    decoder: &Decoder,
    micro: &MicroBatch,
    settings: &LossSettings,
    rows: &Tensor,
    sums: &mut LossSums,
) -> Tensor {
    let hidden = rows.detach();
    let by_hidden = hidden.empty_like();
    let head = Head::new(decoder, settings.temperature);
    let most = head_rows(rows.device());
    for start in (0..micro.targets.len()).step_by(most) {
        let len = most.min(micro.targets.len() - start);
        let targets = &micro.targets[start..start + len];
        let [chunk, mut gradient] =
            [&hidden, &by_hidden].map(|all| all.narrow(0, start as i64, len as i64));
        onpolicy_engine::torch::no_grad(|| {
            let (logits, stats) = head.forward(&chunk, targets);
            let slopes = token_slopes(micro, start, &stats, settings, sums);
            gradient.copy_(&head.backward(logits, (targets, &slopes), &chunk));
        });
    }
    by_hidden
}

/// Statistics of every response token of `micro` under the weights as they are now.
pub fn token_stats(decoder: &Decoder, micro: &MicroBatch, temperature: f32) -> Vec<TokenStats> {
    onpolicy_engine::torch::no_grad(|| {
        let tokens = micro.pack.tokens();
        let hidden = predicting_rows(decoder, micro, decoder.embed(&tokens));
        let head = Head::new(decoder, temperature);
        let most = head_rows(hidden.device());
        let chunks = micro.targets.chunks(most).enumerate();
        let stats = chunks.flat_map(|(number, targets)| {
            let start = (number * most) as i64;
            head.forward(&hidden.narrow(0, start, targets.len() as i64), targets).1
        });
        stats.collect()
    })
}

/// Hidden states of the rows that predict a response token, `[tokens, hidden]`.
fn predicting_rows(decoder: &Decoder, micro: &MicroBatch, embedded: Tensor) -> Tensor {
    let positions = micro.pack.positions();
    let hidden = decoder.hidden_of(embedded, &positions, &mut Attention::Causal(&micro.pack));
    predicting(&hidden, micro)
}

fn predicting(hidden: &Tensor, micro: &MicroBatch) -> Tensor {
    hidden.index_select(0, &Tensor::from_slice(&micro.rows).to_device(hidden.device()))
}

/// Derivative of the loss by each token's log-prob, for tokens `start..` of `micro`.
fn token_slopes(
    micro: &MicroBatch,
    start: usize,
    stats: &[TokenStats],
    settings: &LossSettings,
    sums: &mut LossSums,
) -> Vec<f32> {
    let mean = 1.0 / settings.kept.max(1) as f32;
    let slope = |(offset, stats): (usize, &TokenStats)| {
        let token = start + offset;
        let engine = micro.old_logprob[token];
        let own = micro.own_logprob.get(token).copied().filter(|known| !known.is_nan());
        if let Some(before) = own.or(settings.first.then_some(stats.logprob)) {
            sums.mismatch.push(before - engine);
        }
        let (old, weight) = settings.old_policy(engine, own.unwrap_or(stats.logprob));
        let log_ratio = stats.logprob - old;
        let ratio = log_ratio.exp();
        sums.tokens += 1;
        sums.ratio += f64::from(ratio);
        sums.ratio_deviation = sums.ratio_deviation.max(f64::from(ratio - 1.0).abs());
        sums.kl += f64::from(ratio) - 1.0 - f64::from(log_ratio);
        if !micro.keep[token] {
            return 0.0;
        }
        let objective = settings.clip.objective(ratio, micro.advantage[token]);
        sums.objective += f64::from(weight * objective.value);
        sums.clipped += usize::from(objective.clipped);
        -weight * objective.slope * mean
    };
    stats.iter().enumerate().map(slope).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIP: PpoClip = PpoClip { low: 0.2, high: 0.28, dual: 3.0 };

    #[test]
    fn objective_by_hand() {
        let objective = |ratio, advantage| {
            let TokenObjective { value, slope, clipped } = CLIP.objective(ratio, advantage);
            (value, slope, clipped)
        };
        assert_eq!(objective(1.0, 2.0), (2.0, 2.0, false));
        assert_eq!(objective(1.5, 2.0), (2.56, 0.0, true));
        assert_eq!(objective(0.5, 2.0), (1.0, 1.0, false));
        assert_eq!(objective(0.5, -2.0), (-1.6, 0.0, true));
        assert_eq!(objective(1.5, -2.0), (-3.0, -3.0, false));
        assert_eq!(objective(4.0, -2.0), (-6.0, 0.0, true));
        assert_eq!(objective(1.3, 0.0), (0.0, 0.0, false));
    }
}
