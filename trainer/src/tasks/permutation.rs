//! A shuffled order that needs no memory.

use super::generator::mix;

/// Rounds of the Feistel network; four suffice to look random.
const ROUNDS: u64 = 4;

/// Where `index` goes in a pseudo-random order of `0..n`; a bijection for every `key`.
///
/// A Feistel network permutes the smallest range of `4^k` numbers that covers `n`; a number that
/// falls outside `0..n` is sent through again until it falls inside, fewer than four times on
/// average.
///
/// # Panics
/// If `index` is not below `n`.
pub(super) fn shuffled(index: u64, n: u64, key: u64) -> u64 {
    assert!(index < n, "index {index} of {n}");
    let half_bits = (64 - (n - 1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1_u64 << half_bits) - 1;
    let mut place = index;
    loop {
        let (mut left, mut right) = (place >> half_bits, place & mask);
        for round in 0..ROUNDS {
            let noise = mix(mix(key ^ round) ^ right);
            (left, right) = (right, left ^ (noise & mask));
        }
        place = (left << half_bits) | right;
        if place < n {
            return place;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_index_has_a_place_of_its_own() {
        for n in (1..70).chain([255, 256, 257, 5000]) {
            for key in 0..5 {
                let places: HashSet<u64> = (0..n).map(|i| shuffled(i, n, key)).collect();
                assert_eq!(places.len() as u64, n, "n = {n}, key = {key}");
                assert!(places.iter().all(|&place| place < n));
            }
        }
    }

    #[test]
    fn orders_differ_by_key_and_have_no_bias() {
        let n = 1000;
        let fixed = (0..n).filter(|&i| shuffled(i, n, 1) == shuffled(i, n, 2)).count();
        assert!(fixed < 10, "{fixed} of 1000 stay where they were");
        let firsts: f64 = (0..4000).map(|key| shuffled(0, n, key) as f64).sum::<f64>() / 4000.0;
        assert!((firsts - 499.5).abs() < 25.0, "mean place {firsts}");
    }
}
