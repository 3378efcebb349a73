//! Element-wise operations of the decoder in one pass over memory each way, on all kernel threads.
//!
//! An output row depends on its own inputs alone, bitwise. Sums over rows are split by the shape
//! only, so that they do not depend on the number of threads either.
//!
//! # Layout
//! - [`norm`]: root-mean-square norm.
//! - [`gate`]: the gate of the MLP.
//! - [`rotary`]: rotary position embedding.
//! - `lines`: loops over sixteen elements of several slices at a time.

pub mod gate;
mod lines;
pub mod norm;
pub mod rotary;

/// Elements that one thread takes at a time.
const PART: usize = 1 << 14;

/// Rows of `width` elements that one thread takes at a time. Up to `alone` elements stay on the
/// calling thread: handing over would cost more.
fn rows_at_a_time(rows: usize, width: usize, alone: usize) -> usize {
    let rows = if rows * width <= alone { rows } else { PART / width };
    rows.max(1)
}

/// Numbers of either sign for tests, up to about `size`.
#[cfg(test)]
fn numbers(len: usize, seed: usize, size: f32) -> Vec<f32> {
    (0..len)
        .map(|i| ((i * 7919 + seed * 104_729) % 10_007) as f32 / 97.0)
        .map(|x| x.sin() * size)
        .collect()
}

/// Whether every number is within `tolerance` of what it should be, relative to the largest one.
#[cfg(test)]
fn assert_close(got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    let size = want.iter().fold(f64::MIN_POSITIVE, |size, want| size.max(want.abs()));
    for (i, (&got, want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs() / size;
        assert!(error <= tolerance, "element {i}: {got} instead of {want}");
    }
}
