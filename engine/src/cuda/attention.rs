//! Attention of query rows over the pages of their sequences.

mod plan;

pub use self::plan::{Capacity, PagedPlan};
use super::{
    CudaError,
    elementwise::{aligned, check_fresh, rotate_write},
    launch::{Argument, Launch, device_of, require},
    pages::{self, Pages},
    source::{Element, HEAD_DIMS, Program},
};
use crate::{device::attention::Paged, model::rope::Turn};
use std::{ffi::c_void, ptr::null};
use tch::{Device, Kind, Tensor};

/// Tokens that a block takes at a time, twice; rows have eight elements more than a head.
fn shared_memory(head_dim: usize) -> u32 {
    (2 * 2 * 64 * (head_dim + 8) * 2) as u32
}

/// Warps of a block.
const WARPS: usize = 4;

/// As in attention.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Unstored {
    k: *const c_void,
    v: *const c_void,
    cos: *const f32,
    sin: *const f32,
    slots: *const i64,
    q_norm: *const c_void,
    k_norm: *const c_void,
    k_stride: i32,
    v_stride: i32,
    eps: f32,
}

impl Unstored {
    /// Where all K and V are in the pages.
    const NOTHING: Self = Self {
        k: null(),
        v: null(),
        cos: null(),
        sin: null(),
        slots: null(),
        q_norm: null(),
        k_norm: null(),
        k_stride: 0,
        v_stride: 0,
        eps: 0.0,
    };
}

/// As in attention.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Attend {
    q: *const c_void,
    keys: *mut c_void,
    values: *mut c_void,
    out: *mut c_void,
    tables: *const i32,
    table_width: *const i32,
    row_span: *const i32,
    row_position: *const i32,
    row_pieces: *const i32,
    tiles: *const i32,
    tile_rows: *const i32,
    pieces: *mut f32,
    sums: *mut f32,
    arrived: *mut i32,
    own: Unstored,
    q_stride: i32,
    rows: i32,
    heads: i32,
    kv_heads: i32,
    window: i32,
    scale: f32,
}

impl Argument for Attend {}

/// Whether [`attend`] has a kernel for these heads.
pub fn fits(kind: Kind, heads: usize, kv_heads: usize, head_dim: usize) -> bool {
    Element::of(kind).is_some()
        && HEAD_DIMS.contains(&head_dim)
        && kv_heads > 0
        && heads.is_multiple_of(kv_heads)
        && (1..=super::plan::MOST_ROWS).contains(&(heads / kv_heads))
}

/// Norms and turns `q` (`[N, heads, head_dim]`) and `k` (`[N, kv_heads, head_dim]`), stores `k` and `v` (as
/// `k`) in the step's slots, and attends, as [`attend`]. Rows may lie apart.
///
/// # Errors
/// As [`rotate_write`] and [`attend`].
pub fn turn_and_attend(
    paged: &Paged<'_, PagedPlan>,
    [k, v]: [&Tensor; 2],
    turn: &Turn<'_>,
) -> Result<Tensor, CudaError> {
    let Paged { q, k_pages, v_pages, plan, .. } = *paged;
    if plan.single_rows() && q.kind() != Kind::Float {
        return decode(paged, [k, v], turn);
    }
    let [q, k] = &turn.normed([q, k]);
    let q = &rotate_write([q, k, v], turn.rotation.angles(), (k_pages, v_pages), &plan.slots)?;
    attend(&Paged { q, ..*paged })
}

/// The same in one kernel, for a plan of [`single_rows`](PagedPlan::single_rows) of 16 bits.
fn decode(
    paged: &Paged<'_, PagedPlan>,
    [k, v]: [&Tensor; 2],
    turn: &Turn<'_>,
) -> Result<Tensor, CudaError> {
    let Paged { q, k_pages, v_pages, plan, .. } = *paged;
    let pages = Pages::of(k_pages, v_pages)?;
    let heads = check(paged, &pages)?;
    let [cos, sin] = turn.rotation.angles();
    check_fresh([q, k, v], [cos, sin], (k_pages, v_pages, &pages), &plan.slots)?;
    let weights = turn.norms.map(|norms| norms.weights);
    for weight in weights.into_iter().flatten() {
        let like = weight.size() == [pages.head_dim as i64] && weight.kind() == q.kind();
        let there = weight.is_contiguous() && weight.device() == q.device() && aligned(weight);
        require(like && there, || format!("a norm by {weight:?} of heads of {q:?}"))?;
    }
    let [q_norm, k_norm] =
        weights.map_or([null(); 2], |weights| weights.map(|weight| weight.data_ptr().cast_const()));
    let own = Unstored {
        k: k.data_ptr(),
        v: v.data_ptr(),
        cos: cos.data_ptr().cast(),
        sin: sin.data_ptr().cast(),
        slots: plan.slots.data_ptr().cast(),
        q_norm,
        k_norm,
        eps: turn.norms.map_or(0.0, |norms| norms.eps as f32),
        k_stride: k.stride()[0] as i32,
        v_stride: v.stride()[0] as i32,
    };
    launch("decode", paged, (&pages, heads), own)
}

/// Stores the step's K and V rows, `[N, kv_heads, head_dim]` each, in their slots.
///
/// # Errors
/// As [`pages::write_kv`].
pub fn write_kv(
    k: &Tensor,
    v: &Tensor,
    k_pages: &Tensor,
    v_pages: &Tensor,
    plan: &PagedPlan,
) -> Result<(), CudaError> {
    pages::write_kv((k, v), (k_pages, v_pages), &plan.slots)
}

/// Attends: `[N, heads * head_dim]`, of the kind of `q`, which is contiguous and of the pages' kind. The
/// query heads of KV head `h` are those from `h * heads / kv_heads` on. Scores, weights and sums are
/// f32; weights are rounded to the pages' kind before they meet the values. Rows that the plan does not
/// use may hold anything.
///
/// # Errors
/// Shapes or types that do not fit (see [`fits`]), or what [`Launch::run`] says.
pub fn attend(paged: &Paged<'_, PagedPlan>) -> Result<Tensor, CudaError> {
    let pages = Pages::of(paged.k_pages, paged.v_pages)?;
    let heads = check(paged, &pages)?;
    require(paged.q.is_contiguous(), || format!("rows of q that lie apart: {:?}", paged.q))?;
    let name = if pages.element == Element::F32 { "attend_plainly" } else { "attend" };
    launch(name, paged, (&pages, heads), Unstored::NOTHING)
}

/// Launches a kernel whose tensors are checked.
fn launch(
    name: &'static str,
    paged: &Paged<'_, PagedPlan>,
    (pages, heads): (&Pages, usize),
    own: Unstored,
) -> Result<Tensor, CudaError> {
    let (q, plan) = (paged.q, paged.plan);
    let device = device_of(&[q, paged.k_pages, paged.v_pages, &plan.row_span])?;
    let shape = [plan.rows(), heads * pages.head_dim].map(|axis| axis as i64);
    let out = Tensor::empty(shape, (q.kind(), device));
    let room = Room::new(plan, heads, pages.head_dim, device);
    let argument = argument(paged, (pages, heads), own, (&out, &room));
    let program = Program::Attention(pages.element, pages.head_dim);
    let (blocks, shared) = match pages.element {
        Element::F32 => ((plan.rows() * heads).div_ceil(WARPS), 0),
        _ => (plan.sizes().tiles * pages.kv_heads, shared_memory(pages.head_dim)),
    };
    let launch = Launch { shared, ..Launch::plain(program, name, [blocks, 1]) };
    // SAFETY: shapes and types were checked; a plan names rows and blocks that are there, and `room` has a
    // place for every piece.
    unsafe { launch.run(device, &argument) }?;
    Ok(out)
}

/// Refuses what the kernels are not made for; gives the query heads.
fn check(paged: &Paged<'_, PagedPlan>, pages: &Pages) -> Result<usize, CudaError> {
    let (q, plan) = (paged.q, paged.plan);
    let size = q.size();
    let said =
        || format!("q {q:?} over pages {:?} with a plan of {} rows", paged.k_pages, plan.rows());
    let heads = size.get(1).map_or(0, |&heads| heads as usize);
    require(pages.are_like(q, plan.rows(), heads) && paged.window != Some(0), said)?;
    require(fits(q.kind(), heads, pages.kv_heads, pages.head_dim), said)?;
    require(heads / pages.kv_heads == plan.group(), || {
        format!(
            "a plan for {} query heads per KV head, not {}",
            plan.group(),
            heads / pages.kv_heads
        )
    })?;
    Ok(heads)
}

/// Where pieces of rows lie until they are put together.
struct Room {
    /// `[pieces, heads, head_dim]`
    values: Tensor,
    /// `[pieces, heads, 2]`
    sums: Tensor,
}

impl Room {
    fn new(plan: &PagedPlan, heads: usize, head_dim: usize, device: Device) -> Self {
        let floats = |last: usize| {
            let shape = [plan.sizes().pieces, heads, last].map(|len| len as i64);
            Tensor::empty(shape, (Kind::Float, device))
        };
        Self { values: floats(head_dim), sums: floats(2) }
    }
}

fn argument(
    paged: &Paged<'_, PagedPlan>,
    (pages, heads): (&Pages, usize),
    own: Unstored,
    (out, room): (&Tensor, &Room),
) -> Attend {
    let plan = paged.plan;
    let ints = |tensor: &Tensor| tensor.data_ptr().cast::<i32>().cast_const();
    Attend {
        q: paged.q.data_ptr(),
        keys: paged.k_pages.data_ptr(),
        values: paged.v_pages.data_ptr(),
        out: out.data_ptr(),
        tables: ints(plan.block_tables()),
        table_width: ints(plan.table_width()),
        row_span: ints(&plan.row_span),
        row_position: ints(&plan.row_position),
        row_pieces: ints(plan.row_pieces()),
        tiles: ints(plan.tiles()),
        tile_rows: ints(plan.tile_rows()),
        pieces: room.values.data_ptr().cast(),
        sums: room.sums.data_ptr().cast(),
        arrived: plan.arrived().data_ptr().cast(),
        own,
        q_stride: paged.q.stride()[0] as i32,
        rows: plan.rows() as i32,
        heads: heads as i32,
        kv_heads: pages.kv_heads as i32,
        window: paged.window.map_or(i32::MAX, |window| i32::try_from(window).unwrap_or(i32::MAX)),
        scale: (paged.scale * std::f64::consts::LOG2_E) as f32,
    }
}

#[cfg(test)]
mod tests;
