//! Our matrix products against libtorch's, in turns, at the sizes of SmolLM2-135M's layers.
//! `cargo bench -p onpolicy-engine --bench matmul [-- PART]` runs the lines that contain PART.
//! Not criterion, which cannot take turns between two cases.

use std::time::Instant;

use onpolicy_engine::kernels::matmul::{nn, nt, tn};
use tch::{Device, Kind, Tensor};

/// `[n, k]` of the layers: o and q, k and v, gate and up, down, head.
const LAYERS: [[usize; 2]; 5] = [[576, 576], [192, 576], [1536, 576], [576, 1536], [49_152, 576]];
/// Of larger models.
const LARGER: [[usize; 2]; 4] = [[4864, 896], [896, 4864], [5632, 2048], [2048, 5632]];
/// Numbers that the weights take together: more than the caches hold, as in a decode step.
const COLD: usize = 28 << 20;
/// Seconds and rounds for one line, at least.
const SECONDS: f64 = 1.5;
const ROUNDS: usize = 7;

fn main() {
    let part = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    println!(
        "[m, n, k]: GFLOP/s of libtorch, of ours, and how many times as fast; weights in GB/s"
    );
    for m in [1, 4, 16, 64, 256, 1024, 1700] {
        for [n, k] in LAYERS {
            if m <= 256 || n < 49_152 {
                forward(&part, [m, n, k]);
            }
        }
    }
    for m in [1, 64, 256, 1700] {
        for [n, k] in LARGER {
            forward(&part, [m, n, k]);
        }
    }
    for [n, k] in LAYERS.into_iter().chain(LARGER) {
        let m = if n < 49_152 { 1700 } else { 256 };
        by_input(&part, [m, k, n]);
        by_weight(&part, [n, k, m]);
    }
}

fn floats(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i.wrapping_mul(2_654_435_761) % 2048) as f32 / 1024.0 - 1.0).collect()
}

fn tensor(data: &[f32], [rows, columns]: [usize; 2]) -> Tensor {
    // SAFETY: the tensor is dropped before the data, and neither is written through the other.
    unsafe {
        Tensor::from_blob(
            data.as_ptr().cast(),
            &[rows as i64, columns as i64],
            &[columns as i64, 1],
            Kind::Float,
            Device::Cpu,
        )
    }
}

/// Runs libtorch's and ours in turns; prints medians.
fn race(name: &str, [m, n, k]: [usize; 3], mut work: [&mut dyn FnMut(usize); 2]) {
    let mut times = [Vec::new(), Vec::new()];
    let started = Instant::now();
    let mut round = 0;
    while started.elapsed().as_secs_f64() < SECONDS || round < ROUNDS {
        for (work, times) in work.iter_mut().zip(&mut times) {
            let run = Instant::now();
            work(round);
            times.push(run.elapsed().as_secs_f64());
        }
        round += 1;
    }
    let [theirs, ours] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        2e-9 * (m * n * k) as f64 / times[times.len() / 2]
    });
    print!("{name:9} {:16} {theirs:6.1} {ours:6.1}  x{:.2}", format!("{m} {n} {k}"), ours / theirs);
    if name == "forward" {
        print!("  {:.1} GB/s", ours * 2.0 / m as f64);
    }
    println!();
}

fn wanted(part: &str, name: &str, shape: [usize; 3]) -> bool {
    format!("{name} {} {} {}", shape[0], shape[1], shape[2]).contains(part)
}

fn forward(part: &str, [m, n, k]: [usize; 3]) {
    if !wanted(part, "forward", [m, n, k]) {
        return;
    }
    let copies = COLD.div_ceil(n * k).max(2);
    let weights = floats(copies * n * k);
    let weights: Vec<&[f32]> = weights.chunks_exact(n * k).collect();
    let tensors: Vec<Tensor> = weights.iter().map(|w| tensor(w, [n, k]).tr()).collect();
    let x = floats(m * k);
    let x_tensor = tensor(&x, [m, k]);
    let (mut c, out) = outputs(m, n);
    let mut theirs = |round| {
        let _ = x_tensor.f_matmul_out(&out, &tensors[round % copies]).expect("the shapes fit");
    };
    // Half a turn ahead, where libtorch has not read yet.
    let mut ours = |round| nt(&x, weights[(round + copies / 2) % copies], None, &mut c, [m, n, k]);
    race("forward", [m, n, k], [&mut theirs, &mut ours]);
}

fn by_input(part: &str, [m, n, k]: [usize; 3]) {
    if !wanted(part, "by_input", [m, n, k]) {
        return;
    }
    let (dy, w) = (floats(m * k), floats(k * n));
    let (dy_tensor, w_tensor) = (tensor(&dy, [m, k]), tensor(&w, [k, n]));
    let (mut c, out) = outputs(m, n);
    let mut theirs = |_| {
        let _ = dy_tensor.f_matmul_out(&out, &w_tensor).expect("the shapes fit");
    };
    let mut ours = |_| nn(&dy, &w, &mut c, [m, n, k]);
    race("by_input", [m, n, k], [&mut theirs, &mut ours]);
}

fn by_weight(part: &str, [m, n, k]: [usize; 3]) {
    if !wanted(part, "by_weight", [m, n, k]) {
        return;
    }
    let (dy, x) = (floats(k * m), floats(k * n));
    let (dy_tensor, x_tensor) = (tensor(&dy, [k, m]).tr(), tensor(&x, [k, n]));
    let (mut c, mut out) = outputs(m, n);
    let mut theirs = |_| {
        let _ = out.addmm_(&dy_tensor, &x_tensor);
    };
    let mut ours = |_| tn(&dy, &x, true, &mut c, [m, n, k]);
    race("by_weight", [m, n, k], [&mut theirs, &mut ours]);
}

/// Where our results go, and where libtorch's do.
fn outputs(m: usize, n: usize) -> (Vec<f32>, Tensor) {
    (vec![0.0; m * n], Tensor::zeros([m as i64, n as i64], (Kind::Float, Device::Cpu)))
}
