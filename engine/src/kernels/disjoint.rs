//! Parallel loops over parts of a slice that do not overlap.

use std::marker::PhantomData;

use super::parallel;

/// A mutable slice whose parts are handed to several threads.
pub(super) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    _slice: PhantomData<&'a mut [T]>,
}

// SAFETY: a part is a `&mut [T]`, which may go to another thread if `T` may; that parts do not
// overlap is what callers of `part` promise.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), _slice: PhantomData }
    }

    /// The part of `len` elements from `start` on.
    ///
    /// # Safety
    /// No other part that overlaps this one is alive.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "a part outside of its slice");
        // SAFETY: inside the slice, and not aliased as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

/// Calls `work(i, chunk i)` for every chunk of `size` elements (the last may be shorter).
///
/// # Panics
/// If `size` is 0.
pub fn for_each_chunk<T: Send>(
    data: &mut [T],
    size: usize,
    work: &(dyn Fn(usize, &mut [T]) + Sync),
) {
    let len = data.len();
    let chunks = len.div_ceil(size);
    let shared = Shared::new(data);
    parallel::for_each(chunks, &|i| {
        let start = i * size;
        // SAFETY: `for_each` hands out each `i` once, and chunks do not overlap.
        let chunk = unsafe { shared.part(start, size.min(len - start)) };
        work(i, chunk);
    });
}

/// Work on chunk `i` of two slices.
pub type PairWork<'a, T, U> = dyn Fn(usize, &mut [T], &mut [U]) + Sync + 'a;

/// Calls `work(i, chunk i of a, chunk i of b)` for every chunk of two slices, each given with the
/// size of its chunks (the last may be shorter).
///
/// # Panics
/// If a size is 0, or one slice has more chunks than the other.
pub fn for_each_pair<T: Send, U: Send>(
    a: (&mut [T], usize),
    b: (&mut [U], usize),
    work: &PairWork<'_, T, U>,
) {
    let ((a, a_size), (b, b_size)) = (a, b);
    let b_len = b.len();
    assert_eq!(a.len().div_ceil(a_size), b_len.div_ceil(b_size), "as many chunks in both");
    let b = Shared::new(b);
    for_each_chunk(a, a_size, &|i, a| {
        let start = i * b_size;
        // SAFETY: `for_each_chunk` hands out each `i` once, and chunks do not overlap.
        let b = unsafe { b.part(start, b_size.min(b_len - start)) };
        work(i, a, b);
    });
}

/// `make(i)` for every `i < items`, in order.
pub fn map<T: Send>(items: usize, make: &(dyn Fn(usize) -> T + Sync)) -> Vec<T> {
    let mut made: Vec<Option<T>> = std::iter::repeat_with(|| None).take(items).collect();
    for_each_chunk(&mut made, 1, &|i, slot| slot[0] = Some(make(i)));
    made.into_iter().map(|value| value.expect("every item was made")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_the_slice_once() {
        let mut data = vec![0usize; 103];
        for_each_chunk(&mut data, 10, &|i, chunk| chunk.iter_mut().for_each(|x| *x += i + 1));
        let want: Vec<usize> = (0..103).map(|i| i / 10 + 1).collect();
        assert_eq!(data, want);
    }

    #[test]
    fn pairs_of_chunks_cover_both_slices_once() {
        let (mut a, mut b) = (vec![0usize; 103], vec![0usize; 22]);
        for_each_pair((&mut a, 10), (&mut b, 2), &|i, a, b| {
            a.iter_mut().chain(b).for_each(|x| *x += i + 1);
        });
        assert_eq!(a, (0..103).map(|i| i / 10 + 1).collect::<Vec<_>>());
        assert_eq!(b, (0..22).map(|i| i / 2 + 1).collect::<Vec<_>>());
    }

    #[test]
    #[should_panic(expected = "as many chunks in both")]
    fn pairs_are_whole() {
        for_each_pair((&mut [0; 4], 2), (&mut [0; 4], 1), &|_, _, _| {});
    }

    #[test]
    fn map_keeps_the_order() {
        let want: Vec<usize> = (0..1000).map(|i| i * i).collect();
        assert_eq!(map(1000, &|i| i * i), want);
        assert_eq!(map(0, &|i| i), Vec::<usize>::new());
    }

    #[test]
    #[should_panic(expected = "a part outside of its slice")]
    fn parts_stay_inside() {
        let mut data = [0u8; 4];
        let shared = Shared::new(&mut data);
        // SAFETY: it panics.
        unsafe { shared.part(2, 3) };
    }
}
