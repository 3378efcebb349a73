//! Groups as spans over pages.

use crate::kernels::attention::{BLOCK, Pages, PagesMut, Span, write_pages};
use std::ops::Range;

/// One prompt and the tails (response tokens) that continue it, as rows of a pack. The prompt's
/// rows come first, the tails follow one after the other without gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedGroup {
    /// Rows of the prompt; at least one.
    pub prompt: Range<usize>,
    /// Length of each tail in rows; may be 0.
    pub tails: Vec<usize>,
}

impl PackedGroup {
    /// First row of tail `index`.
    pub fn tail_start(&self, index: usize) -> usize {
        self.prompt.end + self.tails[..index].iter().sum::<usize>()
    }

    /// All rows of the group.
    pub fn rows(&self) -> Range<usize> {
        self.prompt.start..self.tail_start(self.tails.len())
    }
}

/// A prompt, or a tail that is not empty.
pub(super) struct Sequence {
    /// Its group.
    pub group: usize,
    pub rows: Range<usize>,
    /// Position of the first row: 0 or the prompt's length.
    pub first_position: usize,
    pub blocks: Vec<u32>,
}

impl Sequence {
    /// Positions, the prompt's included.
    pub fn len(&self) -> usize {
        self.first_position + self.rows.len()
    }
}

/// Where the keys and values of a pack's rows lie in pages.
#[derive(Default)]
pub(super) struct Layout {
    /// In the order of their rows.
    pub sequences: Vec<Sequence>,
    /// First row and slots of rows that follow each other. A prompt's rows in a block that tails
    /// write to are there for each of them.
    runs: Vec<(usize, Vec<u32>)>,
    blocks: u32,
}

impl Layout {
    pub fn new(groups: &[PackedGroup]) -> Self {
        let mut layout = Self::default();
        for (number, group) in groups.iter().enumerate() {
            layout.add(number, group);
        }
        layout
    }

    fn add(&mut self, number: usize, group: &PackedGroup) {
        let len = group.prompt.len();
        let prompt = self.take(len.div_ceil(BLOCK));
        self.put(group.prompt.start, &prompt, 0..len);
        self.sequences.push(Sequence {
            group: number,
            rows: group.prompt.clone(),
            first_position: 0,
            blocks: prompt.clone(),
        });
        let shared = len / BLOCK;
        let mut row = group.prompt.end;
        for &tail in group.tails.iter().filter(|&&tail| tail > 0) {
            let mut blocks = prompt[..shared].to_vec();
            blocks.extend(self.take((len + tail).div_ceil(BLOCK) - shared));
            self.put(group.prompt.start + shared * BLOCK, &blocks, shared * BLOCK..len);
            self.put(row, &blocks, len..len + tail);
            let rows = row..row + tail;
            row = rows.end;
            self.sequences.push(Sequence { group: number, rows, first_position: len, blocks });
        }
    }

    fn take(&mut self, count: usize) -> Vec<u32> {
        let first = self.blocks;
        self.blocks += count as u32;
        (first..self.blocks).collect()
    }

    /// Rows from `row` on stand at `positions` of the sequence with these blocks.
    fn put(&mut self, row: usize, blocks: &[u32], positions: Range<usize>) {
        let slot = |p: usize| blocks[p / BLOCK] * BLOCK as u32 + (p % BLOCK) as u32;
        self.runs.push((row, positions.map(slot).collect()));
    }

    pub fn spans<'a>(&'a self) -> Vec<Span<'a>> {
        let span = |sequence: &'a Sequence| Span {
            rows: sequence.rows.clone(),
            first_position: sequence.first_position,
            blocks: &sequence.blocks,
        };
        self.sequences.iter().map(span).collect()
    }
}

/// Pages that hold a pack's keys and values; zero where there is none.
pub(super) struct PageBuffers {
    keys: Vec<f32>,
    values: Vec<f32>,
    kv_heads: usize,
    head_dim: usize,
}

impl PageBuffers {
    /// Pages of `k` and `v`, `[rows, kv_heads, head_dim]`.
    pub fn new(layout: &Layout, k: &[f32], v: &[f32], [kv_heads, head_dim]: [usize; 2]) -> Self {
        let (width, len) = (kv_heads * head_dim, layout.blocks as usize * BLOCK);
        let mut buffers = Self {
            keys: vec![0.0; len * width],
            values: vec![0.0; len * width],
            kv_heads,
            head_dim,
        };
        let Self { keys, values, .. } = &mut buffers;
        let mut pages = PagesMut { keys, values, kv_heads, head_dim };
        for (row, slots) in &layout.runs {
            let part = row * width..(row + slots.len()) * width;
            write_pages(&k[part.clone()], &v[part], &mut pages, slots);
        }
        buffers
    }

    pub fn pages(&self) -> Pages<'_> {
        let Self { keys, values, kv_heads, head_dim } = self;
        Pages { keys, values, kv_heads: *kv_heads, head_dim: *head_dim }
    }
}
