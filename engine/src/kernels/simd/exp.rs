//! The exponential function on sixteen lanes.

use super::Simd;

/// 1.5 * 2^23: a small number added to it is rounded to an integer, in the lowest bits.
const SHIFT: f32 = 12_582_912.0;

/// ln 2 in two parts; few enough bits in the first that its product with any exponent is exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;

/// Below it 2^n is not a normal number any more, and the result is 0.
const LOWEST: f32 = -87.33;

/// (e^r - 1 - r) / r^2 on |r| <= ln 2 / 2, lowest power first: the minimax polynomial in the
/// relative error of e^r (Remez exchange, 3.6e-9 with these rounded coefficients).
const TAIL: [f32; 5] = [0.499_999_94, 0.166_665_21, 0.041_668_39, 0.008_368_745, 0.001_381_454];

/// e^x for x <= 88, within 1.2e-7 relative; 0 below -87.33, exactly 1 at 0, NaN for NaN.
#[inline(always)]
pub fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    let shifted = s.mul_add(x, s.splat(std::f32::consts::LOG2_E), s.splat(SHIFT));
    let n = s.sub(shifted, s.splat(SHIFT));
    let r = s.mul_add(n, s.splat(-LN_2_HIGH), x);
    let r = s.mul_add(n, s.splat(-LN_2_LOW), r);
    let mut tail = s.splat(TAIL[4]);
    for i in [3, 2, 1, 0] {
        tail = s.mul_add(tail, r, s.splat(TAIL[i]));
    }
    let power = s.mul_add(s.mul(r, r), tail, r);
    let power = s.add(power, s.splat(1.0));
    s.zero_below(s.mul(power, s.power_of_two(shifted)), x, LOWEST)
}

#[cfg(test)]
mod tests {
    use super::super::{Kernel, LANES, Level, Simd};
    use super::exp;

    struct Exp([f32; LANES]);

    impl Kernel for Exp {
        type Output = [f32; LANES];

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> [f32; LANES] {
            s.to_array(exp(s, s.load(&self.0)))
        }
    }

    #[test]
    fn error_is_within_two_ulps() {
        for level in Level::available() {
            let mut worst: f64 = 0.0;
            for i in 0..100_000 {
                let x: [f32; LANES] = std::array::from_fn(|lane| {
                    let part = (i * LANES + lane) as f64 / 1_600_000.0;
                    (88.0 - part * 175.3) as f32
                });
                let got = level.run(Exp(x));
                for lane in 0..LANES {
                    let want = f64::from(x[lane]).exp();
                    worst = worst.max((f64::from(got[lane]) / want - 1.0).abs());
                }
            }
            assert!(worst < 1.2e-7, "{level:?}: {worst:e}");
        }
    }

    #[test]
    fn edges() {
        let mut x = [0.0; LANES];
        x[..6].copy_from_slice(&[0.0, -0.0, f32::NEG_INFINITY, f32::MIN, -88.0, f32::NAN]);
        for level in Level::available() {
            let got = level.run(Exp(x));
            assert_eq!(got[..5], [1.0, 1.0, 0.0, 0.0, 0.0], "{level:?}");
            assert!(got[5].is_nan(), "{level:?}");
            assert_eq!(got[6..], [1.0; LANES - 6], "{level:?}");
        }
    }
}
