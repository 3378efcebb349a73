//! A step's rows, block tables and tiles on the device: one tensor, sent at once.

use crate::{
    cuda::{
        CudaError,
        plan::{Machine, Sizes, Work},
        processors::Processors,
        source::ATTENDING_BLOCKS,
    },
    device::{send, upload},
    kernels::attention::Span,
};
use tch::{Device, Kind, Tensor};

/// Numbers of a tile, as in attention.cu.
const TILE: usize = 6;

/// What a plan has room for, so that it can be filled again where it lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Rows of the batch.
    pub rows: usize,
    /// Blocks of all spans, if each had as many as the longest.
    pub blocks: usize,
    /// Tiles and pieces.
    pub sizes: Sizes,
}

impl Capacity {
    /// For any step of up to `rows` sequences with one row and up to `blocks` blocks each.
    pub fn of_decode(rows: usize, blocks: usize, machine: &Machine) -> Self {
        Self { rows, blocks: rows * blocks, sizes: machine.most_of_decode(rows) }
    }

    /// Just what a step needs.
    fn of(spans: &[Span], work: &Work) -> Self {
        let blocks = spans.len() * width(spans);
        Self { rows: work.pieces.len(), blocks, sizes: work.sizes() }
    }

    fn len(&self) -> usize {
        self.parts().iter().sum()
    }

    fn holds(&self, other: &Self) -> bool {
        let pairs = [
            (self.rows, other.rows),
            (self.blocks, other.blocks),
            (self.sizes.tiles, other.sizes.tiles),
            (self.sizes.tile_rows, other.sizes.tile_rows),
            (self.sizes.pieces, other.sizes.pieces),
        ];
        pairs.iter().all(|(own, others)| own >= others)
    }

    /// Lengths of the plan's parts, in i32: tokens, positions and slots of rows (two each), width of the
    /// block tables, spans of rows, their positions once more, where the pieces of rows begin, tiles,
    /// rows of tiles, block tables. These are the last, because a step seldom fills them: only what it
    /// needs is sent.
    fn parts(&self) -> [usize; 10] {
        let Sizes { tiles, tile_rows, .. } = self.sizes;
        let (rows, wide) = (self.rows, 2 * self.rows);
        [wide, wide, wide, 1, rows, rows, rows + 1, tiles * TILE, tile_rows, self.blocks]
    }
}

fn are_single(spans: &[Span]) -> bool {
    spans.iter().all(|span| span.rows.len() == 1)
}

/// Blocks of the span that has the most.
fn width(spans: &[Span]) -> usize {
    spans.iter().map(|span| span.blocks.len()).max().unwrap_or(0)
}

impl Machine {
    /// Of a device, for a model's heads.
    ///
    /// # Errors
    /// If there is no such device.
    pub fn of(
        device: Device,
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> Result<Self, CudaError> {
        let group = heads / kv_heads;
        let Device::Cuda(index) = device else {
            return Ok(Self { group, kv_heads, blocks: 8 });
        };
        let processors = Processors::of(index)?;
        let shared = super::shared_memory(head_dim) as usize;
        let blocks = processors.at_once(shared, ATTENDING_BLOCKS).max(processors.count);
        Ok(Self { group, kv_heads, blocks })
    }
}

/// One step's rows and blocks.
#[derive(Debug)]
pub struct PagedPlan {
    /// `[N]`, i64: the token of each row.
    pub tokens: Tensor,
    /// `[N]`, i64: the position of each row; any one where a row is not in use.
    pub positions: Tensor,
    /// `[N]`, i32: the span of each row.
    pub row_span: Tensor,
    /// `[N]`, i32; -1 where a row is not in use.
    pub row_position: Tensor,
    /// `[N]`, i64: block times 16 plus offset; -1 where a row is not in use.
    pub slots: Tensor,
    row_pieces: Tensor,
    tiles: Tensor,
    tile_rows: Tensor,
    /// One i32: the most blocks of a span.
    table_width: Tensor,
    /// `[spans, table_width]`, i32, and what else there is room for.
    block_tables: Tensor,
    /// All of the above.
    whole: Tensor,
    /// `[N, kv_heads]`, i32: zeros between two kernels, which count in it.
    arrived: Tensor,
    capacity: Capacity,
    machine: Machine,
    single_rows: bool,
}

impl PagedPlan {
    /// A plan of just the step's size, on `device`. There is a token and a slot for each row.
    ///
    /// # Panics
    /// If the spans do not cover as many rows, in order, or a block table is too short for its span.
    pub fn new(
        spans: &[Span],
        tokens_and_slots: [&[i64]; 2],
        machine: Machine,
        device: Device,
    ) -> Self {
        let work = Work::new(spans, &machine);
        let capacity = Capacity::of(spans, &work);
        let whole = upload(&numbers(&capacity, spans, tokens_and_slots, &work), device);
        Self::over(whole, capacity, machine, are_single(spans))
    }

    /// A plan without rows, with room for some, on `device`: for graphs of steps whose sequences have one
    /// row each.
    pub fn with_capacity(capacity: Capacity, machine: Machine, device: Device) -> Self {
        let numbers = numbers(&capacity, &[], [&[]; 2], &Work::default());
        let whole = Tensor::zeros([capacity.len() as i64], (Kind::Int, device));
        send(&numbers, &whole.narrow(0, 0, numbers.len() as i64));
        Self::over(whole, capacity, machine, true)
    }

    /// Overwrites the plan where it lies. Rows from the last span's on are not in use.
    ///
    /// # Errors
    /// If there is no room for it, or a sequence has several rows in a plan of single ones.
    ///
    /// # Panics
    /// As [`PagedPlan::new`].
    pub fn refill(
        &mut self,
        spans: &[Span],
        tokens_and_slots: [&[i64]; 2],
    ) -> Result<(), CudaError> {
        let work = Work::new(spans, &self.machine);
        let needed = Capacity::of(spans, &work);
        if self.single_rows && !are_single(spans) {
            let reason = "several rows of a sequence in a plan of single ones".into();
            return Err(CudaError::Unsupported(reason));
        }
        if !self.capacity.holds(&needed) {
            let reason = format!("a plan with room for {:?}, not {needed:?}", self.capacity);
            return Err(CudaError::Unsupported(reason));
        }
        let numbers = numbers(&self.capacity, spans, tokens_and_slots, &work);
        send(&numbers, &self.whole.narrow(0, 0, numbers.len() as i64));
        Ok(())
    }

    /// Over all of its numbers.
    fn over(whole: Tensor, capacity: Capacity, machine: Machine, single_rows: bool) -> Self {
        let parts = capacity.parts();
        let mut at = 0;
        let [
            tokens,
            positions,
            slots,
            table_width,
            row_span,
            row_position,
            row_pieces,
            tiles,
            tile_rows,
            block_tables,
        ] = parts.map(|len| {
            at += len as i64;
            whole.narrow(0, at - len as i64, len as i64)
        });
        Self {
            tokens: tokens.view_dtype(Kind::Int64),
            positions: positions.view_dtype(Kind::Int64),
            row_span,
            row_position,
            slots: slots.view_dtype(Kind::Int64),
            row_pieces,
            tiles,
            tile_rows,
            table_width,
            block_tables,
            arrived: Tensor::zeros(
                [capacity.rows as i64, machine.kv_heads as i64],
                (Kind::Int, whole.device()),
            ),
            whole,
            capacity,
            machine,
            single_rows,
        }
    }

    /// Whether every sequence has one row: all tokens before it were in the pages before the step.
    pub fn single_rows(&self) -> bool {
        self.single_rows
    }

    /// Rows that there is room for.
    pub fn rows(&self) -> usize {
        self.capacity.rows
    }

    /// Query heads per KV head that it was made for.
    pub fn group(&self) -> usize {
        self.machine.group
    }

    pub(super) fn sizes(&self) -> Sizes {
        self.capacity.sizes
    }

    pub(super) fn row_pieces(&self) -> &Tensor {
        &self.row_pieces
    }

    pub(super) fn tiles(&self) -> &Tensor {
        &self.tiles
    }

    pub(super) fn tile_rows(&self) -> &Tensor {
        &self.tile_rows
    }

    pub(super) fn table_width(&self) -> &Tensor {
        &self.table_width
    }

    pub(super) fn arrived(&self) -> &Tensor {
        &self.arrived
    }

    pub(super) fn block_tables(&self) -> &Tensor {
        &self.block_tables
    }
}

/// The numbers of a plan, in the order of [`Capacity::parts`], up to where its block tables end.
fn numbers(
    capacity: &Capacity,
    spans: &[Span],
    [tokens, slots]: [&[i64]; 2],
    work: &Work,
) -> Vec<i32> {
    let int = |number: usize| i32::try_from(number).expect("a plan's numbers fit into 31 bits");
    let parts = capacity.parts();
    let mut numbers = Vec::with_capacity(parts.iter().sum());
    let mut end = 0;
    let mut parts = parts.into_iter();
    let mut append = |part: &mut dyn Iterator<Item = i32>, rest: i32| {
        end += parts.next().expect("a part for each");
        numbers.extend(part);
        assert!(numbers.len() <= end, "a plan's parts fit");
        numbers.resize(end, rest);
    };
    let rows = spans.last().map_or(0, |span| span.rows.end);
    assert_eq!([rows; 2], [tokens.len(), slots.len()], "a token and a slot for each row");
    let halves = |number: i64| [number as i32, (number >> 32) as i32];
    let positions = |span: &Span| span.first_position..span.first_position + span.rows.len();
    append(&mut tokens.iter().copied().flat_map(halves), 0);
    let wide = spans.iter().flat_map(positions).map(|position| position as i64);
    append(&mut wide.flat_map(halves), 0);
    append(&mut slots.iter().copied().flat_map(halves), -1);
    let width = width(spans);
    append(&mut std::iter::once(int(width)), 0);
    let mut next = 0;
    append(
        &mut spans.iter().enumerate().flat_map(|(index, span)| {
            assert_eq!(span.rows.start, next, "the spans must cover the rows in order");
            next = span.rows.end;
            span.rows.clone().map(move |_| int(index))
        }),
        0,
    );
    append(&mut spans.iter().flat_map(positions).map(int), -1);
    let mut pieces = 0;
    let starts = std::iter::once(0).chain(work.pieces.iter().map(|count| {
        pieces += count;
        pieces
    }));
    let starts: Vec<i32> = starts.map(int).collect();
    append(&mut starts.iter().copied(), starts[starts.len() - 1]);
    let mut tiles = work.tiles.iter().flat_map(|tile| {
        let (rows, tokens) = (&tile.rows, &tile.tokens);
        [rows.start, rows.len(), tile.span, tokens.start, tokens.end, tile.ordinal].map(int)
    });
    append(&mut tiles, 0);
    append(&mut work.tile_rows.iter().map(|&row| int(row)), 0);
    for span in spans {
        let end = span.first_position + span.rows.len();
        assert!(span.blocks.len() >= end.div_ceil(16), "a block table is too short for its span");
        numbers.extend(span.blocks.iter().map(|&block| block as i32));
        numbers.resize(numbers.len() + width - span.blocks.len(), 0);
    }
    numbers
}
