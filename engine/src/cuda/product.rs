//! `x W^T` for few rows of `x`, as a decode step has them: reading W is what it takes.

pub mod choice;

use super::{
    CudaError,
    boxes::{self, Boxes},
    launch::{Argument, Launch, device_of, require},
    processors::Processors,
    source::{Element, Program},
};
use std::{ffi::c_void, fmt, ptr::null};
use tch::{Device, Kind, Tensor};

/// Rows of `x` that there are kernels for: a product takes the least that hold its own.
pub const COLUMNS: [usize; 3] = [16, 32, 64];

/// The compute capability that the kernels are for.
pub const CAPABILITY: (i32, i32) = (9, 0);

/// A kernel: see product.cu.
#[derive(Debug, PartialEq, Eq)]
pub struct Tiling {
    /// Its name.
    pub name: &'static str,
    /// Bytes of shared memory that a block may have.
    budget: usize,
    /// Thread blocks that a multiprocessor can hold so.
    pub blocks: u32,
    /// Blocks that read x for each other: two, or one.
    pub pair: usize,
    /// Groups of threads in a block, which have 128 rows of W each: two, or one.
    pub groups: usize,
}

/// All of them. Where a block takes half of a multiprocessor, those of the next product can begin to read W
/// beside it; where it takes the whole, more of W is on its way. Pairs of blocks read x once for both of them,
/// and so do the groups of a wide one.
pub const TILINGS: [Tiling; 5] = [
    Tiling { name: "product_half", budget: 113 << 10, blocks: 2, pair: 1, groups: 1 },
    Tiling { name: "product_whole", budget: 227 << 10, blocks: 1, pair: 1, groups: 1 },
    Tiling { name: "product_half_pair", budget: 113 << 10, blocks: 2, pair: 2, groups: 1 },
    Tiling { name: "product_whole_pair", budget: 227 << 10, blocks: 1, pair: 2, groups: 1 },
    Tiling { name: "product_wide", budget: 227 << 10, blocks: 1, pair: 1, groups: 2 },
];

/// Depth of a slice.
const SLICE: usize = boxes::COLUMNS;
/// Rows of W in a box.
const BOX: usize = 64;
/// Threads of a group.
const GROUP: usize = 128;
/// Blocks of a cluster at most, on any device.
const MOST_OF_CLUSTER: usize = 8;

impl Tiling {
    /// Threads of a block: those that multiply, and a warp more.
    pub fn threads(&self) -> u32 {
        (self.groups * GROUP) as u32 + 32
    }

    /// Rows of W in a tile: two boxes for each group.
    fn rows(&self) -> usize {
        self.groups * 2 * BOX
    }

    /// Bytes of a slice of W and of so many rows of x, and of the barriers for it.
    fn stage(&self, columns: usize) -> usize {
        (self.rows() + columns) * SLICE * 2 + 16
    }

    /// Bytes beside that: a tile's sums, and a count of its pieces.
    fn beside(&self, columns: usize) -> usize {
        columns * (self.rows() + 4) * 4 + 16
    }

    /// Slices that fit into shared memory.
    pub fn stages(&self, columns: usize) -> usize {
        (self.budget - self.beside(columns)) / self.stage(columns)
    }

    /// Bytes of shared memory of a block: as `Multiplier::Memory`.
    fn shared(&self, columns: usize) -> usize {
        self.stages(columns) * self.stage(columns) + self.beside(columns)
    }
}

/// Who does how much of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deal {
    /// Each tile is done by so many blocks, in equal parts of the depth; a pair's two tiles by so many pairs.
    Parts(usize),
    /// So many blocks, or pairs, take equal runs of units, whichever tiles these belong to.
    Even(usize),
}

/// A way to make a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// The kernel.
    pub tiling: &'static Tiling,
    /// Among how many blocks its work is dealt out.
    pub deal: Deal,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.deal {
            Deal::Parts(parts) => write!(f, "{} / {parts}", self.tiling.name),
            Deal::Even(blocks) => write!(f, "{}, even over {blocks}", self.tiling.name),
        }
    }
}

/// What becomes of the sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Output {
    /// Nothing: they are rounded to the type of `x`.
    Plain,
    /// The gate of an MLP: `silu` of the first half of W's rows times the second half, rounded once.
    Gated,
    /// They stay f32.
    Wide,
}

impl Output {
    /// Numbers that a row has where W has so many rows.
    fn width(self, rows: usize) -> usize {
        if self == Self::Gated { rows / 2 } else { rows }
    }
}

/// What a product is, but for its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Type of all but wide results.
    pub element: Element,
    /// Rows of `x` that the kernel is for, one of [`COLUMNS`].
    pub columns: usize,
    /// Rows of W.
    pub width: usize,
    /// Columns of W.
    pub depth: usize,
    /// What becomes of the sums.
    pub output: Output,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let output = match self.output {
            Output::Plain => "",
            Output::Gated => ", gated",
            Output::Wide => ", f32",
        };
        write!(f, "{} {} x {}{output}", self.element.name(), self.width, self.depth)
    }
}

impl Shape {
    /// Of `x` `[M, depth]` and `weight` `[width, depth]`; none if there are no kernels for them.
    pub fn of(x: &Tensor, weight: &Tensor, output: Output) -> Option<Self> {
        let element = Element::of(x.kind()).filter(|&element| element != Element::F32)?;
        let ([rows, depth], [width, same]) = (axes(x)?, axes(weight)?);
        let columns = COLUMNS.into_iter().find(|&columns| rows <= columns)?;
        let halves = if output == Output::Gated { 2 } else { 1 };
        let whole = depth > 0 && depth.is_multiple_of(8) && width.is_multiple_of(8 * halves);
        let fits = whole && rows > 0 && width > 0 && depth == same && x.kind() == weight.kind();
        // These and units of work are counted in 32 bits.
        let small = [width, depth].into_iter().all(|axis| i32::try_from(axis).is_ok());
        let small = small && width * depth < 1 << 40;
        (fits && small).then_some(Self { element, columns, width, depth, output })
    }

    fn program(&self) -> Program {
        Program::Product(self.element, self.columns)
    }

    /// Tiles, those of a pair counted as one.
    fn tiles(&self, tiling: &Tiling) -> usize {
        self.width.div_ceil(tiling.rows() * tiling.pair)
    }

    fn slices(&self) -> usize {
        self.depth.div_ceil(SLICE)
    }

    /// How its work may be dealt out among a tiling's blocks: whole tiles, tiles in as many parts as there is
    /// room for, in one fewer (a cluster has to fit into one of the device's parts), in half as many, and even
    /// runs of units; where a multiprocessor holds several blocks, all of that as if it held one, too. Not at
    /// all where the tiling is not for these processors.
    fn deals(&self, tiling: &Tiling, processors: &Processors) -> Vec<Deal> {
        let shared = tiling.shared(self.columns);
        let at_once = (1..=tiling.blocks).map(|blocks| processors.at_once(shared, blocks));
        let fits = self.tiles(tiling) * tiling.pair <= MOST_TILES;
        let mut deals: Vec<Deal> = Vec::new();
        for at_once in at_once.filter(|&at_once| fits && at_once >= tiling.pair) {
            for deal in self.deals_of(tiling, at_once / tiling.pair) {
                if !deals.contains(&deal) {
                    deals.push(deal);
                }
            }
        }
        deals
    }

    /// For so many blocks or pairs that run at once; some of them may be the same.
    fn deals_of(&self, tiling: &Tiling, at_once: usize) -> Vec<Deal> {
        let (tiles, slices) = (self.tiles(tiling), self.slices());
        let most = (at_once / tiles).min(slices).min(MOST_OF_CLUSTER / tiling.pair);
        let parts = [1, most.div_ceil(2), most.saturating_sub(1), most];
        let parts = parts.map(|parts| Deal::Parts(parts.max(1)));
        let even = Deal::Even(at_once.min(tiles * slices));
        let uneven = !at_once.is_multiple_of(tiles) && slices > 1;
        parts.into_iter().chain(uneven.then_some(even)).collect()
    }
}

fn axes(matrix: &Tensor) -> Option<[usize; 2]> {
    matrix.size2().ok().map(|(rows, columns)| [rows as usize, columns as usize])
}

/// As in product.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Product {
    weight: Boxes,
    x: Boxes,
    bias: *const c_void,
    out: *mut c_void,
    pieces: *mut f32,
    arrived: *mut i32,
    rows: i32,
    depth: i32,
    width: i32,
    gated: i32,
    wide: i32,
    parts: i32,
}

impl Argument for Product {}

/// Where blocks that share a tile leave their pieces. Products that use the same one follow each other on
/// one stream.
#[derive(Debug)]
pub struct Workspace {
    processors: Processors,
    /// f32
    pieces: Tensor,
    /// i32: zeros, between products.
    arrived: Tensor,
}

/// Tiles of a product at most.
const MOST_TILES: usize = 1 << 15;

impl Workspace {
    /// For any product on a device with these processors.
    ///
    /// # Errors
    /// The device has not as much memory.
    pub fn new(processors: Processors, device: Device) -> Result<Self, tch::TchError> {
        let most = TILINGS.iter().flat_map(|tiling| {
            let blocks = |n| processors.at_once(tiling.shared(n), tiling.blocks);
            COLUMNS.map(|n| 2 * blocks(n) * tiling.rows() * n)
        });
        let most = most.max().unwrap_or(0) as i64;
        Ok(Self {
            processors,
            pieces: Tensor::f_empty([most], (Kind::Float, device))?,
            arrived: Tensor::f_zeros([MOST_TILES as i64], (Kind::Int, device))?,
        })
    }

    /// The ways to make a product on this device.
    pub fn ways(&self, shape: Shape) -> Vec<Way> {
        let deals = |tiling| shape.deals(tiling, &self.processors).into_iter();
        let ways = |tiling| deals(tiling).map(move |deal| Way { tiling, deal });
        TILINGS.iter().flat_map(ways).collect()
    }

    /// `x W^T + b`: `x` `[M, K]`, `weight` `[N, K]`, `bias` `[N]`; `[M, N]`, or `[M, N / 2]` if gated.
    /// All are contiguous, of one type and on the workspace's device.
    ///
    /// # Errors
    /// Shapes or types that do not fit, or what [`Launch::run`] says.
    pub fn product(
        &mut self,
        (x, weight, bias): (&Tensor, &Tensor, Option<&Tensor>),
        output: Output,
        way: Way,
    ) -> Result<Tensor, CudaError> {
        let said = || format!("product of {x:?} and {weight:?} with {bias:?} by {way}");
        let all: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
        let device = device_of(&[&all[..], &[&self.pieces]].concat())?;
        let plain = |part: &&Tensor| {
            let aligned = (part.data_ptr() as usize).is_multiple_of(16);
            aligned && part.is_contiguous() && part.kind() == x.kind()
        };
        let shape = Shape::of(x, weight, output).filter(|_| all.iter().all(plain));
        let biased = bias.is_none_or(|bias| bias.size() == weight.size()[..1]);
        let Some(shape) = shape.filter(|_| biased) else {
            return Err(CudaError::Unsupported(said()));
        };
        let Way { tiling, deal } = way;
        require(shape.deals(tiling, &self.processors).contains(&deal), said)?;
        let rows = x.size()[0];
        let kind = if output == Output::Wide { Kind::Float } else { x.kind() };
        let out = Tensor::empty([rows, output.width(shape.width) as i64], (kind, device));
        let argument = Product {
            weight: Boxes::of(weight, BOX)?,
            x: Boxes::of(x, shape.columns / tiling.pair)?,
            bias: bias.map_or(null(), |bias| bias.data_ptr()),
            out: out.data_ptr(),
            pieces: self.pieces.data_ptr().cast(),
            arrived: self.arrived.data_ptr().cast(),
            rows: rows as i32,
            depth: shape.depth as i32,
            width: shape.width as i32,
            gated: i32::from(output == Output::Gated),
            wide: i32::from(output == Output::Wide),
            parts: if let Deal::Parts(parts) = deal { parts as i32 } else { 1 },
        };
        let (runners, parts) = match deal {
            Deal::Parts(parts) => (parts * shape.tiles(tiling), parts),
            Deal::Even(runners) => (runners, 1),
        };
        let [blocks, cluster] = [runners, parts].map(|number| number * tiling.pair);
        let (program, name) = (shape.program(), tiling.name);
        let shared = tiling.shared(shape.columns) as u32;
        let launch = Launch { program, name, grid: [blocks, 1], shared, cluster: cluster as u32 };
        // SAFETY: shapes and types were checked; there is room for the pieces of as many blocks as run
        // at once, which are the most that leave any; all zeros of `arrived` are zeros again after each
        // product before, which this workspace's stream ends first.
        unsafe { launch.run(device, &argument) }?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests;
