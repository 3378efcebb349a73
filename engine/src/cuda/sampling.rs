//! Logits to tokens, their statistics and their gradients, on the device.
//!
//! Random numbers are those of `sampler`, and tokens lie on their line in the same order; so a seed
//! means the same token, except where a number falls on a border that sums of another rounding move.
//! What looks at all logits (`top_k`, `top_p`, `min_p`, `top_logprobs`, penalties, masks, raw log-probs
//! at another temperature; see [`How::of`]) is not for these kernels: the sampler draws from a copy of
//! the row on the CPU.

use super::{
    CudaError,
    launch::{Argument, Launch, device_of, require},
    source::{Element, Program},
};
use crate::{
    device::{fetch, upload},
    sampler::{
        self, Drawn, NOTHING_LEFT, random_number,
        summed::{inv_temperature, needs_logits},
    },
    torch::{event::Event, slices::floats},
};
use onpolicy_plugin_api::TokenStats;
use std::{ffi::c_void, ptr::null};
use tch::{Device, Kind, Tensor};

/// Logits that a warp sums up.
const SLICE: usize = 512;
/// Numbers of f32 that it leaves.
const SUMS: i64 = 6;
/// Warps of a block that sum up slices of one row.
const WARPS: usize = 8;
/// Logits whose gradients a block makes.
const GRADIENTS: usize = 4096;

/// As in sampling.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Draw {
    logits: *const c_void,
    how: *const f64,
    given: *const i64,
    slices: *mut f32,
    out: *mut f32,
    tokens: *mut i64,
    sums: *mut f64,
    stride: i64,
    vocab: i32,
    count: i32,
}

impl Argument for Draw {}

/// As in sampling.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Gradient {
    logits: *const c_void,
    out: *mut c_void,
    tokens: *const i64,
    scales: *const f32,
    sums: *const f64,
    stride: i64,
    out_stride: i64,
    vocab: i32,
    factor: f32,
}

impl Argument for Gradient {}

/// How to draw from one row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct How {
    /// One over the temperature.
    pub inv_temperature: f32,
    /// A number in [0, 1); none: the likeliest token, the first of equal ones.
    pub number: Option<f64>,
}

impl How {
    /// That of a draw from `vocab` logits, with its own random number; none if it has to see all
    /// logits.
    pub fn of(draw: &sampler::Draw, vocab: usize) -> Option<Self> {
        if needs_logits(draw, vocab) {
            return None;
        }
        let random = draw.params.temperature > 0.0;
        let number = random.then(|| random_number(draw));
        Some(Self { inv_temperature: inv_temperature(draw), number })
    }
}

/// How to draw from each row of a step, on the device.
#[derive(Debug)]
pub struct DrawPlan(Tensor);

impl DrawPlan {
    /// For as many rows as there are in `hows`, on `device`.
    pub fn new(hows: &[How], device: Device) -> Self {
        let numbers = hows
            .iter()
            .flat_map(|how| [f64::from(how.inv_temperature), how.number.unwrap_or(-1.0)]);
        let numbers: Vec<f64> = numbers.collect();
        Self(upload(&numbers, device).view([hows.len() as i64, 2]))
    }

    /// Rows that it is for.
    pub fn rows(&self) -> usize {
        self.0.size()[0] as usize
    }
}

/// What rows say of one token each.
#[derive(Debug)]
pub struct RowNumbers {
    /// `[rows, 4]`, f32: the token, or -1, -2, -3 where a row is no distribution (see [`token`]); its
    /// log-prob; the row's entropy H and baseline E_p\[S\].
    pub numbers: Tensor,
    /// `[rows]`, i64: the token, or 0 where there is none.
    pub tokens: Tensor,
    /// `[rows, 2]`, f64: the largest logit, and Z (NaN where a row is no distribution).
    pub sums: Tensor,
}

impl RowNumbers {
    /// Sends the numbers to the host; waits for nothing.
    ///
    /// # Errors
    /// What libtorch says.
    pub fn to_host(&self) -> Result<Coming, CudaError> {
        let numbers = fetch(&self.numbers)?;
        let sent = match self.numbers.device() {
            Device::Cuda(index) => Some(Event::record(index)?),
            _ => None,
        };
        Ok(Coming { numbers, sent })
    }
}

/// Numbers of rows on their way to the host.
#[derive(Debug)]
pub struct Coming {
    numbers: Tensor,
    sent: Option<Event>,
}

impl Coming {
    /// What was drawn, or what is wrong with a row, as the sampler says it. Waits for the device to have
    /// sent the numbers, and no longer.
    ///
    /// # Errors
    /// What the device says.
    pub fn wait(self) -> Result<Vec<Result<Drawn, String>>, CudaError> {
        if let Some(sent) = self.sent {
            sent.wait()?;
        }
        Ok(floats(&self.numbers).as_chunks::<4>().0.iter().map(token).collect())
    }
}

/// Draws a token from each row of `logits`, `[rows, vocab]`, as the plan has it.
///
/// # Errors
/// Shapes or types that do not fit, or what [`Launch::run`] says.
pub fn draw(logits: &Tensor, plan: &DrawPlan) -> Result<RowNumbers, CudaError> {
    look(logits, plan, None)
}

/// What rows of `logits`, `[rows, vocab]`, say of `tokens`, `[rows]`, i64, after division by the
/// temperature. A token that is not below `vocab` has NaN for its log-prob.
///
/// # Errors
/// As [`draw`].
pub fn stats(
    logits: &Tensor,
    tokens: &Tensor,
    inv_temperature: f32,
) -> Result<RowNumbers, CudaError> {
    let how = How { inv_temperature, number: None };
    let rows = tokens.numel();
    let plan = DrawPlan::new(&vec![how; rows], logits.device());
    let plain = tokens.kind() == Kind::Int64 && tokens.is_contiguous();
    require(plain && tokens.device() == logits.device(), || format!("tokens {tokens:?}"))?;
    look(logits, &plan, Some(tokens))
}

/// Elements from row to row of logits that kernels take, and how many there are of each.
fn shape_of(logits: &Tensor, rows: usize) -> Result<(Element, i64, usize), CudaError> {
    let (size, stride) = (logits.size(), logits.stride());
    let said = || format!("logits {logits:?} of stride {stride:?} for {rows} rows");
    let element = Element::of(logits.kind()).ok_or_else(|| CudaError::Unsupported(said()))?;
    let shaped = size.len() == 2 && size[0] == rows as i64 && (1..1 << 24).contains(&size[1]);
    require(shaped && stride[1] == 1, said)?;
    Ok((element, stride[0], size[1] as usize))
}

fn look(logits: &Tensor, plan: &DrawPlan, given: Option<&Tensor>) -> Result<RowNumbers, CudaError> {
    let rows = plan.rows();
    let (element, stride, vocab) = shape_of(logits, rows)?;
    let device = device_of(&[logits, &plan.0])?;
    let count = vocab.div_ceil(SLICE);
    let room = |shape: &[i64], kind| Tensor::empty(shape, (kind, device));
    let slices = room(&[rows as i64, count as i64, SUMS], Kind::Float);
    let numbers = room(&[rows as i64, 4], Kind::Float);
    let tokens = room(&[rows as i64], Kind::Int64);
    let sums = room(&[rows as i64, 2], Kind::Double);
    let argument = Draw {
        logits: logits.data_ptr(),
        how: plan.0.data_ptr().cast(),
        given: given.map_or(null(), |tokens| tokens.data_ptr().cast()),
        slices: slices.data_ptr().cast(),
        out: numbers.data_ptr().cast(),
        tokens: tokens.data_ptr().cast(),
        sums: sums.data_ptr().cast(),
        stride,
        vocab: vocab as i32,
        count: count as i32,
    };
    let program = Program::Sampling(element);
    let launch = |name, grid| Launch::plain(program, name, grid);
    // SAFETY: shapes and types were checked, and there is room for what is written.
    unsafe {
        launch("sum_slices", [count.div_ceil(WARPS), rows]).run(device, &argument)?;
        launch("draw", [rows, 1]).run(device, &argument)?;
    }
    Ok(RowNumbers { numbers, tokens, sums })
}

/// The gradient of `sum_i scales[i] * ln p_i(tokens[i])` by `logits`, `[rows, vocab]`, as numbers of type
/// `kind`: over the logits themselves where that is their type. p_i is the softmax of row `i` times
/// `inv_temperature`. `sums` is of [`stats`] of the same logits at the same temperature, `scales` is
/// `[rows]`, f32. Where a row is no distribution it becomes NaN.
///
/// # Errors
/// As [`draw`].
pub fn gradient(
    logits: Tensor,
    (tokens, scales): (&Tensor, &Tensor),
    inv_temperature: f32,
    sums: &Tensor,
    kind: Kind,
) -> Result<Tensor, CudaError> {
    let rows = tokens.numel();
    let (element, stride, vocab) = shape_of(&logits, rows)?;
    let device = device_of(&[&logits, tokens, scales, sums])?;
    let name = match kind {
        kind if kind == logits.kind() => "gradient",
        Kind::BFloat16 => "gradient_bf16",
        Kind::Half => "gradient_f16",
        _ => return Err(CudaError::Unsupported(format!("gradients of type {kind:?}"))),
    };
    let out = match name {
        "gradient" => logits.shallow_clone(),
        _ => Tensor::empty([rows as i64, vocab as i64], (kind, device)),
    };
    let plain =
        [(tokens, Kind::Int64, rows), (scales, Kind::Float, rows), (sums, Kind::Double, 2 * rows)];
    for (tensor, kind, len) in plain {
        let fits = tensor.kind() == kind && tensor.is_contiguous() && tensor.numel() == len;
        require(fits, || format!("{tensor:?} for {rows} rows"))?;
    }
    let argument = Gradient {
        logits: logits.data_ptr().cast_const(),
        out: out.data_ptr(),
        tokens: tokens.data_ptr().cast(),
        scales: scales.data_ptr().cast(),
        sums: sums.data_ptr().cast(),
        stride,
        out_stride: out.stride()[0],
        vocab: vocab as i32,
        factor: inv_temperature,
    };
    let grid = [vocab.div_ceil(GRADIENTS), rows];
    let launch = Launch::plain(Program::Sampling(element), name, grid);
    // SAFETY: shapes and types were checked.
    unsafe { launch.run(device, &argument) }?;
    Ok(out)
}

/// The draws from `logits`, `[rows, vocab]`, that need not see all logits; none for the others. Four
/// numbers come back for a draw, in one copy for all.
///
/// # Errors
/// As [`draw`]; per draw as [`sampler::sample`].
///
/// # Panics
/// If a draw's row is not among the logits.
pub fn sample_some(
    logits: &Tensor,
    draws: &[sampler::Draw],
) -> Result<Vec<Option<Result<Drawn, String>>>, CudaError> {
    let hows = hows(logits, draws);
    if hows.iter().all(Option::is_none) {
        return Ok(hows.iter().map(|_| None).collect());
    }
    let mut made = draw_those(logits, draws, &hows)?.to_host()?.wait()?.into_iter();
    Ok(hows.iter().map(|how| how.and_then(|_| made.next())).collect())
}

/// The numbers of all draws, on the device; none if one of them needs to see all logits.
///
/// # Errors
/// As [`draw`].
///
/// # Panics
/// As [`sample_some`].
pub fn sample_all(
    logits: &Tensor,
    draws: &[sampler::Draw],
) -> Result<Option<RowNumbers>, CudaError> {
    let hows = hows(logits, draws);
    let all = !hows.is_empty() && hows.iter().all(Option::is_some);
    all.then(|| draw_those(logits, draws, &hows)).transpose()
}

fn hows(logits: &Tensor, draws: &[sampler::Draw]) -> Vec<Option<How>> {
    let vocab = logits.size().get(1).copied().unwrap_or(0) as usize;
    draws.iter().map(|draw| How::of(draw, vocab)).collect()
}

/// Makes the draws that have a [`How`].
fn draw_those(
    logits: &Tensor,
    draws: &[sampler::Draw],
    hows: &[Option<How>],
) -> Result<RowNumbers, CudaError> {
    let here: Vec<How> = hows.iter().copied().flatten().collect();
    let summed = draws.iter().zip(hows).filter(|(_, how)| how.is_some());
    let rows: Vec<i64> = summed.map(|(draw, _)| draw.row as i64).collect();
    let chosen = match rows.iter().copied().eq(0..logits.size()[0]) {
        true => logits.shallow_clone(),
        false => logits.index_select(0, &upload(&rows, logits.device())),
    };
    draw(&chosen, &DrawPlan::new(&here, logits.device()))
}

/// What a row says of the token that was drawn from it.
fn token(&[token, logprob, entropy, baseline]: &[f32; 4]) -> Result<Drawn, String> {
    match token as i64 {
        -1 => Err("the model produced NaN logits; its weights are broken".into()),
        -2 => Err("the model produced infinite logits; its weights are broken".into()),
        -3 => Err(NOTHING_LEFT.into()),
        id => {
            let stats = TokenStats { logprob, entropy, baseline };
            Ok(Drawn { id: id as u32, stats, top: Vec::new() })
        }
    }
}

#[cfg(test)]
mod tests;
