//! Tensors as slices, for the kernels.

use tch::{Device, Kind, Tensor};

fn assert_plain(tensor: &Tensor) {
    assert!(
        tensor.device() == Device::Cpu && tensor.kind() == Kind::Float && tensor.is_contiguous(),
        "a contiguous f32 tensor on the CPU is needed, not {tensor:?}"
    );
}

/// The elements of a contiguous f32 CPU tensor, row by row.
///
/// # Panics
/// If the tensor is anything else.
pub fn floats(tensor: &Tensor) -> &[f32] {
    assert_plain(tensor);
    if tensor.numel() == 0 {
        return &[];
    }
    // SAFETY: checked above; the borrow keeps the tensor, and so its storage, alive.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), tensor.numel()) }
}

/// As [`floats`], to be written. The caller holds the only handle to the storage in use.
///
/// # Panics
/// If the tensor is anything else.
pub fn floats_mut(tensor: &mut Tensor) -> &mut [f32] {
    assert_plain(tensor);
    if tensor.numel() == 0 {
        return &mut [];
    }
    // SAFETY: as in `floats`; `&mut` makes this handle the only one in use.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), tensor.numel()) }
}

/// The bytes of a contiguous f32 CPU tensor, little-endian, as safetensors stores them.
///
/// # Panics
/// If the tensor is anything else.
pub fn bytes(tensor: &Tensor) -> &[u8] {
    const { assert!(cfg!(target_endian = "little")) };
    let floats = floats(tensor);
    // SAFETY: every f32 is four bytes, and any byte may be read.
    unsafe { std::slice::from_raw_parts(floats.as_ptr().cast(), size_of_val(floats)) }
}
