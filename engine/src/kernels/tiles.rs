//! The inner loops of attention: a few query rows against a chunk of tokens, on registers.
//!
//! `M` query rows times `B` vectors of results are accumulated at once, so that every key or
//! value that is loaded serves `M` rows and every broadcast of a row serves `B` vectors. Each
//! result is summed in the same order whatever `M` and `B` are: a row's output does not depend
//! on which other rows it is computed with.

use super::pages::BLOCK;
use super::simd::{LANES, Line, Simd, exp};

/// Blocks per chunk.
pub(super) const CHUNK_BLOCKS: usize = 4;
/// Tokens per chunk.
pub(super) const CHUNK: usize = CHUNK_BLOCKS * BLOCK;
/// Most query rows at once: with four vectors each they fill 24 of AVX-512's 32 registers.
pub(super) const MAX_ROWS: usize = 6;

/// Keys whose sums are in registers at once in [`scatter`]; divides a block.
const KEYS: usize = 4;

/// One query row's scores of a chunk, later its weights.
pub(super) type Scores = [Line; CHUNK_BLOCKS];

/// Vectors per row that fit in the registers, for `rows` rows.
const fn vectors<S: Simd>(rows: usize) -> usize {
    match (S::WIDE, rows) {
        (true, _) | (false, 1) => 4,
        (false, 2 | 3) => 2,
        _ => 1,
    }
}

/// Scores of `M` queries, `[head_dim][M]`, for some blocks of keys, `[head_dim][16]` each; the
/// first is the chunk's block `first`.
#[inline(always)]
pub(super) fn score<S: Simd, const M: usize>(
    s: S,
    queries: &[[f32; M]],
    keys: &[&[[f32; BLOCK]]],
    (scores, first): (&mut [Scores], usize),
) {
    let mut block = 0;
    if const { vectors::<S>(M) } == 4 {
        while block + 4 <= keys.len() {
            score_blocks::<S, M, 4>(s, queries, &keys[block..], (scores, first + block));
            block += 4;
        }
    }
    if const { vectors::<S>(M) } >= 2 {
        while block + 2 <= keys.len() {
            score_blocks::<S, M, 2>(s, queries, &keys[block..], (scores, first + block));
            block += 2;
        }
    }
    while block < keys.len() {
        score_blocks::<S, M, 1>(s, queries, &keys[block..], (scores, first + block));
        block += 1;
    }
}

#[inline(always)]
fn score_blocks<S: Simd, const M: usize, const B: usize>(
    s: S,
    queries: &[[f32; M]],
    keys: &[&[[f32; BLOCK]]],
    (scores, at): (&mut [Scores], usize),
) {
    let mut lines: [&[[f32; BLOCK]]; B] = [&[]; B];
    for b in 0..B {
        lines[b] = &keys[b][..queries.len()];
    }
    let mut sums = [[s.splat(0.0); B]; M];
    for (d, query) in queries.iter().enumerate() {
        let mut line = [s.splat(0.0); B];
        for b in 0..B {
            line[b] = s.load(&lines[b][d]);
        }
        for m in 0..M {
            let x = s.splat(query[m]);
            for b in 0..B {
                sums[m][b] = s.mul_add(x, line[b], sums[m][b]);
            }
        }
    }
    for m in 0..M {
        for b in 0..B {
            s.store(sums[m][b], &mut scores[m][at + b].0);
        }
    }
}

/// What a query row keeps from chunk to chunk.
#[derive(Clone, Copy)]
pub(super) struct Running {
    /// The sum of the row's weights relative to its maximum, still spread over lanes.
    sum: Line,
    /// The largest score so far.
    max: f32,
}

impl Running {
    /// No token seen. The maximum is finite, so that a row that sees none of a chunk's tokens
    /// (all scores are minus infinity) gets weights of 0.
    pub(super) const START: Self = Self { sum: Line([0.0; LANES]), max: f32::MIN };

    /// The logarithm of the sum of the exponentials of the row's scores.
    pub(super) fn log_sum(&self) -> f32 {
        self.max + self.sum().ln()
    }

    /// The sum of the row's weights.
    pub(super) fn sum(&self) -> f32 {
        self.sum.0.iter().sum()
    }
}

/// Turns a chunk's scores of `M` rows into weights relative to the new maxima; lane `m` of the
/// result is the factor for what row `m` summed under the old one.
#[inline(always)]
pub(super) fn weigh<S: Simd, const M: usize>(
    s: S,
    scores: &mut [Scores],
    running: &mut [Running],
) -> Line {
    let (mut largest, mut old) = ([f32::NEG_INFINITY; LANES], [0.0; LANES]);
    for m in 0..M {
        let v = load_scores(s, &scores[m]);
        largest[m] = s.largest(s.max(s.max(v[0], v[1]), s.max(v[2], v[3])));
        old[m] = running[m].max;
    }
    let old = s.load(&old);
    let max = s.max(s.load(&largest), old);
    let mut factors = Line([0.0; LANES]);
    s.store(exp(s, s.sub(old, max)), &mut factors.0);
    let max = s.to_array(max);
    for (m, (scores, running)) in scores[..M].iter_mut().zip(running).enumerate() {
        running.max = max[m];
        let max = s.splat(max[m]);
        let mut v = load_scores(s, scores);
        for b in 0..CHUNK_BLOCKS {
            v[b] = exp(s, s.sub(v[b], max));
            s.store(v[b], &mut scores[b].0);
        }
        let sum = s.add(s.add(v[0], v[1]), s.add(v[2], v[3]));
        let old = s.load(&running.sum.0);
        s.store(s.mul_add(old, s.splat(factors.0[m]), sum), &mut running.sum.0);
    }
    factors
}

#[inline(always)]
fn load_scores<S: Simd>(s: S, scores: &Scores) -> [S::V; CHUNK_BLOCKS] {
    let mut v = [s.splat(0.0); CHUNK_BLOCKS];
    for b in 0..CHUNK_BLOCKS {
        v[b] = s.load(&scores[b].0);
    }
    v
}

/// The values of a chunk.
pub(super) struct Values<'a> {
    /// Per block `[16][head_dim]`.
    pub(super) blocks: &'a [&'a [f32]],
    /// Tokens of the chunk that take part; the others may hold anything.
    pub(super) tokens: std::ops::Range<usize>,
    pub(super) head_dim: usize,
}

/// `sums[m] = sums[m] * factors[m] + sum over t of weights[m][t] * values[t]`, for `M` rows; the
/// first argument is weights and factors. A row of `sums` is `head_dim` floats, rounded up to whole lines.
#[inline(always)]
pub(super) fn accumulate<S: Simd, const M: usize>(
    s: S,
    weights: (&[Scores], &Line),
    values: &Values,
    sums: &mut [Line],
) {
    let lines = values.head_dim / LANES;
    let mut line = 0;
    if const { vectors::<S>(M) } == 4 {
        while line + 4 <= lines {
            accumulate_lines::<S, M, 4, false>(s, weights, values, line, sums);
            line += 4;
        }
    }
    if const { vectors::<S>(M) } >= 2 {
        while line + 2 <= lines {
            accumulate_lines::<S, M, 2, false>(s, weights, values, line, sums);
            line += 2;
        }
    }
    while line < lines {
        accumulate_lines::<S, M, 1, false>(s, weights, values, line, sums);
        line += 1;
    }
    if !values.head_dim.is_multiple_of(LANES) {
        accumulate_lines::<S, M, 1, true>(s, weights, values, line, sums);
    }
}

#[inline(always)]
fn accumulate_lines<S: Simd, const M: usize, const B: usize, const HALF: bool>(
    s: S,
    (weights, factors): (&[Scores], &Line),
    values: &Values,
    line: usize,
    sums: &mut [Line],
) {
    let stride = values.head_dim.div_ceil(LANES);
    let mut acc = [[s.splat(0.0); B]; M];
    for m in 0..M {
        for b in 0..B {
            let sum = s.load(&sums[m * stride + line + b].0);
            acc[m][b] = s.mul(sum, s.splat(factors.0[m]));
        }
    }
    let mut token = values.tokens.start;
    while token < values.tokens.end {
        let block = token / BLOCK;
        let end = values.tokens.end.min((block + 1) * BLOCK);
        let rows = values.blocks[block].chunks_exact(values.head_dim);
        let first = token % BLOCK;
        for (t, row) in (first..end - block * BLOCK).zip(rows.skip(first)) {
            let v = load_lines::<S, B, HALF>(s, &row[line * LANES..]);
            for m in 0..M {
                let weight = s.splat(weights[m][block].0[t]);
                for b in 0..B {
                    acc[m][b] = s.mul_add(weight, v[b], acc[m][b]);
                }
            }
        }
        token = end;
    }
    for m in 0..M {
        for b in 0..B {
            s.store(acc[m][b], &mut sums[m * stride + line + b].0);
        }
    }
}

/// `sums[key] += sum over m of weights[m][key] * row(m)`, for the keys of a chunk that are named;
/// those around them, up to whole tiles, get what their weights say too. A row of `sums` is
/// `row(m)`, rounded up to whole lines.
#[inline(always)]
pub(super) fn scatter<'a, S: Simd>(
    s: S,
    weights: &[Scores],
    (row, keys): (&impl Fn(usize) -> &'a [f32], std::ops::Range<usize>),
    sums: &mut [Line],
) {
    let head_dim = if weights.is_empty() { return } else { row(0).len() };
    let stride = head_dim.div_ceil(LANES);
    for key in (keys.start - keys.start % KEYS..keys.end).step_by(KEYS) {
        let sums = &mut sums[key * stride..(key + KEYS) * stride];
        let mut line = 0;
        if const { vectors::<S>(KEYS) } == 4 {
            while line + 4 <= head_dim / LANES {
                scatter_lines::<S, 4, false>(s, (weights, key), row, line, sums);
                line += 4;
            }
        }
        while line < head_dim / LANES {
            scatter_lines::<S, 1, false>(s, (weights, key), row, line, sums);
            line += 1;
        }
        if !head_dim.is_multiple_of(LANES) {
            scatter_lines::<S, 1, true>(s, (weights, key), row, line, sums);
        }
    }
}

#[inline(always)]
fn scatter_lines<'a, S: Simd, const B: usize, const HALF: bool>(
    s: S,
    (weights, key): (&[Scores], usize),
    row: &impl Fn(usize) -> &'a [f32],
    line: usize,
    sums: &mut [Line],
) {
    let stride = sums.len() / KEYS;
    let mut acc = [[s.splat(0.0); B]; KEYS];
    for k in 0..KEYS {
        for b in 0..B {
            acc[k][b] = s.load(&sums[k * stride + line + b].0);
        }
    }
    for (m, weights) in weights.iter().enumerate() {
        let v = load_lines::<S, B, HALF>(s, &row(m)[line * LANES..]);
        let weights: &[f32; KEYS] =
            weights[key / LANES].0[key % LANES..].first_chunk().expect("whole tiles of keys");
        for k in 0..KEYS {
            let weight = s.splat(weights[k]);
            for b in 0..B {
                acc[k][b] = s.mul_add(weight, v[b], acc[k][b]);
            }
        }
    }
    for k in 0..KEYS {
        for b in 0..B {
            s.store(acc[k][b], &mut sums[k * stride + line + b].0);
        }
    }
}

/// `B` lines of a row, or its last half line.
#[inline(always)]
fn load_lines<S: Simd, const B: usize, const HALF: bool>(s: S, row: &[f32]) -> [S::V; B] {
    let mut v = [s.splat(0.0); B];
    if HALF {
        v[0] = s.load_half(row.first_chunk().expect("head_dim is a multiple of 8"));
    } else {
        let lines = row.as_chunks::<LANES>().0;
        for (b, v) in v.iter_mut().enumerate() {
            *v = s.load(&lines[b]);
        }
    }
    v
}
