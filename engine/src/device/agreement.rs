//! Whether kernels of our own agree with libtorch's operations, on the device and with the model at hand.
//!
//! Kernels are compiled where they run, for devices that nobody has tried them on too. So before an engine
//! takes a request it computes some steps both ways, and does without kernels that are off.

use super::{
    distance,
    pages::DevicePages,
    plan::{StepPlan, StepRows},
    stats::batch_stats,
    upload,
};
use crate::{
    block_manager::BLOCK_SIZE,
    cuda::{self, plan::Machine, sampling},
    kernels::attention::Span,
    model::{
        attention::{Attention, DeviceBatch},
        decoder::Decoder,
    },
    panic::message,
};
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
/// How far what the same logits say may lie apart, as a part of the largest number.
const SAME_STATISTICS: f64 = 1e-3;
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

/// Computes some steps with kernels and without, and compares what comes of them; `machine` is what kernels of
/// attention have to know. `pages` are not in use: what is in them afterwards is nobody's. A pool of few blocks
/// is too small for that, and a model that gives no numbers says nothing.
///
/// # Errors
/// Why the kernels cannot be used.
pub fn check(
    decoder: &Decoder,
    pages: &DevicePages,
    machine: Option<Machine>,
) -> Result<(), String> {
    if pages.num_blocks() < BLOCKS as usize {
        return Ok(());
    }
    let compared = || tch::no_grad(|| compare(decoder, pages, machine));
    catch_unwind(AssertUnwindSafe(compared)).unwrap_or_else(|panic| {
        Err(message(panic.as_ref()).unwrap_or("a panic without a text").to_string())
    })
}

fn compare(decoder: &Decoder, pages: &DevicePages, machine: Option<Machine>) -> Result<(), String> {
    let got = Outcome::of(decoder, pages, machine);
    let wanted = cuda::without(|| Outcome::of(decoder, pages, None));
    if !all_finite(&wanted.logits) {
        return Ok(());
    }
    let within = |what: &str, distance: f64, most: f64| match distance <= most {
        true => Ok(()),
        false => Err(format!("{what} are off by {distance:.1e}, of which {most:.1e} may be noise")),
    };
    let noise = SLACK * noise(decoder);
    for (got, wanted) in got.hidden.iter().zip(&wanted.hidden) {
        within("hidden states", relative_error(got, wanted), noise)?;
    }
    within("logits", relative_error(&got.logits, &wanted.logits), noise)?;
    within("statistics of logits", farthest_statistic(&wanted.logits), SAME_STATISTICS)
}

/// What the roundings of a model's layers add up to, as a part of its numbers: each is off by the type's
/// precision at most, by that over the root of three on average.
fn noise(decoder: &Decoder) -> f64 {
    let precision = match decoder.placement().kind {
        Kind::BFloat16 => 2f64.powi(-9),
        Kind::Half => 2f64.powi(-12),
        // What exponentials and roots of the devices' are good for, and some.
        _ => 2f64.powi(-19),
    };
    precision * (ROUNDINGS * decoder.num_layers() as f64 / 3.0).sqrt()
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

/// Of a token's log-prob, the rows' entropies and their baselines.
fn farthest_statistic(logits: &Tensor) -> f64 {
    let tokens = upload(&vec![1i64; logits.size()[0] as usize], logits.device());
    let Ok(got) = sampling::stats(logits, &tokens, 1.0) else { return 0.0 };
    let wanted = batch_stats(logits, &tokens, 1.0);
    let column = |i| distance(&got.numbers.select(1, 1 + i), &wanted.select(1, i));
    (0..3).map(column).fold(0.0, f64::max)
}

fn all_finite(tensor: &Tensor) -> bool {
    tensor.isfinite().all().int64_value(&[]) == 1
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
        let (first, blocks) = (rows.tokens.len(), &blocks[*sequence][..]);
        for position in positions.clone() {
            let token = (31 * position + 1009 * (sequence / 2) + 3) % vocab;
            let slot = blocks[position / BLOCK_SIZE] as usize * BLOCK_SIZE + position % BLOCK_SIZE;
            rows.tokens.push(token as i64);
            rows.positions.push(position as i64);
            rows.slots.push(slot as u32);
        }
        let (rows_of_it, first_position) = (first..rows.tokens.len(), positions.start);
        rows.spans.push(Span { rows: rows_of_it, first_position, blocks });
    }
    rows
}
