//! AVX2 with FMA and F16C: a vector is two registers.

use std::arch::x86_64::*;

use super::{Kernel, LANES, Simd};

const HALF: usize = LANES / 2;

/// Proof that the machine has AVX2, FMA and F16C; made only in [`run`].
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// The lower and the upper eight lanes.
#[derive(Clone, Copy)]
pub(super) struct Pair(__m256, __m256);

/// Whether the machine has what [`run`] needs.
pub(super) fn detected() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2(()))
}

impl Avx2 {
    #[inline(always)]
    fn power(self, shifted: __m256) -> __m256 {
        unsafe {
            let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted));
            let one = _mm256_castps_si256(_mm256_set1_ps(1.0));
            _mm256_castsi256_ps(_mm256_add_epi32(exponent, one))
        }
    }

    /// [`Simd::transpose`] of eight lanes.
    #[inline(always)]
    fn transpose_quarter(self, rows: [__m256; HALF]) -> [__m256; HALF] {
        let mut pairs = rows;
        let mut quads = rows;
        let mut out = rows;
        unsafe {
            for i in 0..HALF / 2 {
                pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
                pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
            }
            // Half `h` of quads[4 * i + j] is column 4 * h + j of the rows from 4 * i on.
            for i in 0..HALF / 4 {
                for half in 0..2 {
                    let a = _mm256_castps_pd(pairs[4 * i + half]);
                    let b = _mm256_castps_pd(pairs[4 * i + half + 2]);
                    quads[4 * i + 2 * half] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
                    quads[4 * i + 2 * half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
                }
            }
            for j in 0..HALF / 2 {
                out[j] = _mm256_permute2f128_ps::<0x20>(quads[j], quads[j + 4]);
                out[j + 4] = _mm256_permute2f128_ps::<0x31>(quads[j], quads[j + 4]);
            }
        }
        out
    }
}

// SAFETY of every block here: `self` proves that the instructions are there; the references to
// arrays prove that the memory is.
impl Simd for Avx2 {
    type V = Pair;

    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        unsafe { Pair(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::V {
        let from = from.as_ptr();
        unsafe { Pair(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(HALF))) }
    }

    #[inline(always)]
    fn load_half(self, from: &[f32; LANES / 2]) -> Self::V {
        unsafe { Pair(_mm256_loadu_ps(from.as_ptr()), _mm256_setzero_ps()) }
    }

    #[inline(always)]
    fn store(self, v: Self::V, to: &mut [f32; LANES]) {
        let to = to.as_mut_ptr();
        unsafe {
            _mm256_storeu_ps(to, v.0);
            _mm256_storeu_ps(to.add(HALF), v.1);
        }
    }

    #[inline(always)]
    fn store_half(self, v: Self::V, to: &mut [f32; LANES / 2]) {
        unsafe { _mm256_storeu_ps(to.as_mut_ptr(), v.0) }
    }

    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> Self::V {
        let from: *const __m128i = from.as_ptr().cast();
        unsafe {
            let [lower, upper] = [_mm_loadu_si128(from), _mm_loadu_si128(from.add(1))];
            Pair(_mm256_cvtph_ps(lower), _mm256_cvtph_ps(upper))
        }
    }

    #[inline(always)]
    fn to_f16(self, v: Self::V) -> [u16; LANES] {
        let mut bits = [0; LANES];
        let to: *mut __m128i = bits.as_mut_ptr().cast();
        unsafe {
            _mm_storeu_si128(to, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.0));
            _mm_storeu_si128(to.add(1), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.1));
        }
        bits
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Self::V {
        let from: *const __m128i = from.as_ptr().cast();
        unsafe {
            let wide = |half| _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half));
            let [lower, upper] = [_mm_loadu_si128(from), _mm_loadu_si128(from.add(1))];
            Pair(_mm256_castsi256_ps(wide(lower)), _mm256_castsi256_ps(wide(upper)))
        }
    }

    #[inline(always)]
    fn to_bf16(self, v: Self::V) -> [u16; LANES] {
        super::portable::to_bf16(self.to_array(v))
    }

    #[inline(always)]
    fn load_i8(self, from: &[i8; LANES]) -> Self::V {
        unsafe {
            let bytes = _mm_loadu_si128(from.as_ptr().cast());
            let lower = _mm256_cvtepi8_epi32(bytes);
            let upper = _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes));
            Pair(_mm256_cvtepi32_ps(lower), _mm256_cvtepi32_ps(upper))
        }
    }

    #[inline(always)]
    fn to_i8(self, v: Self::V) -> [i8; LANES] {
        super::portable::to_i8(self.to_array(v))
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        unsafe { Pair(_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        unsafe { Pair(_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        unsafe { Pair(_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        unsafe { Pair(_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        unsafe { Pair(_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        unsafe { Pair(_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn at_least(self, a: Self::V, b: Self::V) -> u16 {
        unsafe {
            let lower = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(a.0, b.0));
            let upper = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(a.1, b.1));
            (lower | upper << HALF) as u16
        }
    }

    #[inline(always)]
    fn zero_below(self, v: Self::V, x: Self::V, limit: f32) -> Self::V {
        unsafe {
            let limit = _mm256_set1_ps(limit);
            let lower = _mm256_cmp_ps::<_CMP_NLT_UQ>(x.0, limit);
            let upper = _mm256_cmp_ps::<_CMP_NLT_UQ>(x.1, limit);
            Pair(_mm256_and_ps(lower, v.0), _mm256_and_ps(upper, v.1))
        }
    }

    #[inline(always)]
    fn power_of_two(self, shifted: Self::V) -> Self::V {
        Pair(self.power(shifted.0), self.power(shifted.1))
    }

    #[inline(always)]
    fn largest(self, v: Self::V) -> f32 {
        unsafe {
            let v = _mm256_max_ps(v.0, v.1);
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        }
    }

    #[inline(always)]
    fn transpose(self, block: [Self::V; LANES]) -> [Self::V; LANES] {
        let mut out = block;
        let mut quarter = [block[0].0; HALF];
        for below in [false, true] {
            for right in [false, true] {
                for i in 0..HALF {
                    let row = block[if below { HALF + i } else { i }];
                    quarter[i] = if right { row.1 } else { row.0 };
                }
                quarter = self.transpose_quarter(quarter);
                for i in 0..HALF {
                    let row = &mut out[if right { HALF + i } else { i }];
                    *if below { &mut row.1 } else { &mut row.0 } = quarter[i];
                }
            }
        }
        out
    }
}
