//! What the machine can do at most, measured, and the time that some work needs at those rates.

use onpolicy_engine::{
    device::Placement, kernels::matmul, kernels::parallel, torch::slices::floats, weights::Weights,
};
use serde::{Deserialize, Serialize};
use std::{
    hint::black_box,
    time::{Duration, Instant},
};
use tch::{Cuda, Device, Kind, Tensor};

/// Matrix products that are timed, `[m, n, k]`: `[m, k]` times `[n, k]` transposed.
const SHAPES: [[usize; 3]; 2] = [[2048, 1536, 576], [2048, 2048, 2048]];
/// The same of a CUDA device, `m`, `n` and `k` alike.
const DEVICE_SHAPE: i64 = 8192;
/// How long each product, and reading, is repeated.
const TIME: Duration = Duration::from_millis(400);
/// Numbers that must be read so that they come from memory: 256 MB, more than the caches hold.
const COLD: usize = 64 << 20;
/// Numbers that one thread reads at a time.
const PIECE: usize = 1 << 18;
/// Numbers that are read from a device's memory: 4 GB.
const DEVICE_COLD: i64 = 1 << 30;

/// What the machine did at best, on the threads that the benchmark runs on.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Rates {
    /// f32 matrix products of our kernels, in GFLOP/s.
    pub ours_gflops: f64,
    /// The same of libtorch's.
    pub libtorch_gflops: f64,
    /// Reading memory, in GB/s.
    pub read_gbs: f64,
}

impl Rates {
    /// Measures them; takes about two seconds. The weights are what is read, so that no memory is
    /// taken for it; a model that fits the caches is read from a buffer instead.
    ///
    /// Where the weights are not f32 in main memory it is libtorch that computes, in their type and
    /// on their device, and reads a buffer.
    pub fn measure(weights: &Weights) -> Self {
        let placement = weights.iter().next().map(|(_, tensor)| Placement::of(tensor));
        if let Some(placement) = placement.filter(|placement| !placement.is_native()) {
            return of_libtorch(placement);
        }
        let [ours, libtorch] = matrix_products();
        Self { ours_gflops: ours, libtorch_gflops: libtorch, read_gbs: reading(weights) }
    }

    /// The better of two measurements: a ceiling that was reached once is one.
    #[must_use]
    pub fn or_better(self, other: Self) -> Self {
        Self {
            ours_gflops: self.ours_gflops.max(other.ours_gflops),
            libtorch_gflops: self.libtorch_gflops.max(other.libtorch_gflops),
            read_gbs: self.read_gbs.max(other.read_gbs),
        }
    }

    /// The best rate of matrix products, in GFLOP/s.
    pub fn gflops(&self) -> f64 {
        self.ours_gflops.max(self.libtorch_gflops)
    }

    /// What `work` needs at these rates.
    pub fn need(&self, work: &Work) -> Need {
        let arithmetic = |phase: &Phase| phase.flop / (1e9 * self.gflops());
        let memory = |phase: &Phase| phase.bytes / (1e9 * self.read_gbs);
        let sum = |of: &dyn Fn(&Phase) -> f64| work.phases.iter().map(of).sum::<f64>();
        Need {
            gflop: sum(&|phase| phase.flop / 1e9),
            gbytes: sum(&|phase| phase.bytes / 1e9),
            arithmetic_seconds: sum(&arithmetic),
            memory_seconds: sum(&memory),
            seconds: sum(&|phase| arithmetic(phase).max(memory(phase))),
        }
    }
}

/// One thing after another, each of which is bound either by arithmetic or by memory.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Work {
    phases: Vec<Phase>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Phase {
    flop: f64,
    bytes: f64,
}

impl Work {
    /// Adds a phase.
    pub fn add(&mut self, flop: f64, bytes: f64) {
        self.phases.push(Phase { flop, bytes });
    }

    /// This work, then the other.
    #[must_use]
    pub fn then(mut self, other: &Self) -> Self {
        self.phases.extend(&other.phases);
        self
    }

    /// Floating-point operations of all phases; a multiply-add is two.
    pub fn flop(&self) -> f64 {
        self.phases.iter().map(|phase| phase.flop).sum()
    }
}

/// The time that some work needs at the machine's rates.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Need {
    /// Arithmetic, in 10^9 operations.
    pub gflop: f64,
    /// Bytes moved, in 10^9.
    pub gbytes: f64,
    /// Time of the arithmetic alone.
    pub arithmetic_seconds: f64,
    /// Time of the bytes alone.
    pub memory_seconds: f64,
    /// The roofline: of each phase the longer of the two, summed up.
    pub seconds: f64,
}

/// Rates of libtorch's operations in a type and on a device.
fn of_libtorch(Placement { device, kind }: Placement) -> Rates {
    let (size, numbers) = match device.is_cuda() {
        true => (DEVICE_SHAPE, DEVICE_COLD),
        false => (SHAPES[0][2] as i64, COLD as i64),
    };
    let random = || Tensor::randn([size, size], (Kind::Float, device)).to_kind(kind);
    let (a, b) = (random(), random());
    let product = shortest(|| {
        let _ = a.mm(&b);
        wait(device);
    });
    let buffer = Tensor::ones([numbers], (Kind::Float, device));
    let read = shortest(|| {
        let _ = buffer.sum(Kind::Float);
        wait(device);
    });
    Rates {
        ours_gflops: 0.0,
        libtorch_gflops: 2e-9 * (size as f64).powi(3) / product,
        read_gbs: numbers as f64 * size_of::<f32>() as f64 / 1e9 / read,
    }
}

/// Waits until a device has done what it was asked to.
fn wait(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}

/// Best GFLOP/s of our kernels and of libtorch's.
fn matrix_products() -> [f64; 2] {
    let mut best = [0.0f64; 2];
    for [m, n, k] in SHAPES {
        let random = |rows: usize, columns: usize| {
            Tensor::rand([rows as i64, columns as i64], (Kind::Float, Device::Cpu))
        };
        let (a, b) = (random(m, k), random(n, k));
        let (transposed, theirs) = (b.tr(), random(m, n));
        let mut ours = vec![0.0; m * n];
        let gflop = 2e-9 * (m * n * k) as f64;
        let seconds = shortest(|| matmul::nt(floats(&a), floats(&b), None, &mut ours, [m, n, k]));
        best[0] = best[0].max(gflop / seconds);
        let seconds = shortest(|| {
            let _ = a.f_matmul_out(&theirs, &transposed).expect("the shapes fit");
        });
        best[1] = best[1].max(gflop / seconds);
    }
    best
}

/// GB/s at which all threads together read.
fn reading(weights: &Weights) -> f64 {
    let tensors: Vec<Tensor> = weights.iter().map(|(_, tensor)| tensor.detach()).collect();
    let numbers: usize = tensors.iter().map(Tensor::numel).sum();
    let buffer = if numbers < COLD { vec![1.0f32; COLD] } else { Vec::new() };
    let pieces: Vec<&[f32]> = match numbers < COLD {
        true => buffer.chunks(PIECE).collect(),
        false => tensors.iter().flat_map(|tensor| floats(tensor).chunks(PIECE)).collect(),
    };
    let bytes: usize = pieces.iter().map(|piece| size_of_val(*piece)).sum();
    let read = |index: usize| {
        black_box(sum(pieces[index]));
    };
    bytes as f64 / 1e9 / shortest(|| parallel::for_each(pieces.len(), &read))
}

/// Reads every number, in lanes that a compiler makes vectors of.
fn sum(numbers: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 32];
    let (chunks, rest) = numbers.as_chunks::<32>();
    for chunk in chunks {
        for (lane, number) in lanes.iter_mut().zip(chunk) {
            *lane += number;
        }
    }
    lanes.iter().chain(rest).sum()
}

/// The shortest of repeated runs, in seconds; the first, which may still warm up, does not count.
fn shortest(mut work: impl FnMut()) -> f64 {
    work();
    let started = Instant::now();
    let mut best = f64::INFINITY;
    while started.elapsed() < TIME || best.is_infinite() {
        let run = Instant::now();
        work();
        best = best.min(run.elapsed().as_secs_f64());
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_takes_the_longer_of_its_times() {
        let rates = Rates { ours_gflops: 100.0, libtorch_gflops: 50.0, read_gbs: 10.0 };
        let mut work = Work::default();
        work.add(300e9, 10e9); // 3 s of arithmetic, 1 s of memory
        work.add(100e9, 40e9); // 1 s of arithmetic, 4 s of memory
        let need = rates.need(&work);
        assert_eq!((need.gflop, need.gbytes), (400.0, 50.0));
        assert_eq!((need.arithmetic_seconds, need.memory_seconds), (4.0, 5.0));
        assert_eq!(need.seconds, 7.0);
        assert_eq!(work.clone().then(&work).flop(), 800e9);
    }

    #[test]
    fn everything_is_read() {
        let numbers: Vec<f32> = (0..100).map(|i| i as f32).collect();
        assert_eq!(sum(&numbers), 4950.0);
    }

    #[test]
    fn a_machine_has_rates() {
        let weights =
            Weights::new(vec![("w".into(), Tensor::ones([8], (Kind::Float, Device::Cpu)))]);
        let rates = Rates::measure(&weights);
        assert!(rates.ours_gflops > 1.0 && rates.libtorch_gflops > 1.0 && rates.read_gbs > 0.5);
        let narrow =
            Weights::new(vec![("w".into(), Tensor::ones([8], (Kind::BFloat16, Device::Cpu)))]);
        let narrow = Rates::measure(&narrow);
        assert!(narrow.ours_gflops == 0.0 && narrow.gflops() > 0.5 && narrow.read_gbs > 0.5);
        let better = rates.or_better(Rates { ours_gflops: 1e9, ..Rates::default() });
        assert_eq!((better.gflops(), better.read_gbs), (1e9, rates.read_gbs));
    }
}
