//! The programs: sources, and the kernels that are made of them.

use super::product::{self, COLUMNS, TILINGS, Tiling};
use std::fmt;

const DEVICE: &str = include_str!("kernels/device.cuh");
const COMMON: &str = include_str!("kernels/common.cuh");

/// Type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Element {
    /// f32.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
}

impl Element {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::F16];

    /// Of a tensor's kind, if kernels take it.
    pub fn of(kind: tch::Kind) -> Option<Self> {
        match kind {
            tch::Kind::Float => Some(Self::F32),
            tch::Kind::BFloat16 => Some(Self::Bf16),
            tch::Kind::Half => Some(Self::F16),
            _ => None,
        }
    }

    /// Its name in the sources.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// Bytes.
    pub fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }
}

/// Dimensions of a head that attention has kernels for.
pub const HEAD_DIMS: [usize; 5] = [64, 80, 96, 112, 128];

/// Blocks of the kernel of attention that a multiprocessor holds, if its shared memory is large
/// enough.
pub const ATTENDING_BLOCKS: u32 = 3;

/// What is compiled at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Program {
    /// Attention over pages with heads of so many dimensions.
    Attention(Element, usize),
    /// Writing pages.
    Pages(Element),
    /// Products with few rows; with up to so many.
    Product(Element, usize),
    /// Norm, rotary embedding, gate.
    Elementwise(Element),
    /// Logits to tokens.
    Sampling(Element),
    /// The optimizer's step, for served tensors of a type.
    AdamW(Element),
}

/// A kernel of a program.
struct Entry {
    name: &'static str,
    template: &'static str,
    argument: &'static str,
    /// Arguments of the template.
    parameters: String,
    threads: u32,
    /// Blocks that a multiprocessor is to hold at once: a bound for a thread's registers.
    blocks: u32,
    /// It says itself when the kernel before has to have ended; others begin then.
    ahead: bool,
}

impl Entry {
    /// What calls the template with argument `a`.
    fn body(&self) -> String {
        let wait =
            if self.ahead { "" } else { "let_kernel_after_begin(); wait_for_kernel_before(); " };
        format!("{wait}{}{}", self.template, self.parameters)
    }
}

impl Program {
    /// All programs.
    pub fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for element in Element::ALL {
            all.extend(HEAD_DIMS.map(|dim| Self::Attention(element, dim)));
            if element != Element::F32 {
                all.extend(COLUMNS.map(|columns| Self::Product(element, columns)));
            }
            all.extend([Self::Pages(element), Self::Elementwise(element)]);
            all.extend([Self::Sampling(element), Self::AdamW(element)]);
        }
        all
    }

    /// Whether it can be compiled for devices of this compute capability.
    pub fn is_for(self, capability: (i32, i32)) -> bool {
        match self {
            Self::Product(..) => capability == product::CAPABILITY,
            _ => true,
        }
    }

    /// The architecture that it is compiled for: some of what the tensor cores do belongs to one alone.
    pub fn architecture(self, (major, minor): (i32, i32)) -> String {
        let only = if matches!(self, Self::Product(..)) { "a" } else { "" };
        format!("sm_{major}{minor}{only}")
    }

    fn source(self) -> &'static str {
        match self {
            Self::Attention(..) => include_str!("kernels/attention.cu"),
            Self::Pages(_) => include_str!("kernels/pages.cu"),
            Self::Product(..) => include_str!("kernels/product.cu"),
            Self::Elementwise(_) => include_str!("kernels/elementwise.cu"),
            Self::Sampling(_) => include_str!("kernels/sampling.cu"),
            Self::AdamW(_) => include_str!("kernels/adamw.cu"),
        }
    }

    fn entries(self) -> Vec<Entry> {
        let entry = |name, argument, threads, parameters: &str| Entry {
            name,
            template: name,
            argument,
            parameters: parameters.into(),
            threads,
            blocks: 1,
            ahead: false,
        };
        match self {
            Self::Attention(element, dim) => {
                let parameters = format!("<{}, {dim}>", element.name());
                let entry = |name| entry(name, "Attend", 128, &parameters);
                if element == Element::F32 {
                    return vec![entry("attend_plainly")];
                }
                let kernel = |name| Entry { blocks: ATTENDING_BLOCKS, ahead: true, ..entry(name) };
                vec![kernel("attend"), kernel("decode")]
            }
            Self::Pages(element) => {
                let parameters = format!("<{}>", element.name());
                vec![entry("write_kv", "WriteKv", 128, &parameters)]
            }
            Self::Product(element, columns) => {
                let tilings = TILINGS.iter().map(|tiling| {
                    let (name, stages) = (element.name(), tiling.stages(columns));
                    let Tiling { pair, groups, .. } = tiling;
                    let parameters = format!("<{name}, {columns}, {stages}, {pair}, {groups}>");
                    Entry {
                        template: "product",
                        blocks: tiling.blocks,
                        ahead: true,
                        ..entry(tiling.name, "Product", tiling.threads(), &parameters)
                    }
                });
                tilings.collect()
            }
            Self::Elementwise(element) => {
                let parameters = format!("<{}>", element.name());
                vec![
                    entry("rms_norm", "Norm", 256, &parameters),
                    entry("rotate", "Rotate", 128, &parameters),
                    entry("rotate_write", "RotateWrite", 128, &parameters),
                    entry("swiglu", "Gate", 256, &parameters),
                    entry("swiglu_gradient", "GateGradient", 256, &parameters),
                ]
            }
            Self::Sampling(element) => {
                let parameters = format!("<{}>", element.name());
                vec![
                    entry("sum_slices", "Draw", 256, &parameters),
                    entry("draw", "Draw", 256, &parameters),
                    entry("gradient", "Gradient", 256, &parameters),
                    entry("gradient_bf16", "Gradient", 256, &parameters),
                    entry("gradient_f16", "Gradient", 256, &parameters),
                ]
            }
            Self::AdamW(element) => {
                vec![entry("adamw", "AdamW", 256, &format!("<{}>", element.name()))]
            }
        }
    }

    /// Threads of a block of the kernel of this name.
    ///
    /// # Panics
    /// If there is none.
    pub fn threads(self, name: &str) -> u32 {
        let entries = self.entries();
        let entry = entries.iter().find(|entry| entry.name == name);
        entry.unwrap_or_else(|| panic!("{self} has no kernel '{name}'")).threads
    }

    /// The whole source for a device.
    pub fn device_source(self) -> String {
        let kernel = |entry: &Entry| {
            let Entry { name, argument, threads, blocks, .. } = entry;
            let body = entry.body();
            format!(
                "extern \"C\" __global__ void __launch_bounds__({threads}, {blocks}) \
                 kernel_{name}(const __grid_constant__ {argument} a) {{ {body}(a); }}\n"
            )
        };
        let kernels: String = self.entries().iter().map(kernel).collect();
        [DEVICE, COMMON, self.source(), &kernels].concat()
    }

    /// The whole source for the CPU harness; one that looks for races, too.
    #[cfg(test)]
    pub(super) fn harness_source(self, watched: bool) -> String {
        let kernel = |entry: &Entry| {
            let Entry { name, argument, threads, .. } = entry;
            let body = entry.body();
            format!(
                "extern \"C\" void kernel_{name}(const void *a, unsigned x, unsigned y, unsigned cluster) {{ \
                 machine::launch([](const void *a) {{ \
                 {body}(*(const {argument} *)a); }}, a, {{x, y, 1}}, {threads}, cluster); }}\n"
            )
        };
        let kernels: String = self.entries().iter().map(kernel).collect();
        let races = (super::harness::WATCHED, include_str!("harness/races.h"));
        let (before, after) = if watched { races } else { ("", "") };
        let machine = include_str!("harness/machine.h");
        [before, machine, after, COMMON, self.source(), &kernels].concat()
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attention(element, dim) => write!(f, "attention of {} by {dim}", element.name()),
            Self::Pages(element) => write!(f, "pages of {}", element.name()),
            Self::Product(element, columns) => {
                write!(f, "products of {} with {columns} rows", element.name())
            }
            Self::Elementwise(element) => write!(f, "elementwise of {}", element.name()),
            Self::Sampling(element) => write!(f, "sampling of {}", element.name()),
            Self::AdamW(element) => write!(f, "AdamW of {}", element.name()),
        }
    }
}
