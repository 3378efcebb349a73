//! Sixteen lanes of f32 on whatever the machine has.
//!
//! A [`Kernel`] is written once over [`Simd`] and compiled for each instruction set. [`Level`]
//! picks one at run time; a value of a `Simd` type exists only where its instructions do, so
//! that its methods are safe. Everything a kernel calls is `#[inline(always)]`, which is what
//! lets the compiler use those instructions all the way down.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod exp;
mod portable;

pub use exp::exp;

/// Number of lanes.
pub const LANES: usize = 16;

/// Sixteen floats on one cache line.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(64))]
pub struct Line(pub [f32; LANES]);

impl Line {
    /// Lines as the floats in them.
    pub fn flatten(lines: &[Self]) -> &[f32] {
        // SAFETY: a line is sixteen floats and nothing else: its size is its alignment.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * LANES) }
    }
}

/// Asks for memory that will be read soon, without waiting for it.
#[inline(always)]
pub fn prefetch(memory: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    for line in memory.chunks(LANES) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: every x86-64 has SSE, and a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = memory;
}

/// Asks for the line around an address, which need not be one of ours.
#[inline(always)]
pub fn prefetch_address(address: *const f32) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: every x86-64 has SSE, and a prefetch reads nothing, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Arithmetic on sixteen lanes. Holding a value proves that the machine has the instructions.
pub trait Simd: Copy {
    /// Sixteen lanes.
    type V: Copy;

    /// Whether 24 accumulators, and operands beside them, fit in the registers; 6 always do.
    const WIDE: bool;

    /// `x` in every lane.
    fn splat(self, x: f32) -> Self::V;
    /// Reads sixteen lanes.
    fn load(self, from: &[f32; LANES]) -> Self::V;
    /// Reads the lower eight lanes; the others are 0.
    fn load_half(self, from: &[f32; LANES / 2]) -> Self::V;
    /// Writes sixteen lanes.
    fn store(self, v: Self::V, to: &mut [f32; LANES]);
    /// Writes the lower eight lanes; where a vector is two registers, what only the others need is
    /// not computed.
    fn store_half(self, v: Self::V, to: &mut [f32; LANES / 2]);
    /// The values of sixteen f16 (IEEE 754 binary16), given as bits.
    fn load_f16(self, from: &[u16; LANES]) -> Self::V;
    /// The nearest f16, ties to even; infinite from 65520 on, NaN for NaN.
    fn to_f16(self, v: Self::V) -> [u16; LANES];
    /// The values of sixteen bf16 (the upper halves of f32), given as bits.
    fn load_bf16(self, from: &[u16; LANES]) -> Self::V;
    /// The nearest bf16, ties to even; NaN for NaN.
    fn to_bf16(self, v: Self::V) -> [u16; LANES];
    /// The values of sixteen integers.
    fn load_i8(self, from: &[i8; LANES]) -> Self::V;
    /// The nearest integers, ties to even, of lanes between -127.5 and 127.5; any for NaN.
    fn to_i8(self, v: Self::V) -> [i8; LANES];
    /// `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`, correctly rounded.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once where the machine can.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger of two; `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// Bit `i` says that lane `i` of `a` is at least that of `b`; never where either is NaN.
    fn at_least(self, a: Self::V, b: Self::V) -> u16;
    /// `v`, but 0 where `x < limit`.
    fn zero_below(self, v: Self::V, x: Self::V, limit: f32) -> Self::V;
    /// 2^n out of `1.5 * 2^23 + n`, for integers -126 <= n <= 127: n sits in the lowest bits
    /// of such a number, one shift away from the exponent.
    fn power_of_two(self, shifted: Self::V) -> Self::V;

    /// The lanes as an array.
    #[inline(always)]
    fn to_array(self, v: Self::V) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        self.store(v, &mut lanes);
        lanes
    }

    /// The largest lane; any where one is NaN.
    fn largest(self, v: Self::V) -> f32;

    /// Lane `j` of vector `i` becomes lane `i` of vector `j`.
    #[inline(always)]
    fn transpose(self, block: [Self::V; LANES]) -> [Self::V; LANES] {
        let from = block.map(|v| self.to_array(v));
        std::array::from_fn(|i| self.load(&std::array::from_fn(|j| from[j][i])))
    }
}

/// Code that runs on one of the instruction sets.
pub trait Kernel {
    /// What it computes.
    type Output;

    /// Computes it. Implementations are `#[inline(always)]`.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// An instruction set of this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(Set);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Set {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// The fastest one.
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if avx512::detected() {
                return Self(Set::Avx512);
            }
            if avx2::detected() {
                return Self(Set::Avx2);
            }
        }
        Self(Set::Portable)
    }

    /// All of them, the slowest first.
    pub fn available() -> Vec<Self> {
        let mut levels = vec![Self(Set::Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            if avx2::detected() {
                levels.push(Self(Set::Avx2));
            }
            if avx512::detected() {
                levels.push(Self(Set::Avx512));
            }
        }
        levels
    }

    /// Numbers of f32 in one register.
    pub fn register(self) -> usize {
        match self.0 {
            Set::Portable => LANES / 4,
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => LANES / 2,
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => LANES,
        }
    }

    /// Runs a kernel on this instruction set.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Set::Portable => portable::run(kernel),
            // SAFETY: a `Level` of this set is only made where the machine has it.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { avx2::run(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { avx512::run(kernel) },
        }
    }
}

#[cfg(test)]
mod tests;
