use super::*;
use half::{bf16, f16};

/// Turns sixteen numbers into something and back.
enum Turn {
    LoadF16([u16; LANES]),
    LoadBf16([u16; LANES]),
    LoadI8([i8; LANES]),
}

impl Kernel for Turn {
    type Output = [f32; LANES];

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> [f32; LANES] {
        s.to_array(match self {
            Self::LoadF16(bits) => s.load_f16(&bits),
            Self::LoadBf16(bits) => s.load_bf16(&bits),
            Self::LoadI8(bytes) => s.load_i8(&bytes),
        })
    }
}

/// Rounds sixteen numbers to f16, bf16 and integers.
struct Round([f32; LANES]);

impl Kernel for Round {
    type Output = ([u16; LANES], [u16; LANES], [i8; LANES]);

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let v = s.load(&self.0);
        (s.to_f16(v), s.to_bf16(v), s.to_i8(v))
    }
}

/// Turns columns into rows.
struct Transpose([[f32; LANES]; LANES]);

impl Kernel for Transpose {
    type Output = [[f32; LANES]; LANES];

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        s.transpose(self.0.map(|row| s.load(&row))).map(|v| s.to_array(v))
    }
}

/// Writes the lower half of a vector.
struct StoreHalf([f32; LANES]);

impl Kernel for StoreHalf {
    type Output = [f32; LANES / 2];

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let mut half = [0.0; LANES / 2];
        s.store_half(s.load(&self.0), &mut half);
        half
    }
}

fn bits(x: [f32; LANES]) -> [u32; LANES] {
    // One NaN is as good as another.
    x.map(|x| if x.is_nan() { u32::MAX } else { x.to_bits() })
}

#[test]
fn narrow_numbers_are_loaded_exactly() {
    for level in Level::available() {
        for first in (0..=u16::MAX).step_by(LANES) {
            let all: [u16; LANES] = std::array::from_fn(|lane| first + lane as u16);
            let want = all.map(|bits| f16::from_bits(bits).to_f32());
            assert_eq!(bits(level.run(Turn::LoadF16(all))), bits(want), "{level:?}");
            let want = all.map(|bits| bf16::from_bits(bits).to_f32());
            assert_eq!(bits(level.run(Turn::LoadBf16(all))), bits(want), "{level:?}");
            let bytes = all.map(|bits| bits as u8 as i8);
            let want = bytes.map(f32::from);
            assert_eq!(level.run(Turn::LoadI8(bytes)), want, "{level:?}");
        }
    }
}

#[test]
fn numbers_are_rounded_to_the_nearest_with_ties_to_even() {
    let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 65_519.0, 65_520.0, 1e-8];
    for level in Level::available() {
        // Every upper half, with lower halves around the ties of both formats.
        for upper in 0..=u16::MAX {
            let lower = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff, 0x0fff, 0x1000, 0x1001, 0x3000];
            let mut x = [1.0; LANES];
            for (x, lower) in x.iter_mut().zip(lower) {
                *x = f32::from_bits(u32::from(upper) << 16 | lower);
            }
            x[10] = special[usize::from(upper) % special.len()];
            let (halves, uppers, _) = level.run(Round(x));
            for (lane, x) in x.into_iter().enumerate() {
                if x.is_nan() {
                    assert!(f16::from_bits(halves[lane]).is_nan(), "{level:?}");
                    assert!(bf16::from_bits(uppers[lane]).is_nan(), "{level:?}");
                } else {
                    assert_eq!(halves[lane], f16::from_f32(x).to_bits(), "{level:?}: {x:e}");
                    assert_eq!(uppers[lane], bf16::from_f32(x).to_bits(), "{level:?}: {x:e}");
                }
            }
        }
        for tenth in -1274..1274 {
            let x = tenth as f32 / 10.0;
            let (.., bytes) = level.run(Round([x; LANES]));
            assert_eq!(bytes, [x.round_ties_even() as i8; LANES], "{level:?}: {x}");
        }
        let halves = std::array::from_fn(|lane| lane as f32 - 7.5);
        let want: [i8; LANES] = [-8, -6, -6, -4, -4, -2, -2, 0, 0, 2, 2, 4, 4, 6, 6, 8];
        assert_eq!(level.run(Round(halves)).2, want, "{level:?}");
    }
}

#[test]
fn columns_become_rows() {
    let block = std::array::from_fn(|i| std::array::from_fn(|j| (100 * i + j) as f32));
    let want: [[f32; LANES]; LANES] = std::array::from_fn(|i| std::array::from_fn(|j| block[j][i]));
    for level in Level::available() {
        assert_eq!(level.run(Transpose(block)), want, "{level:?}");
        assert_eq!(level.run(StoreHalf(block[3]))[..], block[3][..LANES / 2], "{level:?}");
    }
}
