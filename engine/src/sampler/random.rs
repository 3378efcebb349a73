//! Random numbers that depend on a sample's stream and a position in it, and on nothing else.
//!
//! ChaCha with eight rounds is used as a keyed function: the stream is the key, the position the
//! counter. So a number can be had without the ones before it, in any order, and numbers of
//! neighbouring streams or positions have no relation that a test could find.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Sets these numbers apart from those of any other use of the same seeds.
const PURPOSE: [u8; 24] = *b"onpolicy: draw of tokens";

/// 32-bit words of the stream that one position uses up.
const WORDS: u128 = 2;

/// The random stream of sample `index` of a request with this seed. Samples of one seed never
/// share a stream.
pub fn stream_of(seed: u64, index: usize) -> u64 {
    mix(mix(seed).wrapping_add(index as u64))
}

/// A permutation of the 64-bit integers that changes about half of the bits for any change of
/// its argument: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The stream's number at a position, uniform in [0, 1).
pub(super) fn uniform(stream: u64, position: usize) -> f64 {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&stream.to_le_bytes());
    key[8..].copy_from_slice(&PURPOSE);
    let mut rng = ChaCha8Rng::from_seed(key);
    rng.set_word_pos(position as u128 * WORDS);
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Changing these numbers changes the tokens of every seeded request. They come from another
    /// implementation of SplitMix64 and ChaCha8.
    #[test]
    fn numbers_never_change() {
        assert_eq!(stream_of(0, 0), 12_035_550_249_420_947_055);
        assert_eq!(stream_of(7, 3), 17_670_481_865_470_212_032);
        assert_eq!(uniform(0, 0), 0.885_201_114_120_258_5);
        assert_eq!(uniform(1, 1000), 0.158_291_401_999_677_95);
    }

    #[test]
    fn streams_differ() {
        let streams: HashSet<u64> =
            (0..100).flat_map(|seed| (0..100).map(move |index| stream_of(seed, index))).collect();
        assert_eq!(streams.len(), 10_000);
    }

    /// Chi-square over 64 cells along positions and along streams; 120.6 is the 1e-5 quantile.
    #[test]
    fn numbers_are_uniform() {
        for by_position in [true, false] {
            let mut cells = [0u32; 64];
            for i in 0..64_000 {
                let (stream, position) = if by_position { (3, i) } else { (i as u64, 3) };
                let x = uniform(stream, position);
                assert!((0.0..1.0).contains(&x));
                cells[(x * 64.0) as usize] += 1;
            }
            let chi: f64 = cells.iter().map(|&n| (f64::from(n) - 1000.0).powi(2) / 1000.0).sum();
            assert!(chi < 120.6, "{chi}");
        }
    }
}
