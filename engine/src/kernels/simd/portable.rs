//! Plain Rust on arrays: the compiler's default instructions for the target.

use half::{bf16, f16};

use super::{Kernel, LANES, Simd};

/// Sixteen lanes in an array.
#[derive(Clone, Copy)]
pub(super) struct Portable;

pub(super) fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Portable)
}

#[inline(always)]
fn lanes(f: impl Fn(usize) -> f32) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    for (i, lane) in out.iter_mut().enumerate() {
        *lane = f(i);
    }
    out
}

/// The nearest bf16, as bits.
#[inline(always)]
pub(super) fn to_bf16(v: [f32; LANES]) -> [u16; LANES] {
    v.map(|x| bf16::from_f32(x).to_bits())
}

/// The nearest integers.
#[inline(always)]
pub(super) fn to_i8(v: [f32; LANES]) -> [i8; LANES] {
    v.map(|x| x.round_ties_even() as i8)
}

impl Simd for Portable {
    type V = [f32; LANES];

    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::V {
        *from
    }

    #[inline(always)]
    fn load_half(self, from: &[f32; LANES / 2]) -> Self::V {
        let mut out = [0.0; LANES];
        out[..LANES / 2].copy_from_slice(from);
        out
    }

    #[inline(always)]
    fn store(self, v: Self::V, to: &mut [f32; LANES]) {
        *to = v;
    }

    #[inline(always)]
    fn store_half(self, v: Self::V, to: &mut [f32; LANES / 2]) {
        to.copy_from_slice(&v[..LANES / 2]);
    }

    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> Self::V {
        from.map(|bits| f16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    fn to_f16(self, v: Self::V) -> [u16; LANES] {
        v.map(|x| f16::from_f32(x).to_bits())
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Self::V {
        from.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }

    #[inline(always)]
    fn to_bf16(self, v: Self::V) -> [u16; LANES] {
        to_bf16(v)
    }

    #[inline(always)]
    fn load_i8(self, from: &[i8; LANES]) -> Self::V {
        from.map(f32::from)
    }

    #[inline(always)]
    fn to_i8(self, v: Self::V) -> [i8; LANES] {
        to_i8(v)
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] / b[i])
    }

    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // A fused operation that the target lacks would be a slow call.
        if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
            lanes(|i| a[i].mul_add(b[i], c[i]))
        } else {
            lanes(|i| a[i] * b[i] + c[i])
        }
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn at_least(self, a: Self::V, b: Self::V) -> u16 {
        let mut mask = 0;
        for i in 0..LANES {
            mask |= u16::from(a[i] >= b[i]) << i;
        }
        mask
    }

    #[inline(always)]
    fn zero_below(self, v: Self::V, x: Self::V, limit: f32) -> Self::V {
        lanes(|i| if x[i] < limit { 0.0 } else { v[i] })
    }

    #[inline(always)]
    fn power_of_two(self, shifted: Self::V) -> Self::V {
        lanes(|i| f32::from_bits((shifted[i].to_bits() << 23).wrapping_add(1.0f32.to_bits())))
    }

    #[inline(always)]
    fn largest(self, v: Self::V) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}
