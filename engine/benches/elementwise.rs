//! Our norm, gate and rotary embedding against libtorch's operations, in turns, at the sizes of
//! SmolLM2-135M. `cargo bench -p onpolicy-engine --bench elementwise [-- PART]` runs the lines
//! that contain PART. Not criterion, which cannot take turns between two cases.

use std::time::Instant;

use onpolicy_engine::{
    ops::{rms_norm::rms_norm, rope::rotate, swiglu::swiglu},
    torch::{
        autograd::{backward, set_grad},
        memory::keep_freed,
        random::normal,
    },
};
use tch::Tensor;

/// Seconds for one line.
const SECONDS: f64 = 1.5;
/// Sets of inputs, taken in turns: in training more than the caches hold.
const SETS: usize = 8;

type Operation<'a> = &'a dyn Fn(&[Tensor]) -> Tensor;

fn main() {
    let part = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    keep_freed();
    println!("{} threads", tch::get_num_threads());
    println!("microseconds of libtorch, of ours, and how many times as fast");
    for rows in [1, 8, 64, 1000] {
        let race = |name: &str, shapes: &[&[i64]], operations: [Operation<'_>; 2]| {
            let forward = format!("{name} {:?}, forward", shapes[0]);
            if forward.contains(&part) {
                race(&forward, shapes, operations, &|output| drop(output));
            }
            let both = format!("{name} {:?}, forward and backward", shapes[0]);
            if rows >= 1000 && both.contains(&part) {
                let gradient = normal(shapes[0]);
                race(&both, shapes, operations, &|output| backward(&output, &gradient).unwrap());
            }
        };
        for width in [576, 1536] {
            race(
                "rms_norm",
                &[&[rows, width], &[width]],
                [&|x| x[0].rms_norm([width], Some(&x[1]), 1e-5), &|x| rms_norm(&x[0], &x[1], 1e-5)],
            );
        }
        for width in [576, 1536] {
            race(
                "swiglu",
                &[&[rows, width], &[rows, width]],
                [&|x| x[0].silu() * &x[1], &|x| swiglu(&x[0], &x[1])],
            );
        }
        let angles = normal(&[rows, 32]);
        let (cos, sin) = (angles.cos(), angles.sin());
        let twice = |angles: &Tensor| Tensor::cat(&[angles, angles], -1).unsqueeze(1);
        let (both_cos, both_sin) = (twice(&cos), twice(&sin));
        for heads in [3, 9] {
            race(
                "rotate",
                &[&[rows, heads, 64]],
                [
                    &|x| {
                        let halves = x[0].chunk(2, -1);
                        let turned = Tensor::cat(&[&(-&halves[1]), &halves[0]], -1);
                        &x[0] * &both_cos + turned * &both_sin
                    },
                    &|x| rotate(&x[0], &cos, &sin),
                ],
            );
        }
    }
}

/// Runs both in turns, each on outputs that `finish` takes; prints the
/// fastest tenth's slowest (other processes disturb the rest). Records a graph if
/// the name says that there is a backward pass.
fn race(name: &str, shapes: &[&[i64]], operations: [Operation<'_>; 2], finish: &dyn Fn(Tensor)) {
    let sets: Vec<Vec<Tensor>> = (0..SETS)
        .map(|_| shapes.iter().map(|shape| normal(shape).set_requires_grad(true)).collect())
        .collect();
    let run = |operation: Operation<'_>, set: &[Tensor]| {
        // As inside a network: nothing is there yet that the gradients are added to.
        set.iter().for_each(|x| set_grad(x, &Tensor::new()).unwrap());
        let started = Instant::now();
        if name.ends_with("backward") {
            finish(operation(set));
        } else {
            onpolicy_engine::torch::no_grad(|| finish(operation(set)));
        }
        started.elapsed().as_secs_f64() * 1e6
    };
    let mut times = [Vec::new(), Vec::new()];
    let started = Instant::now();
    while started.elapsed().as_secs_f64() < SECONDS {
        for (operation, times) in operations.into_iter().zip(&mut times) {
            sets.iter().for_each(|set| times.push(run(operation, set)));
        }
    }
    let [theirs, ours] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 10]
    });
    println!("{name:50} {theirs:9.1} {ours:9.1}  x{:.2}", theirs / ours);
}
