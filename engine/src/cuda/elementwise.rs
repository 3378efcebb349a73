//! What lies between the matrix products, forward only: for where no graph is recorded.

use super::{
    CudaError,
    launch::{Argument, Launch, device_of, require},
    pages::{Pages, check_slots},
    source::{Element, Program},
};
use std::{
    ffi::c_void,
    ptr::{null, null_mut},
};
use tch::{Kind, Tensor};

/// As in elementwise.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Norm {
    x: *const c_void,
    added: *const c_void,
    weight: *const c_void,
    sum: *mut c_void,
    out: *mut c_void,
    width: i32,
    eps: f32,
}

impl Argument for Norm {}

/// As in elementwise.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Rotate {
    x: *const c_void,
    cos: *const f32,
    sin: *const f32,
    out: *mut c_void,
    heads: i32,
    half: i32,
    stride: i32,
}

impl Argument for Rotate {}

/// As in elementwise.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct RotateWrite {
    q: *const c_void,
    k: *const c_void,
    v: *const c_void,
    cos: *const f32,
    sin: *const f32,
    slots: *const i64,
    out: *mut c_void,
    keys: *mut c_void,
    values: *mut c_void,
    heads: i32,
    kv_heads: i32,
    half: i32,
    q_stride: i32,
    k_stride: i32,
    v_stride: i32,
}

impl Argument for RotateWrite {}

/// As in elementwise.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Gate {
    gate: *const c_void,
    up: *const c_void,
    out: *mut c_void,
    lines: i64,
    width_lines: i32,
    stride_lines: i32,
}

impl Argument for Gate {}

/// As in elementwise.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct GateGradient {
    gate: *const c_void,
    up: *const c_void,
    gradient: *const c_void,
    by_gate: *mut c_void,
    by_up: *mut c_void,
    lines: i64,
}

impl Argument for GateGradient {}

fn element_of(tensor: &Tensor) -> Result<Element, CudaError> {
    Element::of(tensor.kind()).ok_or_else(|| CudaError::Unsupported(format!("{tensor:?}")))
}

pub(super) fn aligned(tensor: &Tensor) -> bool {
    (tensor.data_ptr() as usize).is_multiple_of(16)
}

/// `x / sqrt(mean(x^2) + eps) * weight`, the mean over the last axis: `x` `[.., H]`, `weight` `[H]`, H a
/// multiple of 8; the shape of `x`. Rounded once.
///
/// # Errors
/// Shapes or types that do not fit, or what [`Launch::run`] says.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor, CudaError> {
    norm(x, None, weight, eps).map(|(_, normed)| normed)
}

/// `x + y`, and [`rms_norm`] of it.
///
/// # Errors
/// As [`rms_norm`].
pub fn add_rms_norm(
    x: &Tensor,
    y: &Tensor,
    weight: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor), CudaError> {
    norm(x, Some(y), weight, eps)
}

fn norm(
    x: &Tensor,
    added: Option<&Tensor>,
    weight: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor), CudaError> {
    let element = element_of(x)?;
    let all: Vec<&Tensor> = [x, weight].into_iter().chain(added).collect();
    let device = device_of(&all)?;
    let width = weight.numel();
    let said = || format!("norm of {x:?} and {added:?} with {weight:?}");
    let plain = |part: &&Tensor| part.is_contiguous() && part.kind() == x.kind() && aligned(part);
    let shaped = weight.dim() == 1 && width > 0 && width.is_multiple_of(8);
    let same = added.is_none_or(|added| added.size() == x.size());
    require(shaped && same && x.size().last() == Some(&(width as i64)), said)?;
    require(all.iter().all(plain), said)?;
    let sum = added.map_or_else(|| x.shallow_clone(), Tensor::empty_like);
    let out = x.empty_like();
    let argument = Norm {
        x: x.data_ptr(),
        added: added.map_or(null(), |added| added.data_ptr()),
        weight: weight.data_ptr(),
        sum: added.map_or(null_mut(), |_| sum.data_ptr()),
        out: out.data_ptr(),
        width: width as i32,
        eps: eps as f32,
    };
    let grid = [x.numel() / width, 1];
    let launch = Launch::plain(Program::Elementwise(element), "rms_norm", grid);
    // SAFETY: shapes and types were checked.
    unsafe { launch.run(device, &argument) }?;
    Ok((sum, out))
}

/// Refuses cosines and sines of another shape or type.
fn check_angles(angles: [&Tensor; 2], shape: [i64; 2]) -> Result<(), CudaError> {
    let fits = |angles: &Tensor| {
        angles.kind() == Kind::Float && angles.is_contiguous() && angles.size() == shape
    };
    require(angles.into_iter().all(fits), || format!("angles {angles:?}, not of {shape:?}"))
}

/// Turns the halves of every head against each other: `x` `[N, heads, head_dim]`, whose rows may lie
/// apart, `cos` and `sin` `[N, head_dim / 2]`, f32; `[N, heads, head_dim]`.
///
/// # Errors
/// As [`rms_norm`].
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor, CudaError> {
    let element = element_of(x)?;
    let device = device_of(&[x, cos, sin])?;
    let (size, stride) = (x.size(), x.stride());
    let said = || format!("{x:?} of stride {stride:?} turned by {cos:?} and {sin:?}");
    require(size.len() == 3 && size[2] % 2 == 0 && stride[1..] == [size[2], 1], said)?;
    check_angles([cos, sin], [size[0], size[2] / 2])?;
    let out = Tensor::empty(&size[..], (x.kind(), device));
    let argument = Rotate {
        x: x.data_ptr(),
        cos: cos.data_ptr().cast(),
        sin: sin.data_ptr().cast(),
        out: out.data_ptr(),
        heads: size[1] as i32,
        half: (size[2] / 2) as i32,
        stride: stride[0] as i32,
    };
    let grid = [size[0] as usize, 1];
    let launch = Launch::plain(Program::Elementwise(element), "rotate", grid);
    // SAFETY: shapes and types were checked.
    unsafe { launch.run(device, &argument) }?;
    Ok(out)
}

/// Refuses what [`rotate_write`] does not take, for pages that are known.
pub(super) fn check_fresh(
    [q, k, v]: [&Tensor; 3],
    [cos, sin]: [&Tensor; 2],
    (k_pages, v_pages, pages): (&Tensor, &Tensor, &Pages),
    slots: &Tensor,
) -> Result<(), CudaError> {
    let &Pages { kv_heads, head_dim, .. } = pages;
    device_of(&[q, k, v, cos, sin, k_pages, v_pages, slots])?;
    let rows = slots.numel();
    let heads = q.size().get(1).map_or(0, |&heads| heads as usize);
    for (part, heads) in [(q, heads), (k, kv_heads), (v, kv_heads)] {
        let said = || format!("{part:?} of stride {:?} for pages {k_pages:?}", part.stride());
        require(pages.are_like(part, rows, heads), said)?;
    }
    check_angles([cos, sin], [rows, head_dim / 2].map(|axis| axis as i64))?;
    check_slots(slots)?;
    let lined = |part: &&Tensor| aligned(part) && part.stride()[0] % 8 == 0;
    let whole =
        head_dim.is_multiple_of(16) && [k_pages, v_pages, cos, sin].into_iter().all(aligned);
    require(whole && [q, k, v].iter().all(lined), || {
        format!("heads of {head_dim} numbers, or q, k and v of {q:?} at odd addresses")
    })
}

/// [`rotate`] of `q` `[N, heads, head_dim]`, and what stands in the slots of the pages afterwards: `k`
/// turned, and `v`, `[N, kv_heads, head_dim]` each. `head_dim` is a multiple of 16; rows may lie apart, by
/// a multiple of 8. A row whose slot is -1 is written nowhere, and no slot lies outside of the pages.
///
/// # Errors
/// As [`rms_norm`].
pub fn rotate_write(
    [q, k, v]: [&Tensor; 3],
    [cos, sin]: [&Tensor; 2],
    (k_pages, v_pages): (&Tensor, &Tensor),
    slots: &Tensor,
) -> Result<Tensor, CudaError> {
    let pages = Pages::of(k_pages, v_pages)?;
    check_fresh([q, k, v], [cos, sin], (k_pages, v_pages, &pages), slots)?;
    let Pages { element, kv_heads, head_dim } = pages;
    let (rows, heads) = (slots.numel(), q.size()[1] as usize);
    let shape = [rows, heads, head_dim].map(|axis| axis as i64);
    let out = Tensor::empty(shape, (q.kind(), q.device()));
    let argument = RotateWrite {
        q: q.data_ptr(),
        k: k.data_ptr(),
        v: v.data_ptr(),
        cos: cos.data_ptr().cast(),
        sin: sin.data_ptr().cast(),
        slots: slots.data_ptr().cast(),
        out: out.data_ptr(),
        keys: k_pages.data_ptr(),
        values: v_pages.data_ptr(),
        heads: heads as i32,
        kv_heads: kv_heads as i32,
        half: head_dim as i32 / 2,
        q_stride: q.stride()[0] as i32,
        k_stride: k.stride()[0] as i32,
        v_stride: v.stride()[0] as i32,
    };
    let lines = (heads + 2 * kv_heads) * head_dim / 2 * element.bytes() / 16;
    let (program, name) = (Program::Elementwise(element), "rotate_write");
    let grid = [rows, lines.div_ceil(program.threads(name) as usize)];
    let launch = Launch::plain(program, name, grid);
    // SAFETY: shapes and types were checked; the caller vouches for the slots.
    unsafe { launch.run(q.device(), &argument) }?;
    Ok(out)
}

/// Whether [`swiglu`] and its gradient have kernels for contiguous tensors like this one.
pub fn has_gates(gate: &Tensor) -> bool {
    let size = gate.size();
    Element::of(gate.kind()).is_some() && size.len() == 2 && size[1] % 8 == 0
}

/// `silu(gate) * up`, element by element: `[N, width]` each, whose rows may lie apart in the same way,
/// as the halves of one product do; width a multiple of 8. Rounded once.
///
/// # Errors
/// As [`rms_norm`].
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor, CudaError> {
    let element = element_of(gate)?;
    let device = device_of(&[gate, up])?;
    let (size, stride) = (gate.size(), gate.stride());
    let said =
        || format!("gate {gate:?} and up {up:?} of strides {stride:?} and {:?}", up.stride());
    let same = up.size() == size && up.stride() == stride && up.kind() == gate.kind();
    let lined = size.len() == 2 && stride[1] == 1 && size[1] % 8 == 0 && stride[0] % 8 == 0;
    require(same && lined && aligned(gate) && aligned(up), said)?;
    let out = Tensor::empty(&size[..], (gate.kind(), device));
    let line = 16 / element.bytes() as i64;
    let lines = size[0] * size[1] / line;
    let argument = Gate {
        gate: gate.data_ptr(),
        up: up.data_ptr(),
        out: out.data_ptr(),
        lines,
        width_lines: (size[1] / line) as i32,
        stride_lines: (stride[0] / line) as i32,
    };
    let program = Program::Elementwise(element);
    let grid = [(lines as usize).div_ceil(program.threads("swiglu") as usize), 1];
    let launch = Launch::plain(program, "swiglu", grid);
    // SAFETY: shapes and types were checked.
    unsafe { launch.run(device, &argument) }?;
    Ok(out)
}

/// The gradients of [`swiglu`] by `gate` and `up`, out of that by its output: all contiguous, of one
/// shape and type, and of a multiple of 8 elements.
///
/// # Errors
/// As [`rms_norm`].
pub fn swiglu_gradient([gate, up, gradient]: [&Tensor; 3]) -> Result<[Tensor; 2], CudaError> {
    let element = element_of(gate)?;
    let device = device_of(&[gate, up, gradient])?;
    let said = || format!("gate {gate:?}, up {up:?} and gradient {gradient:?}");
    let plain = |part: &&Tensor| {
        let same = part.size() == gate.size() && part.kind() == gate.kind();
        same && part.is_contiguous() && aligned(part)
    };
    let fits = gate.numel().is_multiple_of(8) && [gate, up, gradient].iter().all(plain);
    require(fits, said)?;
    let made = [gate.empty_like(), up.empty_like()];
    let lines = gate.numel() * element.bytes() / 16;
    let argument = GateGradient {
        gate: gate.data_ptr(),
        up: up.data_ptr(),
        gradient: gradient.data_ptr(),
        by_gate: made[0].data_ptr(),
        by_up: made[1].data_ptr(),
        lines: lines as i64,
    };
    let (program, name) = (Program::Elementwise(element), "swiglu_gradient");
    let grid = [lines.div_ceil(program.threads(name) as usize), 1];
    // SAFETY: shapes and types were checked.
    unsafe { Launch::plain(program, name, grid).run(device, &argument) }?;
    Ok(made)
}

#[cfg(test)]
mod tests;
