//! Operations on a device, one by one, against the same in f64 on the CPU: the engine's, and those of
//! a training pass and the optimizer. On a CUDA device these are kernels of our own; elsewhere
//! libtorch's operations.

use super::{Check, Limit, Place};
use anyhow::ensure;
use onpolicy_engine::{
    cuda::{
        attention as kernel,
        plan::Machine,
        product::{Output, choice},
        sampling as draws,
    },
    device::{
        attention::{Paged, PagedPlan, attend, write_kv},
        sampling, stats, wide,
    },
    kernels::{attention::Span, pages::BLOCK},
    model::rope::{HeadNorms, Rotation, Turn},
    ops::{rms_norm::add_rms_norm, rope::rotate, swiglu::swiglu},
    sampler::{self, Draw, stream_of},
    torch::{
        autograd::{backward, set_grad},
        random,
    },
    weights::Weights,
};
use onpolicy_plugin_api::SamplingParams;
use onpolicy_trainer::optimizer::{Optimizer, OptimizerSettings};
use tch::{Device, Kind, Tensor};

/// Types that are served, and how far a result may be from that in f64: its own rounding, and that
/// of what is rounded on the way.
const KINDS: [(Kind, f64); 3] = [(Kind::BFloat16, 2e-2), (Kind::Half, 2.5e-3), (Kind::Float, 1e-5)];

/// Query heads, KV heads and dimensions of a head.
const HEADS: [[i64; 3]; 4] = [[14, 2, 64], [28, 4, 128], [32, 8, 80], [4, 4, 128]];

/// Sequences: length, and how many of the last positions are queried; the second batch begins with
/// one prompt.
const DECODE: [(usize, usize); 6] = [(1, 1), (300, 1), (16, 1), (65, 1), (1100, 1), (4000, 1)];
const CHUNKS: [(usize, usize); 5] = [(100, 100), (33, 1), (330, 47), (1, 1), (700, 300)];
const GROUP: [(usize, usize); 6] = [(340, 1), (341, 1), (350, 1), (335, 1), (400, 20), (322, 1)];

/// Attention over pages, norm, rotary embedding and gate, the gradients of a training pass and the
/// optimizer, in types as wide as the weights'; draws.
pub fn equal_references(place: &Place) -> Result<Vec<Check>, anyhow::Error> {
    random::seed(1);
    let mut checks = Vec::new();
    let width = place.placement.element_bytes();
    let kinds = KINDS.into_iter().filter(|(kind, _)| kind.elt_size_in_bytes() == width);
    for (kind, most) in kinds {
        let mut worst = [0.0f64; 3];
        for heads in HEADS {
            for window in [None, Some(100)] {
                for (worst, (lengths, shared)) in
                    worst.iter_mut().zip([(&DECODE[..], 0), (&CHUNKS, 0), (&GROUP, 20)])
                {
                    let case = Case::new(kind, heads, lengths, shared);
                    *worst = larger(*worst, case.distance(place, window)?);
                }
            }
        }
        for (what, worst) in ["decode", "chunks", "shared prefix"].iter().zip(worst) {
            let name = format!("kernels: attention over pages, {kind:?}, {what}");
            checks.push(Check::new(name, worst, Limit::Most(most)));
        }
        let mut push = |what: &str, worst: f64, most: f64| {
            let name = format!("kernels: {what}, {kind:?}");
            checks.push(Check::new(name, worst, Limit::Most(most)));
        };
        push("norm, rotation, gate", elementwise(place, kind), most / 2.0);
        if place.placement.device.is_cuda() && kind != Kind::Float {
            push("products of few rows", products(place, kind)?, most / 2.0);
        }
        push("gradients of rotation and gate", gradients(place, kind)?, most);
        // In f32 a sum of 50,001 terms is off by a few 1e-6 of itself, and the scales are up to 4.
        let summed = if kind == Kind::Float { 3e-5 } else { most };
        push("gradients by logits", by_logits(place, kind)?, summed);
        push("three steps of AdamW", optimizer(place, kind)?, most / 2.0);
    }
    checks.extend(drawn(place)?);
    Ok(checks)
}

/// The larger one; no number where one is none.
fn larger(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

/// The largest distance, relative to what is larger: 1 or the number that is wanted.
fn distance(got: &Tensor, want: &Tensor) -> f64 {
    let got = got.to_device(Device::Cpu).to_kind(Kind::Double);
    ((got - want).abs() / want.abs().clamp_min(1.0)).max().double_value(&[])
}

/// The largest distance of any pair.
fn farthest(got: &[Tensor], want: &[Tensor]) -> f64 {
    got.iter().zip(want).map(|(got, want)| distance(got, want)).fold(0.0, larger)
}

fn random(shape: &[i64], kind: Kind) -> Tensor {
    random::normal(shape).to_kind(kind)
}

/// Sequences in the pages of one layer, and rows that are written and attend.
struct Case {
    /// `[blocks, kv_heads, BLOCK, head_dim]`
    pages: [Tensor; 2],
    /// Block table and queried positions of each sequence.
    sequences: Vec<(Vec<u32>, std::ops::Range<usize>)>,
    /// `[rows, heads or kv_heads, head_dim]`, before they are turned.
    qkv: [Tensor; 3],
    /// Cosines and sines, `[rows, head_dim / 2]`, f32.
    angles: [Tensor; 2],
    /// Weights of norms of the heads of q and k.
    norms: [Tensor; 2],
}

impl Case {
    /// Scattered blocks; the first `shared` ones are those of the first sequence.
    fn new(
        kind: Kind,
        [heads, kv_heads, head_dim]: [i64; 3],
        lengths: &[(usize, usize)],
        shared: usize,
    ) -> Self {
        let count: usize = lengths.iter().map(|(len, _)| len.div_ceil(BLOCK)).sum();
        let order = Tensor::randperm(count as i64, (Kind::Int64, Device::Cpu));
        let mut free = Vec::<i64>::try_from(order).expect("one axis").into_iter();
        let mut sequences: Vec<(Vec<u32>, std::ops::Range<usize>)> = Vec::new();
        for &(len, rows) in lengths {
            let mut blocks: Vec<u32> =
                free.by_ref().take(len.div_ceil(BLOCK)).map(|block| block as u32).collect();
            if let Some((first, _)) = sequences.first() {
                blocks[..shared].copy_from_slice(&first[..shared]);
            }
            sequences.push((blocks, len - rows..len));
        }
        let rows = lengths.iter().map(|(_, rows)| *rows as i64).sum();
        let shape = [count as i64, kv_heads, BLOCK as i64, head_dim];
        let turns = random(&[rows, head_dim / 2], Kind::Float);
        Self {
            pages: [0, 1].map(|_| random(&shape, kind)),
            sequences,
            qkv: [heads, kv_heads, kv_heads].map(|heads| random(&[rows, heads, head_dim], kind)),
            angles: [turns.cos(), turns.sin()],
            // As trained ones: scores stay as large as they are without.
            norms: [0, 1].map(|_| random(&[head_dim], kind) / 8.0 + 1.0),
        }
    }

    fn spans(&self) -> Vec<Span<'_>> {
        let mut row = 0;
        let span = |(blocks, positions): &'_ (Vec<u32>, std::ops::Range<usize>)| {
            row += positions.len();
            (row - positions.len()..row, positions.start, blocks.len())
        };
        let places: Vec<_> = self.sequences.iter().map(span).collect();
        let spans = places.into_iter().zip(&self.sequences);
        spans
            .map(|((rows, first_position, _), (blocks, _))| Span { rows, first_position, blocks })
            .collect()
    }

    fn slots(&self) -> Vec<i64> {
        let slot =
            |blocks: &[u32], at: usize| i64::from(blocks[at / BLOCK]) * 16 + (at % 16) as i64;
        let rows = self.sequences.iter();
        rows.flat_map(|(blocks, at)| at.clone().map(move |at| slot(blocks, at))).collect()
    }

    /// Norms, turns, writes and attends on a device, and in f64 on the CPU.
    fn distance(&self, place: &Place, window: Option<usize>) -> Result<f64, anyhow::Error> {
        let device = place.placement.device;
        let want = self.operations(Kind::Double, Device::Cpu, window);
        let got = if device.is_cuda() {
            self.kernels(device, window)?
        } else {
            self.operations(self.qkv[0].kind(), device, window)
        };
        ensure!(got.size() == want.size(), "{got:?} where {want:?} is wanted");
        Ok(distance(&got, &want))
    }

    /// With the case's norms and a rotation, where and of what type a tensor is.
    fn turned<R>(
        &self,
        like: &Tensor,
        rotation: &Rotation,
        with: impl FnOnce(&Turn<'_>) -> R,
    ) -> R {
        let there = |weight: &Tensor| weight.to_device(like.device()).to_kind(like.kind());
        let weights = self.norms.each_ref().map(there);
        let norms = Some(HeadNorms { weights: weights.each_ref(), eps: 1e-6 });
        onpolicy_engine::torch::no_grad(|| with(&Turn { norms, rotation }))
    }

    fn operations(&self, kind: Kind, device: Device, window: Option<usize>) -> Tensor {
        let there = |x: &Tensor| x.to_device(device).to_kind(kind).copy();
        let ([k_pages, v_pages], [q, k, v]) =
            (self.pages.each_ref().map(there), self.qkv.each_ref().map(there));
        let slots = Tensor::from_slice(&self.slots()).to_device(device);
        let plan = &PagedPlan::new(&self.spans(), slots, device);
        let turn = |angles: &Tensor| angles.to_device(device).to_kind(wide(kind));
        let [cos, sin] = self.angles.each_ref().map(turn);
        let [q, k] = self.turned(&q, &Rotation::new(cos, sin), |turn| turn.apply([&q, &k]));
        write_kv(&k, &v, &k_pages, &v_pages, plan);
        let scale = 1.0 / (q.size()[2] as f64).sqrt();
        attend(&Paged { q: &q, k_pages: &k_pages, v_pages: &v_pages, plan, scale, window })
    }

    fn kernels(&self, device: Device, window: Option<usize>) -> Result<Tensor, anyhow::Error> {
        let there = |x: &Tensor| x.to_device(device);
        let ([k_pages, v_pages], [q, k, v]) =
            (self.pages.each_ref().map(there), self.qkv.each_ref().map(there));
        let [heads, kv_heads, head_dim] =
            [q.size()[1], k.size()[1], q.size()[2]].map(|axis| axis as usize);
        let machine = Machine::of(device, heads, kv_heads, head_dim)?;
        let (tokens, slots) = (vec![0; q.size()[0] as usize], self.slots());
        let plan = &kernel::PagedPlan::new(&self.spans(), [&tokens, &slots], machine, device);
        let scale = 1.0 / (head_dim as f64).sqrt();
        let paged = Paged { q: &q, k_pages: &k_pages, v_pages: &v_pages, plan, scale, window };
        let [cos, sin] = self.angles.each_ref().map(there);
        let made = |turn: &Turn<'_>| kernel::turn_and_attend(&paged, [&k, &v], turn);
        Ok(self.turned(&q, &Rotation::new(cos, sin), made)?)
    }
}

/// Rows of x and of W, and the depth: one tile and less, tails, tiles that blocks share.
const PRODUCTS: [[i64; 3]; 5] =
    [[1, 8, 8], [5, 72, 200], [16, 4608, 896], [33, 1184, 3584], [64, 3584, 4864]];

/// Products by every kernel that there is for them: plain with a bias, gated, in f32.
fn products(place: &Place, kind: Kind) -> Result<f64, anyhow::Error> {
    let device = place.placement.device;
    let mut worst = 0.0;
    for [rows, width, depth] in PRODUCTS {
        let x = random(&[rows, depth], kind);
        let weight = random(&[2 * width, depth], Kind::Float) / (depth as f64).sqrt();
        let weight = weight.to_kind(kind);
        let bias = random(&[1, 2 * width], kind).view([2 * width]);
        let [wide_x, wide_weight] = [&x, &weight].map(|part| part.to_kind(Kind::Double));
        let sums = wide_x.matmul(&wide_weight.tr());
        let plain = &sums + bias.to_kind(Kind::Double);
        let halves = plain.chunk(2, 1);
        let gate = halves[0].silu() * &halves[1];
        let [x, weight, bias] = [&x, &weight, &bias].map(|part| part.to_device(device));
        for (output, bias, want) in [
            (Output::Plain, Some(&bias), &plain),
            (Output::Gated, Some(&bias), &gate),
            (Output::Wide, None, &sums),
        ] {
            let Some(case) = choice::Case::of(&x, &weight, output) else { continue };
            for way in choice::ways(device, &case)? {
                let got = choice::product_by((&x, &weight, bias), output, way)?;
                worst = larger(worst, distance(&got, want));
            }
        }
    }
    Ok(worst)
}

/// Norm of a sum, rotation and gate, without gradients.
fn elementwise(place: &Place, kind: Kind) -> f64 {
    let rows = 70;
    let inputs = [
        random(&[rows, 896], kind),
        random(&[rows, 896], kind),
        random(&[896], kind),
        random(&[rows, 14, 64], kind),
        random(&[rows, 4864], kind),
        random(&[rows, 4864], kind),
    ];
    let angles = random(&[rows, 32], Kind::Float);
    let run = |kind: Kind, device: Device| {
        let there = |x: &Tensor| x.to_device(device).to_kind(kind);
        let [x, y, weight, heads, gate, up] = inputs.each_ref().map(there);
        let turn = |x: Tensor| x.to_device(device).to_kind(wide(kind));
        let [cos, sin] = [angles.cos(), angles.sin()].map(turn);
        onpolicy_engine::torch::no_grad(|| {
            // The sum is rounded before its norm is taken.
            let normed = add_rms_norm(&x, &y, &weight, 1e-6).1;
            [normed, rotate(&heads, &cos, &sin), swiglu(&gate, &up)]
        })
    };
    let (got, want) = (run(kind, place.placement.device), run(Kind::Double, Device::Cpu));
    farthest(&got, &want)
}

/// The gradients by what a rotation and a gate are made of.
fn gradients(place: &Place, kind: Kind) -> Result<f64, anyhow::Error> {
    let rows = 70;
    let inputs =
        [random(&[rows, 14, 64], kind), random(&[rows, 4864], kind), random(&[rows, 4864], kind)];
    let (by_heads, by_gate) = (random(&[rows, 14, 64], kind), random(&[rows, 4864], kind));
    let angles = random(&[rows, 32], Kind::Float);
    let run = |kind: Kind, device: Device| -> Result<[Tensor; 3], anyhow::Error> {
        let there = |x: &Tensor| x.to_device(device).to_kind(kind).copy();
        let leaves = inputs.each_ref().map(|x| there(x).set_requires_grad(true));
        let turn = |x: Tensor| x.to_device(device).to_kind(wide(kind));
        let [cos, sin] = [angles.cos(), angles.sin()].map(turn);
        backward(&rotate(&leaves[0], &cos, &sin), &there(&by_heads))?;
        backward(&swiglu(&leaves[1], &leaves[2]), &there(&by_gate))?;
        Ok(leaves.map(|leaf| leaf.grad()))
    };
    let (got, want) = (run(kind, place.placement.device)?, run(Kind::Double, Device::Cpu)?);
    Ok(farthest(&got, &want))
}

/// The gradient of log-probs by logits of a large vocabulary, as numbers of type `kind`.
fn by_logits(place: &Place, kind: Kind) -> Result<f64, anyhow::Error> {
    let (rows, vocab, inv_temperature) = (32i64, 50_001, 1.25);
    let logits = random(&[rows, vocab], Kind::Float) * 3.0;
    let ids = Tensor::arange(rows, (Kind::Int64, Device::Cpu)) * 1500;
    let scales = random(&[rows], Kind::Float);
    let mut want = logits.to_kind(Kind::Double);
    stats::logprob_gradient(&mut want, &ids, &scales.to_kind(Kind::Double), inv_temperature);
    let device = place.placement.device;
    let [logits, ids, scales] = [&logits, &ids, &scales].map(|x| x.to_device(device));
    let got = if device.is_cuda() {
        let looked = draws::stats(&logits, &ids, inv_temperature as f32)?;
        draws::gradient(logits, (&ids, &scales), inv_temperature as f32, &looked.sums, kind)?
    } else {
        let mut made = logits.copy();
        stats::logprob_gradient(&mut made, &ids, &scales, inv_temperature);
        made.to_kind(kind)
    };
    Ok(distance(&got, &want))
}

/// Served weights after three steps of the optimizer.
fn optimizer(place: &Place, kind: Kind) -> Result<f64, anyhow::Error> {
    let shapes = [vec![7i64], vec![300, 128], vec![3, 5]];
    let tensors = shapes.each_ref().map(|shape| random(shape, kind));
    let steps = [0, 1, 2].map(|_| shapes.each_ref().map(|shape| random(shape, Kind::Float)));
    let run = |kind: Kind, device: Device| -> Result<Vec<Tensor>, anyhow::Error> {
        let named = tensors.iter().enumerate().map(|(index, tensor)| {
            (index.to_string(), tensor.to_device(device).to_kind(kind).copy())
        });
        let served = Weights::new(named.collect());
        let weights = served.share_trainable();
        let settings = OptimizerSettings {
            betas: (0.9, 0.95),
            eps: 1e-8,
            weight_decay: 0.1,
            max_grad_norm: 1.0,
        };
        let mut optimizer = Optimizer::new(&weights, settings)?;
        for gradients in &steps {
            for ((_, weight), gradient) in weights.iter().zip(gradients) {
                set_grad(weight, &gradient.to_device(device).to_kind(wide(kind)).copy())?;
            }
            let norm = optimizer.grad_norm()?;
            optimizer.step(0.05, norm)?;
        }
        Ok(served.iter().map(|(_, tensor)| tensor.shallow_clone()).collect())
    };
    let (got, want) = (run(kind, place.placement.device)?, run(Kind::Double, Device::Cpu)?);
    Ok(farthest(&got, &want))
}

/// Draws from logits of a large vocabulary, against those of the sampler on the CPU.
fn drawn(place: &Place) -> Result<Vec<Check>, anyhow::Error> {
    let (rows, vocab) = (64usize, 151_936);
    let logits = random(&[rows as i64, vocab], Kind::Float) * 3.0;
    let params = [0.0, 1.0, 0.6, 1.7]
        .map(|temperature| SamplingParams { temperature, ..SamplingParams::default() });
    let draw = |row: usize| Draw {
        stream: stream_of(5, row),
        position: 3 * row,
        ..Draw::new(row, &params[row % params.len()])
    };
    let draws: Vec<Draw<'_>> = (0..rows).map(draw).collect();
    let plain = Vec::<f32>::try_from(logits.flatten(0, 1))?;
    let want = sampler::sample(&plain, vocab as usize, &draws);
    let got = sampling::sample(&logits.to_device(place.placement.device), &draws);
    let (mut others, mut worst) = (0.0, 0.0f64);
    for (got, want) in got.into_iter().zip(want) {
        let (got, want) = (got.map_err(anyhow::Error::msg)?, want.map_err(anyhow::Error::msg)?);
        if got.id != want.id {
            others += 1.0;
            continue;
        }
        let columns = |s: onpolicy_plugin_api::TokenStats| [s.logprob, s.entropy, s.baseline];
        for (got, want) in columns(got.stats).into_iter().zip(columns(want.stats)) {
            worst = larger(worst, f64::from((got - want).abs() / want.abs().max(1.0)));
        }
    }
    Ok(vec![
        Check::new("kernels: draws of another token than the sampler's", others, Limit::Most(0.0)),
        Check::new("kernels: log-prob, entropy, baseline of draws", worst, Limit::Most(1e-5)),
    ])
}
