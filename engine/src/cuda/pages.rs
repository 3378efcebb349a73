//! Writing the pages of a layer, `[num_blocks, kv_heads, 16, head_dim]` each.

use super::{
    CudaError,
    launch::{Argument, Launch, device_of, require},
    source::{Element, Program},
};
use crate::kernels::pages::BLOCK;
use std::ffi::c_void;
use tch::{Kind, Tensor};

/// As in pages.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct WriteKv {
    k: *const c_void,
    v: *const c_void,
    keys: *mut c_void,
    values: *mut c_void,
    slots: *const i64,
    kv_heads: i32,
    head_dim: i32,
    k_stride: i32,
    v_stride: i32,
}

impl Argument for WriteKv {}

/// Shape of pages and type of their elements.
pub(super) struct Pages {
    pub(super) element: Element,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
}

impl Pages {
    /// Of a layer's pages, checked.
    pub(super) fn of(k_pages: &Tensor, v_pages: &Tensor) -> Result<Self, CudaError> {
        let said = || format!("pages {k_pages:?} and {v_pages:?}");
        let element = Element::of(k_pages.kind());
        let element = element.ok_or_else(|| CudaError::Unsupported(said()))?;
        let size = k_pages.size();
        let same = size == v_pages.size() && k_pages.kind() == v_pages.kind();
        let whole = k_pages.is_contiguous() && v_pages.is_contiguous();
        let shaped = size.len() == 4 && size[2] == BLOCK as i64 && size[3] % 8 == 0;
        require(same && whole && shaped, said)?;
        Ok(Self { element, kv_heads: size[1] as usize, head_dim: size[3] as usize })
    }

    /// Whether `rows` rows of `heads` heads, which may lie apart, are like those of the pages.
    pub(super) fn are_like(&self, part: &Tensor, rows: usize, heads: usize) -> bool {
        part.size() == [rows, heads, self.head_dim].map(|axis| axis as i64)
            && Element::of(part.kind()) == Some(self.element)
            && part.stride()[1..] == [self.head_dim as i64, 1]
    }
}

/// Refuses anything but i64 numbers in a row.
pub(super) fn check_slots(slots: &Tensor) -> Result<(), CudaError> {
    let plain = slots.kind() == Kind::Int64 && slots.is_contiguous();
    require(plain, || format!("slots {slots:?}"))
}

/// Writes `k` and `v`, `[N, kv_heads, head_dim]` each, to their slots, block times 16 plus offset;
/// rows whose slot is -1 nowhere. Rows may lie apart, as those of a part of a wider tensor do. `slots`
/// is `[N]`, i64; no slot lies outside of the pages.
///
/// # Errors
/// Shapes or types that do not fit; see [`Launch::run`].
pub fn write_kv(
    (k, v): (&Tensor, &Tensor),
    (k_pages, v_pages): (&Tensor, &Tensor),
    slots: &Tensor,
) -> Result<(), CudaError> {
    let pages = Pages::of(k_pages, v_pages)?;
    let Pages { element, kv_heads, head_dim } = pages;
    let device = device_of(&[k, v, k_pages, v_pages, slots])?;
    let rows = slots.numel();
    let lines = 16 / element.bytes() as i64;
    for part in [k, v] {
        let stride = part.stride();
        let fits = pages.are_like(part, rows, kv_heads)
            && stride[0] % lines == 0
            && (part.data_ptr() as usize).is_multiple_of(16);
        require(fits, || format!("{part:?} of stride {stride:?} for pages {k_pages:?}"))?;
    }
    check_slots(slots)?;
    let argument = WriteKv {
        k: k.data_ptr(),
        v: v.data_ptr(),
        keys: k_pages.data_ptr(),
        values: v_pages.data_ptr(),
        slots: slots.data_ptr().cast(),
        kv_heads: kv_heads as i32,
        head_dim: head_dim as i32,
        k_stride: k.stride()[0] as i32,
        v_stride: v.stride()[0] as i32,
    };
    let program = Program::Pages(element);
    let launch = Launch::plain(program, "write_kv", [rows, 1]);
    // SAFETY: shapes and types are checked above; the caller vouches for the slots.
    unsafe { launch.run(device, &argument) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torch::random;
    use tch::Device;

    fn pages(kind: Kind, blocks: i64) -> (Tensor, Tensor) {
        let pages = || Tensor::full([blocks, 2, 16, 24], f64::NAN, (kind, Device::Cpu));
        (pages(), pages())
    }

    #[test]
    fn rows_reach_their_slots_and_no_others() {
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
            let (keys, values) = pages(kind, 3);
            // K and V as parts of one wider product.
            let rows = random::normal(&[4, 200]).to_kind(kind);
            let part = |from| rows.narrow(1, from, 48).view([4, 2, 24]);
            let slots = Tensor::from_slice(&[5i64, -1, 47, 16]);
            write_kv((&part(8), &part(104)), (&keys, &values), &slots).unwrap();
            for (pages, rows) in [(&keys, part(8)), (&values, part(104))] {
                for (row, slot) in [(0, 5), (2, 47), (3, 16)] {
                    let written = pages.get(slot / 16).select(1, slot % 16);
                    assert!(written.equal(&rows.get(row)), "{kind:?} {slot}");
                }
                let written = pages.isnan().logical_not().sum(Kind::Int64).int64_value(&[]);
                assert_eq!(written, 3 * 48);
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (keys, values) = pages(Kind::Float, 2);
        let slots = Tensor::from_slice(&[0i64]);
        let rows = |shape: &[i64], kind| Tensor::zeros(shape, (kind, Device::Cpu));
        for row in [rows(&[1, 2, 16], Kind::Float), rows(&[1, 2, 24], Kind::Half)] {
            let error = write_kv((&row, &row), (&keys, &values), &slots).unwrap_err();
            assert!(matches!(error, CudaError::Unsupported(_)), "{error}");
        }
    }
}
