//! Attention of query rows over the pages of their sequences.

mod plan;

pub use self::plan::{Capacity, PagedPlan};
use super::{
    CudaError,
    elementwise::rotate_write,
    launch::{Argument, Launch, device_of, require},
    pages::{self, Pages},
    source::{Element, HEAD_DIMS, Program},
};
use crate::device::attention::Paged;
use std::ffi::c_void;
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
struct Attend {
    q: *const c_void,
    keys: *const c_void,
    values: *const c_void,
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

/// Turns `q` (`[N, heads, head_dim]`) by these cosines and sines, and stores `k`, turned too, and `v`
/// (`[N, kv_heads, head_dim]`) in the step's slots.
///
/// # Errors
/// As [`rotate_write`].
pub fn turn_and_write(
    qkv: [&Tensor; 3],
    angles: [&Tensor; 2],
    pages: (&Tensor, &Tensor),
    plan: &PagedPlan,
) -> Result<Tensor, CudaError> {
    rotate_write(qkv, angles, pages, &plan.slots)
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
    let Paged { q, k_pages, v_pages, plan, .. } = *paged;
    let pages = Pages::of(k_pages, v_pages)?;
    let device = device_of(&[q, k_pages, v_pages, &plan.row_span])?;
    let heads = check(paged, &pages)?;
    let (rows, kind) = (plan.rows(), q.kind());
    let shape = [rows as i64, (heads * pages.head_dim) as i64];
    let out = Tensor::empty(shape, (kind, device));
    let room = Room::new(plan, heads, pages.head_dim, device);
    let argument = argument(paged, &pages, heads, &out, &room);
    let program = Program::Attention(pages.element, pages.head_dim);
    let (name, grid, shared) = match pages.element {
        Element::F32 => ("attend_plainly", [(rows * heads).div_ceil(WARPS), 1], 0),
        _ => ("attend", [plan.sizes().tiles, pages.kv_heads], shared_memory(pages.head_dim)),
    };
    // SAFETY: shapes and types were checked; a plan names rows and blocks that are there, and `room` has a
    // place for every piece.
    unsafe { Launch { shared, ..Launch::plain(program, name, grid) }.run(device, &argument) }?;
    Ok(out)
}

/// Refuses what the kernels are not made for; gives the query heads.
fn check(paged: &Paged<'_, PagedPlan>, pages: &Pages) -> Result<usize, CudaError> {
    let (q, plan) = (paged.q, paged.plan);
    let size = q.size();
    let said =
        || format!("q {q:?} over pages {:?} with a plan of {} rows", paged.k_pages, plan.rows());
    let shaped =
        size.len() == 3 && size[0] == plan.rows() as i64 && size[2] == pages.head_dim as i64;
    let plain = q.is_contiguous() && q.kind() == paged.k_pages.kind();
    require(shaped && plain && paged.window != Some(0), said)?;
    let heads = size[1] as usize;
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
    pages: &Pages,
    heads: usize,
    out: &Tensor,
    room: &Room,
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
        rows: plan.rows() as i32,
        heads: heads as i32,
        kv_heads: pages.kv_heads as i32,
        window: paged.window.map_or(i32::MAX, |window| i32::try_from(window).unwrap_or(i32::MAX)),
        scale: (paged.scale * std::f64::consts::LOG2_E) as f32,
    }
}

#[cfg(test)]
mod tests;
