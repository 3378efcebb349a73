//! Whether kernels of our own agree with libtorch's operations, on the device and with the model at hand.
//!
//! Kernels are compiled where they run, for devices that nobody has tried them on too. So before an engine
//! takes a request it computes some steps both ways, and does without kernels that are off.

use super::{
    Placement,
    pages::DevicePages,
    plan::{StepPlan, StepRows},
    sampling::sample,
};
use crate::{
    block_manager::BLOCK_SIZE,
    cuda::{self, attention::fits, plan::Machine, takes},
    model::{
        attention::{Attention, DeviceBatch},
        config::ModelConfig,
        decoder::Decoder,
    },
    panic::text,
    sampler::{Draw, Drawn},
    torch::{TorchError, is_out_of_memory, no_grad},
    weights::Weights,
};
use onpolicy_plugin_api::{SamplingParams, TokenStats};
use std::{
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
};
use tch::{Kind, Tensor};

/// Roundings of a layer, some of which kernels leave out or make elsewhere.
const ROUNDINGS: f64 = 17.0;
/// How many times their noise hidden states and logits may lie apart. SmolLM2 came to half of it, random weights
/// of 2 to 80 layers to 3.4 times, a wrong factor in one kernel to 35 and more.
const SLACK: f64 = 8.0;
/// How far what drawn tokens say may lie apart, as a part of it or of one nat.
const SAME_STATISTICS: f64 = 1e-3;
/// Draws from each row of logits; of all of them one may be another, whose random number lies on a border.
const DRAWS: usize = 4;
/// Blocks that two sequences share: enough tokens to be read once for both.
const SHARED: u32 = 17;
/// Tokens of these.
const PREFIX: usize = SHARED as usize * BLOCK_SIZE;
/// Blocks that the steps need.
const BLOCKS: u32 = SHARED + 5;
/// Which tokens of which sequence each step computes: of prompts from their beginning; of prompts, beside
/// sequences that go on; of these alone.
const STEPS: [&[(usize, Range<usize>)]; 3] = [
    &[(0, 0..PREFIX), (2, 0..20)],
    &[(0, PREFIX..PREFIX + 1), (1, PREFIX..PREFIX + 8), (2, 20..37)],
    &[(0, PREFIX + 1..PREFIX + 2), (1, PREFIX + 8..PREFIX + 9), (2, 37..38)],
];

/// What kernels of attention have to know of a device; none where they are not for a model's heads.
pub fn machine(config: &ModelConfig, placement: Placement) -> Option<Machine> {
    let (heads, kv_heads, head_dim) = (config.num_heads, config.num_kv_heads, config.head_dim);
    let machine = || Machine::of(placement.device, heads, kv_heads, head_dim).ok();
    fits(placement.kind, heads, kv_heads, head_dim).then(machine).flatten()
}

/// As [`settle`], of weights that nobody works with yet, before anything is measured on their device.
///
/// # Errors
/// The device has no memory for some pages.
pub fn settle_early(config: &ModelConfig, weights: &Weights) -> Result<(), TorchError> {
    let placement = weights.placement();
    if takes(placement.device) {
        let decoder = Decoder::new(config, weights);
        let pages = DevicePages::new(config, BLOCKS as usize, placement)?;
        settle(&decoder, &pages, machine(config, placement));
    }
    Ok(())
}

/// Computes some steps with kernels and without, and compares what comes of them; where that differs, or a
/// kernel fails, libtorch's operations do for kernels in all of the process, and this is false. `machine` is
/// what kernels of attention have to know. `pages` are not in use: what is in them afterwards is nobody's.
/// Nothing is said of kernels where the pool has fewer than 22 blocks, the model gives no numbers, or memory does
/// not suffice.
pub fn settle(decoder: &Decoder, pages: &DevicePages, machine: Option<Machine>) -> bool {
    let Err(why) = check(decoder, pages, machine) else { return true };
    tracing::warn!(
        why,
        "kernels are set aside on this device, and libtorch's operations do, which are slower; please \
         report what 'onpolicy bench check --device cuda' says"
    );
    cuda::set_aside();
    // They may have left what is no number.
    if let Err(error) = pages.clear() {
        tracing::error!(%error, "the device has failed; start again with model.kernels = false");
    }
    false
}

fn check(decoder: &Decoder, pages: &DevicePages, machine: Option<Machine>) -> Result<(), String> {
    if pages.num_blocks() < BLOCKS as usize {
        tracing::info!("too few pages to compare kernels with libtorch's operations");
        return Ok(());
    }
    let unknown = |why: String| {
        tracing::warn!(why, "kernels cannot be compared with libtorch's operations");
        Ok(())
    };
    let wanted = match wanted(decoder, pages) {
        Ok(Some(wanted)) => wanted,
        Ok(None) => return Ok(()),
        Err(why) => return unknown(why),
    };
    let noise = noise(decoder.placement().kind, decoder.num_layers());
    match attempt(|| compare(&Outcome::of(decoder, pages, machine), &wanted, noise)) {
        Err(why) if is_out_of_memory(&why) => unknown(why),
        compared => compared.flatten(),
    }
}

/// What libtorch's operations make of the steps, and tokens from it; none if these are no numbers. The pages
/// are empty afterwards: what kernels do not write is not to be there already.
fn wanted(decoder: &Decoder, pages: &DevicePages) -> Result<Option<(Outcome, Vec<Drawn>)>, String> {
    let made = attempt(|| {
        cuda::without(|| {
            let outcome = Outcome::of(decoder, pages, None);
            outcome.are_numbers().then(|| {
                let drawn = draw(&outcome.logits);
                (outcome, drawn)
            })
        })
    })?;
    pages.clear().map_err(|error| error.to_string())?;
    Ok(made)
}

/// What `work` makes, or what its panic said.
fn attempt<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    let made = catch_unwind(AssertUnwindSafe(|| no_grad(work)));
    made.map_err(|panic| text(panic.as_ref()))
}

fn compare(
    got: &Outcome,
    (wanted, drawn): &(Outcome, Vec<Drawn>),
    noise: f64,
) -> Result<(), String> {
    let within = |what: &str, distance: f64, most: f64| match distance <= most {
        true => Ok(()),
        false => Err(format!("{what} are off by {distance:.1e}, where {most:.1e} may be noise")),
    };
    for (got, wanted) in got.hidden.iter().zip(&wanted.hidden) {
        within("hidden states", relative_error(got, wanted), SLACK * noise)?;
    }
    within("logits", relative_error(&got.logits, &wanted.logits), SLACK * noise)?;
    let got = draw(&wanted.logits);
    let (same, others): (Vec<_>, Vec<_>) =
        got.iter().zip(drawn).partition(|(got, wanted)| got.id == wanted.id);
    if others.len() > 1 {
        return Err(format!("{} of {} tokens are drawn otherwise", others.len(), drawn.len()));
    }
    for (got, wanted) in same {
        let statistics = numbers(&got.stats).into_iter().zip(numbers(&wanted.stats));
        for (got, wanted) in statistics {
            let distance = (got - wanted).abs() / wanted.abs().max(1.0);
            within("statistics of logits", distance, SAME_STATISTICS)?;
        }
    }
    Ok(())
}

/// Tokens of each row: the likeliest, and some at random.
fn draw(logits: &Tensor) -> Vec<Drawn> {
    let random = SamplingParams::default();
    let greedy = SamplingParams { temperature: 0.0, ..random.clone() };
    let of_row = |row| {
        let random = &random;
        let draws = (0..DRAWS).map(move |position| Draw { position, ..Draw::new(row, random) });
        draws.chain([Draw::new(row, &greedy)])
    };
    let draws: Vec<Draw<'_>> = (0..logits.size()[0] as usize).flat_map(of_row).collect();
    let drawn = sample(logits, &draws);
    drawn.into_iter().map(|drawn| drawn.unwrap_or_else(|why| panic!("{why}"))).collect()
}

fn numbers(stats: &TokenStats) -> [f64; 3] {
    [stats.logprob, stats.entropy, stats.baseline].map(f64::from)
}

/// What the roundings of so many layers add up to, as a part of a model's numbers: each is off by the type's
/// precision at most, by that over the root of three on average.
pub(crate) fn noise(kind: Kind, layers: usize) -> f64 {
    let precision = match kind {
        Kind::BFloat16 => 2f64.powi(-9),
        Kind::Half => 2f64.powi(-12),
        // What exponentials and roots of the devices' are good for, and some.
        _ => 2f64.powi(-19),
    };
    precision * (ROUNDINGS * layers as f64 / 3.0).sqrt()
}

/// The root of the mean square of `got - wanted`, as a part of that of `wanted`.
fn relative_error(got: &Tensor, wanted: &Tensor) -> f64 {
    let [got, wanted] = [got, wanted].map(|t| t.to_kind(Kind::Double));
    let size = |t: &Tensor| t.square().mean(Kind::Double).sqrt().double_value(&[]);
    match size(&(got - &wanted)) {
        0.0 => 0.0,
        error if error.is_nan() => f64::INFINITY,
        error => error / size(&wanted),
    }
}

/// What comes of the steps.
struct Outcome {
    /// Of each step, `[rows, hidden]`.
    hidden: Vec<Tensor>,
    /// Of the last step.
    logits: Tensor,
}

impl Outcome {
    fn of(decoder: &Decoder, pages: &DevicePages, machine: Option<Machine>) -> Self {
        let blocks = blocks();
        let vocab = decoder.head().size()[0] as usize;
        let hidden = STEPS.map(|parts| {
            let rows = rows(parts, &blocks, vocab);
            let plan = StepPlan::new(&rows, decoder.placement().device, machine);
            let attention = &mut Attention::OnDevice(DeviceBatch { pages, plan: &plan });
            decoder.hidden(&plan.tokens, &plan.positions, attention)
        });
        let logits = decoder.logits(&hidden[STEPS.len() - 1]);
        Self { hidden: hidden.into(), logits }
    }

    /// Whether all of it is finite.
    fn are_numbers(&self) -> bool {
        let mut all = self.hidden.iter().chain([&self.logits]);
        all.all(|tensor| tensor.isfinite().all().int64_value(&[]) == 1)
    }
}

/// Block tables of three sequences, the first two of which begin alike.
fn blocks() -> [Vec<u32>; 3] {
    let with_prefix = |own: u32| (0..SHARED).chain([own]).collect();
    [with_prefix(SHARED + 1), with_prefix(SHARED), vec![SHARED + 4, SHARED + 2, SHARED + 3]]
}

fn rows<'a>(
    parts: &[(usize, Range<usize>)],
    blocks: &'a [Vec<u32>; 3],
    vocab: usize,
) -> StepRows<'a> {
    let mut rows = StepRows::default();
    for (sequence, positions) in parts {
        let token = |position: usize| {
            let alike = position < PREFIX && *sequence < 2;
            let of_its_own = if alike { 0 } else { 1009 * (sequence + 1) };
            ((31 * position + of_its_own + 3) % vocab) as i64
        };
        rows.push(positions.clone().map(token), positions.start, &blocks[*sequence]);
    }
    rows
}
