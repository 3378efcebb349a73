//! The inner loop: a few broadcast rows times a panel of lanes, on registers.

use crate::kernels::simd::{LANES, Line, Simd, prefetch_address};

/// Most vectors in a panel.
pub(super) const fn widest<S: Simd>() -> usize {
    if S::WIDE { 4 } else { 1 }
}

/// Sixteen lanes of a panel, in whatever form they are kept.
pub(super) trait Lanes: Copy {
    /// How many steps of the depth before their use they are asked for; 0: they are cached.
    const AHEAD: usize;

    /// Their values.
    fn load<S: Simd>(&self, s: S) -> S::V;
}

impl Lanes for Line {
    const AHEAD: usize = 0;

    #[inline(always)]
    fn load<S: Simd>(&self, s: S) -> S::V {
        s.load(&self.0)
    }
}

/// Some rows of the broadcast operand; row `i` starts at `data[i * stride]`, its numbers lie
/// side by side.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) data: &'a [f32],
    pub(super) stride: usize,
}

/// Lanes that matter in the vectors of a panel.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Filled {
    All,
    /// The lower eight; the others may be left as they are.
    Half,
}

/// Adds to `sums[r][lane]` the products of row `r` and the lanes of a panel `width` vectors wide.
#[inline(always)]
pub(super) fn multiply<S: Simd, L: Lanes>(
    s: S,
    (width, filled): (usize, Filled),
    panel: &[L],
    rows: Rows,
    sums: &mut [Line],
) {
    match (const { widest::<S>() }, width) {
        (4, 4) => multiply_panel::<S, L, 4, 6, false>(s, panel, rows, sums),
        (4, 3) => multiply_panel::<S, L, 3, 8, false>(s, panel, rows, sums),
        (4, 2) => multiply_panel::<S, L, 2, 12, false>(s, panel, rows, sums),
        (4, _) => multiply_panel::<S, L, 1, 12, false>(s, panel, rows, sums),
        _ if filled == Filled::Half => multiply_panel::<S, L, 1, 8, true>(s, panel, rows, sums),
        _ => multiply_panel::<S, L, 1, 6, false>(s, panel, rows, sums),
    }
}

/// As [`multiply`], in tiles of `R` rows. A panel is `W` vectors for each step of the depth.
#[inline(always)]
fn multiply_panel<S: Simd, L: Lanes, const W: usize, const R: usize, const HALF: bool>(
    s: S,
    panel: &[L],
    rows: Rows,
    sums: &mut [Line],
) {
    let panel = panel.as_chunks::<W>().0;
    let (tiles, rest) = sums.as_chunks_mut::<W>().0.as_chunks_mut::<R>();
    let mut first = 0;
    for tile in tiles {
        multiply_tile::<S, L, W, _, HALF>(s, panel, rows.from(first), tile);
        first += R;
    }
    let (fours, rest) = rest.as_chunks_mut::<4>();
    for tile in fours {
        multiply_tile::<S, L, W, _, HALF>(s, panel, rows.from(first), tile);
        first += 4;
    }
    let (threes, rest) = rest.as_chunks_mut::<3>();
    for tile in threes {
        multiply_tile::<S, L, W, _, HALF>(s, panel, rows.from(first), tile);
        first += 3;
    }
    let (twos, rest) = rest.as_chunks_mut::<2>();
    for tile in twos {
        multiply_tile::<S, L, W, _, HALF>(s, panel, rows.from(first), tile);
        first += 2;
    }
    for row in rest {
        multiply_tile::<S, L, W, _, HALF>(s, panel, rows.from(first), std::array::from_mut(row));
        first += 1;
    }
}

impl Rows<'_> {
    #[inline(always)]
    fn from(self, row: usize) -> Self {
        Self { data: &self.data[row * self.stride..], stride: self.stride }
    }
}

/// Rows whose addresses an instruction can name from one base: none, one or two strides away.
const NAMED: usize = 3;
/// Bases of the tallest tile.
const BASES: usize = 12 / NAMED;
/// Steps of the depth without a branch between them.
const UNROLLED: usize = 4;

/// Where every third of `R` rows starts. The compiler must not see that all of them follow from the
/// first: it would add up a row's address out of that of the row before, in every step.
#[inline(always)]
fn bases<const R: usize>(data: *const f32, stride: usize) -> [*const f32; BASES] {
    let mut bases = [data; BASES];
    for (i, base) in bases[..R.div_ceil(NAMED)].iter_mut().enumerate().skip(1) {
        *base = std::hint::black_box(data.wrapping_add(NAMED * i * stride));
    }
    bases
}

#[inline(always)]
fn multiply_tile<S: Simd, L: Lanes, const W: usize, const R: usize, const HALF: bool>(
    s: S,
    panel: &[[L; W]],
    Rows { data, stride }: Rows,
    sums: &mut [[Line; W]; R],
) {
    assert!(data.len() >= (R - 1) * stride + panel.len(), "rows end inside of a tile");
    let mut acc = [[s.splat(0.0); W]; R];
    for r in 0..R {
        for w in 0..W {
            acc[r][w] = s.load(&sums[r][w].0);
        }
    }
    let mut at = bases::<R>(data.as_ptr(), stride);
    for steps in panel.chunks(LANES) {
        for r in 0..R {
            prefetch_address(at[r / NAMED].wrapping_add((R + r % NAMED) * stride));
        }
        if L::AHEAD > 0 {
            let ahead = steps.as_ptr().wrapping_add(L::AHEAD).cast::<u8>();
            for line in (0..size_of::<[[L; W]; LANES]>()).step_by(size_of::<Line>()) {
                prefetch_address(ahead.wrapping_add(line).cast());
            }
        }
        let (unrolled, rest) = steps.as_chunks::<UNROLLED>();
        for steps in unrolled {
            for (step, lanes) in steps.iter().enumerate() {
                // SAFETY: every row has as many numbers as the panel has steps, as asserted.
                unsafe { multiply_step(s, lanes, (&at, stride, step), &mut acc) };
            }
            at = at.map(|at| at.wrapping_add(UNROLLED));
        }
        for (step, lanes) in rest.iter().enumerate() {
            // SAFETY: as above.
            unsafe { multiply_step(s, lanes, (&at, stride, step), &mut acc) };
        }
    }
    for r in 0..R {
        for w in 0..W {
            match HALF {
                true => s.store_half(acc[r][w], sums[r][w].0.first_chunk_mut().expect("a half")),
                false => s.store(acc[r][w], &mut sums[r][w].0),
            }
        }
    }
}

/// Adds the products of one step of the depth.
///
/// # Safety
/// Every row must have a number `step` behind its base.
#[inline(always)]
unsafe fn multiply_step<S: Simd, L: Lanes, const W: usize, const R: usize>(
    s: S,
    lanes: &[L; W],
    (at, stride, step): (&[*const f32; BASES], usize, usize),
    acc: &mut [[S::V; W]; R],
) {
    let mut line = [s.splat(0.0); W];
    for w in 0..W {
        line[w] = lanes[w].load(s);
    }
    for r in 0..R {
        // SAFETY: the caller's.
        let x = s.splat(unsafe { *at[r / NAMED].add(step).add(r % NAMED * stride) });
        for w in 0..W {
            acc[r][w] = s.mul_add(x, line[w], acc[r][w]);
        }
    }
}
