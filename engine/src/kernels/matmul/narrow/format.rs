//! The ways in which sixteen weights are kept in less than f32.

use crate::kernels::matmul::tile::Lanes;
use crate::kernels::simd::{LANES, Simd};

/// Sixteen weights. Their values times their row's scale are the weights that are meant.
pub(super) trait Format: Lanes + Send + Sync {
    /// What memory is filled with before it is written.
    const ZERO: Self;

    /// The largest magnitude of a row that is kept, for formats that scale each row to it.
    const LARGEST: Option<f32>;

    /// The nearest ones to `v`.
    fn round<S: Simd>(s: S, v: S::V) -> Self;
}

/// Steps of the depth between the prefetch of weights and their use: memory has answered by then,
/// and they still fit the cache.
pub(super) const AHEAD: usize = 128;

/// IEEE 754 binary16: 11 bits of precision down to 6e-5, infinite from 65520 on.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(super) struct F16([u16; LANES]);

/// The upper half of an f32: 8 bits of precision, the range of f32.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(super) struct Bf16([u16; LANES]);

/// Integers between -127 and 127, to be multiplied with the row's scale.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub(super) struct Int8([i8; LANES]);

impl Lanes for F16 {
    const AHEAD: usize = AHEAD;

    #[inline(always)]
    fn load<S: Simd>(&self, s: S) -> S::V {
        s.load_f16(&self.0)
    }
}

impl Format for F16 {
    const ZERO: Self = Self([0; LANES]);
    const LARGEST: Option<f32> = None;

    #[inline(always)]
    fn round<S: Simd>(s: S, v: S::V) -> Self {
        Self(s.to_f16(v))
    }
}

impl Lanes for Bf16 {
    const AHEAD: usize = AHEAD;

    #[inline(always)]
    fn load<S: Simd>(&self, s: S) -> S::V {
        s.load_bf16(&self.0)
    }
}

impl Format for Bf16 {
    const ZERO: Self = Self([0; LANES]);
    const LARGEST: Option<f32> = None;

    #[inline(always)]
    fn round<S: Simd>(s: S, v: S::V) -> Self {
        Self(s.to_bf16(v))
    }
}

impl Lanes for Int8 {
    const AHEAD: usize = AHEAD;

    #[inline(always)]
    fn load<S: Simd>(&self, s: S) -> S::V {
        s.load_i8(&self.0)
    }
}

impl Format for Int8 {
    const ZERO: Self = Self([0; LANES]);
    const LARGEST: Option<f32> = Some(127.0);

    #[inline(always)]
    fn round<S: Simd>(s: S, v: S::V) -> Self {
        Self(s.to_i8(v))
    }
}
