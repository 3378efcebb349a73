//! Which kernels make a model's products of few rows fastest on a CUDA device, libtorch's among them:
//! tried out with the model's own weights, and remembered for the next process.
//!
//! What reads the weights once is bound by memory; how near a kernel comes to that depends on shapes
//! and device in ways that are better measured than guessed. Each way to make a product is compared
//! with libtorch's numbers, by itself and as the last one of a graph whose kernels overlap.

use super::distance;
use crate::{
    cuda::{
        CudaError, cache,
        driver::Driver,
        launch::overlapping,
        product::{
            COLUMNS, Output, Way,
            choice::{self, Case},
        },
        source::{Element, Program},
    },
    ops::{
        linear::{linear, logits},
        rms_norm::rms_norm,
        swiglu::gated,
    },
    profile::untimed,
    torch::{TorchError, graph::Graph, random, stream::synchronize},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Instant,
};
use tch::{Device, Kind, Tensor};

/// Runs of which the fastest counts: of every way, and of those that are left then.
const RUNS: [usize; 2] = [3, 12];
/// Ways that are left.
const LEFT: usize = 4;
/// How much more than libtorch's a way's time may be: in a step our kernels begin beside the one before,
/// and let the next one begin, which is worth more there than it is here.
const SLACK: f64 = 1.02;
/// Numbers of f32 that are more than a device's caches hold: 256 MiB.
const MORE_THAN_CACHES: i64 = 64 << 20;

/// The same product in every layer of a model.
#[derive(Debug)]
pub struct Products<'a> {
    /// Of what.
    pub name: &'static str,
    /// Weight and bias of each layer.
    pub layers: Vec<(&'a Tensor, Option<&'a Tensor>)>,
    /// What becomes of the sums.
    pub output: Output,
}

impl Products<'_> {
    fn weight(&self) -> &Tensor {
        self.layers[0].0
    }

    /// In one layer, by what was chosen.
    fn make(&self, x: &Tensor, layer: usize) -> Tensor {
        let (weight, bias) = self.layers[layer];
        match self.output {
            Output::Plain => linear(x, weight, bias),
            Output::Gated => gated(x, weight, bias),
            Output::Wide => logits(x, weight),
        }
    }

    /// One input for each kind of case.
    fn inputs(&self) -> Vec<Tensor> {
        let weight = self.weight();
        let rows = [1].into_iter().chain(COLUMNS);
        let random = |rows: usize| random::normal(&[rows as i64, weight.size()[1]]);
        rows.map(|rows| random(rows).to_kind(weight.kind()).to_device(weight.device())).collect()
    }
}

/// How long a case took, by one layer, and a norm before it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// Microseconds of libtorch's own.
    pub libtorch: f64,
    /// Microseconds of each [`Way`] whose numbers were right.
    pub ways: BTreeMap<String, f64>,
}

impl Trial {
    /// The fastest of `ways`, unless libtorch's is faster by more than little.
    pub fn fastest(&self, ways: &[Way]) -> Option<Way> {
        let times = ways.iter().filter_map(|way| Some((*way, *self.ways.get(&way.to_string())?)));
        let (way, time) = times.min_by(|(_, a), (_, b)| a.total_cmp(b))?;
        (time < SLACK * self.libtorch).then_some(way)
    }
}

/// One way to make a product after the other.
#[derive(Debug)]
pub struct Tried {
    /// Of what.
    pub name: &'static str,
    /// Shapes and type.
    pub case: Case,
    /// How long each took.
    pub trial: Trial,
    /// The fastest, if it is not libtorch's.
    pub chosen: Option<Way>,
}

/// Times every way to make `products` with each number of rows that there are kernels for, but for what
/// `known` has, and adds that to it. The fastest is chosen for the products that follow.
///
/// # Errors
/// What the device refuses.
pub fn choose_fastest(
    products: &[Products<'_>],
    known: &mut BTreeMap<String, Trial>,
) -> Result<Vec<Tried>, CudaError> {
    let (mut tried, mut watch) = (Vec::new(), Stopwatch::default());
    for products in products {
        for x in products.inputs() {
            let Some(case) = Case::of(&x, products.weight(), products.output) else { continue };
            let trial = match known.get(&case.to_string()) {
                Some(trial) => trial.clone(),
                None => {
                    let trial = try_all(products, &x, case, &mut watch);
                    choice::choose(x.device(), case, None);
                    trial?
                }
            };
            let chosen = trial.fastest(&choice::ways(x.device(), &case)?);
            choice::choose(x.device(), case, chosen);
            known.insert(case.to_string(), trial.clone());
            tried.push(Tried { name: products.name, case, trial, chosen });
        }
    }
    Ok(tried)
}

fn try_all(
    products: &Products<'_>,
    x: &Tensor,
    case: Case,
    watch: &mut Stopwatch,
) -> Result<Trial, CudaError> {
    let (device, (weight, bias)) = (x.device(), products.layers[0]);
    choice::choose(device, case, None);
    let wanted = products.make(x, 0);
    let (libtorch, wanted_last) = watch.microseconds(products, x, RUNS[0] + RUNS[1])?;
    let mut trial = Trial { libtorch, ways: BTreeMap::new() };
    let mut right = Vec::new();
    for way in choice::ways(device, &case)? {
        let made = match choice::product_by((x, weight, bias), products.output, way) {
            Ok(made) => made,
            Err(error) => {
                tracing::warn!(%case, %way, %error, "a kernel cannot be used");
                continue;
            }
        };
        choice::choose(device, case, Some(way));
        let (time, made_last) = watch.microseconds(products, x, RUNS[0])?;
        let distance = distance(&made, &wanted).max(distance(&made_last, &wanted_last));
        if distance > tolerance(x.kind()) {
            tracing::warn!(%case, %way, distance, "a kernel's numbers are wrong");
            continue;
        }
        right.push((time, way));
    }
    right.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    for (time, way) in right.iter_mut().take(LEFT) {
        choice::choose(device, case, Some(*way));
        *time = time.min(watch.microseconds(products, x, RUNS[1])?.0);
    }
    trial.ways.extend(right.into_iter().map(|(time, way)| (way.to_string(), time)));
    Ok(trial)
}

/// How far two ways to round and sum may lie apart: some of the last bits.
fn tolerance(kind: Kind) -> f64 {
    if kind == Kind::BFloat16 { 1.0 / 64.0 } else { 1.0 / 512.0 }
}

#[derive(Default)]
struct Stopwatch {
    /// Is read before each run on a CUDA device, so that its caches hold nothing of the weights.
    others: Option<Tensor>,
    /// Whose memory all graphs share.
    first: Option<Graph>,
}

impl Stopwatch {
    /// Of the products of all layers, one after the other as in a recorded step, by their number: the
    /// fastest of some runs. A norm comes before each, since in a step other kernels do, beside which a
    /// product may begin to read its weights. And the last layer's product of the last run, by itself.
    fn microseconds(
        &mut self,
        products: &Products<'_>,
        x: &Tensor,
        runs: usize,
    ) -> Result<(f64, Tensor), TorchError> {
        let layers = products.layers.len();
        let scale = Tensor::ones([x.size()[1]], (x.kind(), x.device()));
        let make = |layer| products.make(&rms_norm(x, &scale, 1e-6), layer);
        let all = || (1..layers).fold(make(0), |_, layer| make(layer));
        let (seconds, made) = match x.device() {
            Device::Cuda(index) => {
                let pool = self.first.as_ref().map(Graph::pool).transpose()?;
                let recorded = untimed(|| Graph::record(index, pool, || overlapping(all)));
                let (mut graph, made) = recorded?;
                let others = self.others(x.device())?;
                let before = || {
                    let _ = others.sum(Kind::Float);
                    synchronize(index)
                };
                let best = best_of(runs, before, || graph.run().and_then(|()| synchronize(index)));
                self.first.get_or_insert(graph);
                // Its place is the next graph's.
                (best?, made.copy())
            }
            _ => {
                let mut made = None;
                let run = || {
                    made = Some(all());
                    Ok(())
                };
                (best_of(runs, || Ok(()), run)?, made.expect("it has run"))
            }
        };
        Ok((1e6 * seconds / layers as f64, made))
    }

    fn others(&mut self, device: Device) -> Result<Tensor, TorchError> {
        if self.others.is_none() {
            self.others = Some(Tensor::f_zeros([MORE_THAN_CACHES], (Kind::Float, device))?);
        }
        Ok(self.others.as_ref().expect("it was just made").shallow_clone())
    }
}

/// Seconds of the fastest of some runs, what comes before each of them aside.
fn best_of(
    runs: usize,
    mut before: impl FnMut() -> Result<(), TorchError>,
    mut run: impl FnMut() -> Result<(), TorchError>,
) -> Result<f64, TorchError> {
    let mut best = f64::INFINITY;
    for _ in 0..runs {
        before()?;
        let started = Instant::now();
        run()?;
        best = best.min(started.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Chooses the fastest kernels for a model's products on CUDA device `index`: as they were found before, or
/// by trying. Where that fails they are libtorch's.
pub fn tune(index: usize, products: &[Products<'_>]) {
    let started = Instant::now();
    let file = file(index);
    let mut known = file.as_deref().and_then(read).unwrap_or_default();
    let before = known.len();
    if before == 0 {
        tracing::info!("trying kernels for products of few rows, once for this device");
    }
    match choose_fastest(products, &mut known) {
        Ok(tried) => {
            let own = tried.iter().filter(|tried| tried.chosen.is_some()).count();
            let (all, new, seconds) =
                (tried.len(), known.len() - before, started.elapsed().as_secs_f64());
            tracing::info!(all, own, new, seconds, "products of few rows by the fastest kernels");
        }
        Err(error) => tracing::warn!(%error, "products cannot be tuned; they are libtorch's"),
    }
    if let Some(file) = file.filter(|_| known.len() > before) {
        let text = serde_json::to_vec_pretty(&known).expect("numbers by names");
        cache::keep(&file, &text);
    }
}

/// Where the times on a device like this one are remembered, by these kernels.
fn file(index: usize) -> Option<PathBuf> {
    let name = Driver::get().and_then(|driver| driver.name(index)).ok()?;
    let sources = [Element::Bf16, Element::F16]
        .map(|element| Program::Product(element, COLUMNS[0]).device_source());
    cache::file(&format!("{name} {}", sources.concat()), "json")
}

fn read(file: &Path) -> Option<BTreeMap<String, Trial>> {
    serde_json::from_slice(&std::fs::read(file).ok()?).ok()
}

#[cfg(test)]
mod tests;
