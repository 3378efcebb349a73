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

/// How a kernel cuts its work: see product.cu.
#[derive(Debug, PartialEq, Eq)]
pub struct Tiling {
    /// The kernel.
    pub name: &'static str,
    /// Groups of four warps with 128 rows of W each.
    pub groups: usize,
    /// Slices of the depth in shared memory, most of them on their way there.
    pub stages: usize,
    /// Thread blocks that a multiprocessor is to hold.
    pub blocks: u32,
}

/// All of them. Tall tiles read `x` less often; short ones leave smaller pieces; where a block takes half of
/// a multiprocessor, those of the next product can begin to read W beside it.
pub const TILINGS: [Tiling; 5] = [
    Tiling { name: "product_128", groups: 1, stages: 4, blocks: 2 },
    Tiling { name: "product_128_half", groups: 1, stages: 4, blocks: 1 },
    Tiling { name: "product_128_deep", groups: 1, stages: 8, blocks: 1 },
    Tiling { name: "product_256", groups: 2, stages: 5, blocks: 1 },
    Tiling { name: "product_384", groups: 3, stages: 4, blocks: 1 },
];

/// Depth of a slice.
const SLICE: usize = boxes::COLUMNS;
/// Rows of W in a box, two of which a group has.
const BOX: usize = 64;

impl Tiling {
    /// Threads of a block: a warp more than its groups have.
    pub fn threads(&self) -> u32 {
        32 + 128 * self.groups as u32
    }

    /// Rows of W in a tile.
    fn rows(&self) -> usize {
        2 * BOX * self.groups
    }

    /// Bytes of shared memory of a block: as `Multiplier::Memory`, and to begin at a multiple of 1024.
    fn shared(&self, columns: usize) -> usize {
        self.stages * ((self.rows() + columns) * SLICE * 2 + 16) + 1024
    }

    /// Thread blocks that run at once; none if the device has not enough shared memory for one.
    fn at_once(&self, columns: usize, processors: &Processors) -> usize {
        processors.at_once(self.shared(columns), self.blocks)
    }
}

/// Who does how much of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deal {
    /// Each tile is done by so many blocks, in equal parts of the depth.
    Parts(usize),
    /// As many blocks as run at once take equal runs of units, whichever tiles these belong to.
    Even,
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
            Deal::Even => write!(f, "{}, even", self.tiling.name),
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
        // Units of work are counted in 32 bits.
        let small = width.checked_mul(depth).is_some_and(|numbers| numbers < 1 << 40);
        (fits && small).then_some(Self { element, columns, width, depth, output })
    }

    fn program(&self) -> Program {
        Program::Product(self.element, self.columns)
    }

    fn tiles(&self, tiling: &Tiling) -> usize {
        self.width.div_ceil(tiling.rows())
    }

    fn slices(&self) -> usize {
        self.depth.div_ceil(SLICE)
    }

    /// How its work may be dealt out among blocks of a tiling: whole tiles, tiles in as many parts as
    /// there is room for, in half as many, and even runs of units. Not at all where the tiling is not for
    /// these processors.
    fn deals(&self, tiling: &Tiling, processors: &Processors) -> Vec<Deal> {
        let at_once = tiling.at_once(self.columns, processors);
        if at_once == 0 || self.tiles(tiling) > MOST_TILES {
            return Vec::new();
        }
        let most = (at_once / self.tiles(tiling)).min(self.slices());
        let mut parts = vec![1, most.div_ceil(2), most];
        parts.retain(|&parts| parts > 0);
        parts.sort_unstable();
        parts.dedup();
        let uneven = !at_once.is_multiple_of(self.tiles(tiling)) && self.slices() > 1;
        let even = uneven.then_some(Deal::Even);
        parts.into_iter().map(Deal::Parts).chain(even).collect()
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
        let piece = |tiling: &Tiling, columns| tiling.rows() * columns;
        let sizes = TILINGS.iter().flat_map(|tiling| {
            COLUMNS.map(|n| 2 * tiling.at_once(n, &processors) * piece(tiling, n))
        });
        let most = sizes.max().unwrap_or(0) as i64;
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
            x: Boxes::of(x, shape.columns)?,
            bias: bias.map_or(null(), |bias| bias.data_ptr()),
            out: out.data_ptr(),
            pieces: self.pieces.data_ptr().cast(),
            arrived: self.arrived.data_ptr().cast(),
            rows: rows as i32,
            depth: shape.depth as i32,
            width: shape.width as i32,
            gated: i32::from(output == Output::Gated),
            wide: i32::from(output == Output::Wide),
        };
        let blocks = match deal {
            Deal::Parts(parts) => parts * shape.tiles(tiling),
            Deal::Even => {
                let units = shape.tiles(tiling) * shape.slices();
                tiling.at_once(shape.columns, &self.processors).min(units)
            }
        };
        let shared = tiling.shared(shape.columns) as u32;
        let launch =
            Launch { program: shape.program(), name: tiling.name, grid: [blocks, 1], shared };
        // SAFETY: shapes and types were checked; there is room for the pieces of as many blocks as run
        // at once, and more of them leave none; all zeros of `arrived` are zeros again after each
        // product before, which this workspace's stream ends first.
        unsafe { launch.run(device, &argument) }?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests;
