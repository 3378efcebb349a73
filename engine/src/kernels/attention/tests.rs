//! Against naive attention in f64, on every instruction set.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

/// A layer's pages and sequences in them, at scattered blocks, and some rows of queries.
struct Case {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
    sequences: Vec<Sequence>,
    q: Vec<f32>,
}

/// The last `rows` positions of `len` are queried.
struct Sequence {
    /// `[len, kv_heads, dim]`
    k: Vec<f32>,
    v: Vec<f32>,
    len: usize,
    rows: usize,
    blocks: Vec<u32>,
}

fn normal(rng: &mut StdRng, len: usize) -> Vec<f32> {
    (0..len).map(|_| (0..4).map(|_| rng.random::<f32>() - 0.5).sum::<f32>() * 1.7).collect()
}

impl Case {
    /// `lengths` holds length and queried rows of each sequence.
    fn new(seed: u64, heads: (usize, usize), dim: usize, lengths: &[(usize, usize)]) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let (heads, kv_heads) = heads;
        let needed: usize = lengths.iter().map(|(len, _)| len.div_ceil(BLOCK)).sum();
        let mut free: Vec<u32> = (0..needed as u32 + 3).collect();
        // Whatever no token was written to is poison.
        let len = free.len() * kv_heads * dim * BLOCK;
        let (mut keys, mut values) = (vec![f32::NAN; len], vec![f32::NAN; len]);
        let mut sequences = Vec::new();
        for &(len, rows) in lengths {
            let blocks: Vec<u32> = (0..len.div_ceil(BLOCK))
                .map(|_| free.swap_remove(rng.random_range(0..free.len())))
                .collect();
            let k = normal(&mut rng, len * kv_heads * dim);
            let v = normal(&mut rng, len * kv_heads * dim);
            let slots: Vec<u32> =
                (0..len).map(|t| blocks[t / BLOCK] * 16 + (t % BLOCK) as u32).collect();
            let (keys, values) = (&mut keys[..], &mut values[..]);
            let mut pages = PagesMut { keys, values, kv_heads, head_dim: dim };
            write_pages(&k, &v, &mut pages, &slots);
            sequences.push(Sequence { k, v, len, rows, blocks });
        }
        let rows: usize = lengths.iter().map(|(_, rows)| rows).sum();
        let q = normal(&mut rng, rows * heads * dim);
        Self { heads, kv_heads, dim, keys, values, sequences, q }
    }

    /// Lets every sequence begin with the first one's first `blocks` blocks.
    fn share(&mut self, blocks: usize) {
        let len = blocks * BLOCK * self.kv_heads * self.dim;
        let (first, others) = self.sequences.split_first_mut().expect("there is a sequence");
        for other in others {
            other.blocks[..blocks].copy_from_slice(&first.blocks[..blocks]);
            other.k[..len].copy_from_slice(&first.k[..len]);
            other.v[..len].copy_from_slice(&first.v[..len]);
        }
    }

    /// The output of each sequence when it is alone in the batch, one after the other.
    fn run_alone(&self, level: Level, window: Option<usize>) -> Vec<f32> {
        let pages = self.pages();
        let mut out = Vec::new();
        for sequence in &self.sequences {
            let q = &self.q[out.len()..][..sequence.rows * self.heads * self.dim];
            let first_position = sequence.len - sequence.rows;
            let span = Span { rows: 0..sequence.rows, first_position, blocks: &sequence.blocks };
            let mut alone = vec![f32::NAN; q.len()];
            attend(level, &Batch::new(q, &pages, &[span], window), &mut alone, None);
            out.extend(alone);
        }
        out
    }

    fn pages(&self) -> Pages<'_> {
        Pages {
            keys: &self.keys,
            values: &self.values,
            kv_heads: self.kv_heads,
            head_dim: self.dim,
        }
    }

    fn spans(&self) -> Vec<Span<'_>> {
        let mut row = 0;
        let spans = self.sequences.iter().map(|sequence| {
            let rows = row..row + sequence.rows;
            row = rows.end;
            let first_position = sequence.len - sequence.rows;
            Span { rows, first_position, blocks: &sequence.blocks }
        });
        spans.collect()
    }

    fn run(&self, level: Level, window: Option<usize>) -> Vec<f32> {
        let spans = self.spans();
        let mut out = vec![f32::NAN; self.q.len()];
        let pages = self.pages();
        attend(level, &Batch::new(&self.q, &pages, &spans, window), &mut out, None);
        out
    }

    fn naive(&self, window: Option<usize>) -> Vec<f64> {
        let mut out = Vec::new();
        for sequence in &self.sequences {
            for row in 0..sequence.rows {
                let position = sequence.len - sequence.rows + row;
                for head in 0..self.heads {
                    let at = out.len();
                    let query = &self.q[at..at + self.dim];
                    let kv_head = head / (self.heads / self.kv_heads);
                    let first = window.map_or(0, |w| (position + 1).saturating_sub(w));
                    out.extend(sequence.attend(query, (kv_head, self.kv_heads), first..=position));
                }
            }
        }
        out
    }

    /// Compares with the naive result on every instruction set.
    fn check(&self, window: Option<usize>) {
        let want = self.naive(window);
        for level in Level::available() {
            let got = self.run(level, window);
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                let error = (f64::from(*got) - want).abs();
                assert!(error < 2e-6, "{level:?}, element {i}: {got} instead of {want}");
            }
        }
    }
}

impl Sequence {
    fn attend(
        &self,
        query: &[f32],
        (head, heads): (usize, usize),
        positions: std::ops::RangeInclusive<usize>,
    ) -> Vec<f64> {
        let dim = query.len();
        let row = |of: &'_ [f32], t: usize| -> Vec<f64> {
            of[(t * heads + head) * dim..][..dim].iter().map(|&x| f64::from(x)).collect()
        };
        let scores: Vec<f64> = positions
            .clone()
            .map(|t| row(&self.k, t).iter().zip(query).map(|(k, &q)| k * f64::from(q)).sum())
            .map(|score: f64| score / (dim as f64).sqrt())
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|score| (score - max).exp()).sum();
        let mut out = vec![0.0; dim];
        for (t, score) in positions.zip(scores) {
            let weight = (score - max).exp() / total;
            out.iter_mut().zip(row(&self.v, t)).for_each(|(out, v)| *out += weight * v);
        }
        out
    }
}

const HEADS: [(usize, usize); 6] = [(1, 1), (6, 2), (9, 3), (32, 8), (7, 1), (26, 2)];

#[test]
fn decode_equals_naive_attention() {
    for (i, heads) in HEADS.into_iter().enumerate() {
        for dim in [8, 16, 64, 80, 128] {
            Case::new(i as u64, heads, dim, &[(1, 1), (300, 1), (16, 1), (65, 1)]).check(None);
        }
    }
}

#[test]
fn chunks_of_prompts_equal_naive_attention() {
    for (i, heads) in HEADS.into_iter().enumerate() {
        for dim in [8, 16, 24, 64, 80] {
            let lengths = [(100, 100), (33, 1), (130, 47), (1, 1), (17, 2)];
            Case::new(100 + i as u64, heads, dim, &lengths).check(None);
        }
    }
}

#[test]
fn windows_equal_naive_attention() {
    for window in [1, 5, 16, 63, 64, 65, 200] {
        let lengths = [(150, 150), (300, 1), (70, 3), (2, 1)];
        Case::new(window as u64, (9, 3), 16, &lengths).check(Some(window));
        Case::new(window as u64, (4, 4), 64, &lengths).check(Some(window));
    }
}

#[test]
fn random_shapes_equal_naive_attention() {
    let mut rng = StdRng::seed_from_u64(7);
    for seed in 0..60 {
        let heads = HEADS[rng.random_range(0..HEADS.len())];
        let dim = 8 * rng.random_range(1..=32);
        let lengths: Vec<(usize, usize)> = (0..rng.random_range(1..5))
            .map(|_| {
                let len = rng.random_range(1..150);
                (len, rng.random_range(1..=len))
            })
            .collect();
        let window = rng.random_bool(0.3).then(|| rng.random_range(1..100));
        Case::new(seed, heads, dim, &lengths).check(window);
    }
}

/// A seeded request gives the same tokens whatever else is in the batch, so this must be exact.
#[test]
fn a_row_is_bitwise_the_same_alone_and_in_any_tile() {
    for (heads, dim) in [((9, 3), 64), ((4, 4), 80), ((14, 2), 128)] {
        for window in [None, Some(40)] {
            let mut whole = Case::new(3, heads, dim, &[(200, 200)]);
            let len = heads.0 * dim;
            let queries = whole.q.clone();
            for level in Level::available() {
                whole.sequences[0].len = 200;
                whole.sequences[0].rows = 200;
                whole.q.clone_from(&queries);
                let want = whole.run(level, window);
                for (len_now, rows) in [(1, 1), (70, 1), (129, 30), (200, 1), (200, 67)] {
                    whole.sequences[0].len = len_now;
                    whole.sequences[0].rows = rows;
                    let part = (len_now - rows) * len..len_now * len;
                    whole.q = queries[part.clone()].to_vec();
                    assert_eq!(whole.run(level, window), want[part], "{level:?} {len_now} {rows}");
                }
            }
        }
    }
}

/// Common blocks are read once for all samples of a group; no bit of the result may tell.
#[test]
fn shared_blocks_change_nothing() {
    let group = |len: usize, samples: usize| (0..samples).map(move |i| (len + i % 7, 1));
    let mut lengths: Vec<(usize, usize)> = group(330, 40).collect();
    lengths.extend([(340, 9), (325, 5), (400, 80), (321, 1)]);
    for (i, heads) in HEADS.into_iter().enumerate() {
        for (dim, blocks) in [(64, 20), (80, 9), (24, 3)] {
            let mut case = Case::new(i as u64, heads, dim, &lengths);
            case.share(blocks);
            for window in [None, Some(100), Some(335)] {
                case.check(window);
                for level in Level::available() {
                    assert_eq!(case.run(level, window), case.run_alone(level, window), "{level:?}");
                }
            }
        }
    }
}

#[test]
fn samples_of_a_group_become_one_item() {
    let mut case = Case::new(1, (9, 3), 64, &[(330, 1); 16]);
    case.share(20);
    let pages = case.pages();
    let spans: Vec<Span> = case.spans();
    let batch = Batch::new(&case.q, &pages, &spans, None);
    let parts = items::cut(&batch);
    let shapes = |batch: &Batch| -> Vec<(usize, usize)> {
        items(batch, &parts).iter().map(|item| (item.members.len(), item.shared)).collect()
    };
    assert_eq!(shapes(&batch), [(16, 320); 3]);
    let windowed = Batch::new(&case.q, &pages, &spans, Some(300));
    assert_eq!(shapes(&windowed), [(1, 0); 48]);
}

#[test]
fn far_apart_scores_stay_finite() {
    let mut case = Case::new(5, (2, 1), 64, &[(200, 200)]);
    case.q.iter_mut().for_each(|x| *x *= 1e3);
    let want = case.naive(None);
    for level in Level::available() {
        for (got, want) in case.run(level, None).iter().zip(&want) {
            assert!((f64::from(*got) - want).abs() < 2e-3, "{level:?}: {got} {want}");
        }
    }
}

#[test]
fn an_empty_batch_is_nothing() {
    let case = Case::new(5, (2, 1), 8, &[(3, 1)]);
    paged_attention(&[], &mut [], &case.pages(), &[], None);
}

#[test]
#[should_panic(expected = "a block table is too short for its span")]
fn a_short_block_table_is_refused() {
    let mut case = Case::new(5, (2, 1), 8, &[(33, 1)]);
    case.sequences[0].blocks.pop();
    case.run(Level::best(), None);
}

#[test]
#[should_panic(expected = "a block table names a block outside of the pages")]
fn a_block_outside_of_the_pages_is_refused() {
    let mut case = Case::new(5, (2, 1), 8, &[(33, 1)]);
    case.sequences[0].blocks[1] = 1000;
    case.run(Level::best(), None);
}
