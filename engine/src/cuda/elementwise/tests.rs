//! The kernels, on the CPU harness, against the same in f64.

use super::*;
use crate::{
    cuda::harness::{race, unchanged},
    torch::{autograd::backward, random},
};
use tch::Device;

const KINDS: [(Kind, f64); 3] =
    [(Kind::Float, 2e-6), (Kind::BFloat16, 1.0 / 256.0), (Kind::Half, 1.0 / 2048.0)];

fn random(shape: &[i64], kind: Kind) -> Tensor {
    random::normal(shape).to_kind(kind)
}

/// Largest error, relative to what is larger: 1 or the number that is wanted.
fn error(got: &Tensor, want: &Tensor) -> f64 {
    let want = want.to_kind(Kind::Double);
    let errors = (got.to_kind(Kind::Double) - &want).abs() / want.abs().clamp_min(1.0);
    errors.max().double_value(&[])
}

fn naive_norm(x: &Tensor, weight: &Tensor) -> Tensor {
    let x = x.to_kind(Kind::Double);
    let mean = (&x * &x).mean_dim(-1, true, Kind::Double);
    &x / (mean + 1e-5).sqrt() * weight.to_kind(Kind::Double)
}

#[test]
fn norms() {
    random::seed(1);
    for (kind, allowed) in KINDS {
        for shape in [vec![3, 8], vec![5, 896], vec![2, 3, 4096], vec![2, 10_240]] {
            let (x, y) = (random(&shape, kind), random(&shape, kind));
            let weight = random(&shape[shape.len() - 1..], kind);
            let got = rms_norm(&x, &weight, 1e-5).unwrap();
            assert!(error(&got, &naive_norm(&x, &weight)) < allowed, "{kind:?} {shape:?}");
            let (sum, got) = add_rms_norm(&x, &y, &weight, 1e-5).unwrap();
            assert!(sum.equal(&(&x + &y)), "{kind:?} {shape:?}");
            assert!(error(&got, &naive_norm(&sum, &weight)) < allowed, "{kind:?} {shape:?}");
        }
    }
}

#[test]
fn rotations() {
    random::seed(2);
    for (kind, allowed) in KINDS {
        let wide = random(&[7, 400], kind);
        let x = wide.narrow(1, 8, 240).view([7, 3, 80]);
        let angles = random(&[7, 40], Kind::Float) * 3.0;
        let (cos, sin) = (angles.cos(), angles.sin());
        let got = rotate(&x, &cos, &sin).unwrap();
        let halves = x.to_kind(Kind::Double).chunk(2, -1);
        let (cos, sin) = (cos.unsqueeze(1), sin.unsqueeze(1));
        let want = Tensor::cat(
            &[&halves[0] * &cos - &halves[1] * &sin, &halves[1] * &cos + &halves[0] * &sin],
            -1,
        );
        assert!(error(&got, &want) < allowed, "{kind:?}");
    }
}

#[test]
fn rotations_into_pages() {
    random::seed(4);
    // Of 9 and of 144 lines of a row: one block and two.
    for (heads, dim) in [(5, 16), (14, 128)] {
        for (kind, _) in KINDS {
            // q, k and v as parts of one product.
            let wide = random(&[4, (heads + 4) * dim], kind);
            let part = |from: i64, heads: i64| {
                wide.narrow(1, dim * from, dim * heads).view([4, heads, dim])
            };
            let (q, k, v) = (part(0, heads), part(heads, 2), part(heads + 2, 2));
            let angles = random(&[4, dim / 2], Kind::Float) * 3.0;
            let (cos, sin) = (angles.cos(), angles.sin());
            let slots = Tensor::from_slice(&[5i64, -1, 47, 16]);
            let pages = || random(&[3, 2, 16, dim], kind);
            let (keys, values) = (pages(), pages());
            let want = (keys.copy(), values.copy());
            let turned = rotate(&k, &cos, &sin).unwrap();
            crate::cuda::pages::write_kv((&turned, &v), (&want.0, &want.1), &slots).unwrap();
            let angles = [&cos, &sin];
            let got = rotate_write([&q, &k, &v], angles, (&keys, &values), &slots).unwrap();
            assert!(got.equal(&rotate(&q, &cos, &sin).unwrap()), "{kind:?} {dim}");
            assert!(keys.equal(&want.0) && values.equal(&want.1), "{kind:?} {dim}");
        }
    }
}

#[test]
fn gates() {
    random::seed(3);
    for (kind, allowed) in KINDS {
        let wide = random(&[9, 2 * 1000], kind) * 4.0;
        let (gate, up) = (wide.narrow(1, 0, 1000), wide.narrow(1, 1000, 1000));
        let got = swiglu(&gate, &up).unwrap();
        let leaf = |x: &Tensor| x.to_kind(Kind::Double).copy().set_requires_grad(true);
        let leaves = [leaf(&gate), leaf(&up)];
        let want = leaves[0].silu() * &leaves[1];
        assert!(error(&got, &want.detach()) < allowed, "{kind:?}");
        let gradient = random(&[9, 1000], kind);
        backward(&want, &gradient.to_kind(Kind::Double)).unwrap();
        let [gate, up] = [gate.contiguous(), up.contiguous()];
        let got = swiglu_gradient([&gate, &up, &gradient]).unwrap();
        for (got, leaf) in got.iter().zip(&leaves) {
            assert!(error(got, &leaf.grad()) < allowed, "{kind:?}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let refused = [
        rms_norm(&zeros(&[2, 12]), &zeros(&[12]), 1e-5),
        rms_norm(&zeros(&[2, 16]), &zeros(&[8]), 1e-5),
        rotate(&zeros(&[2, 1, 8]), &zeros(&[2, 8]), &zeros(&[2, 8])),
        swiglu(&zeros(&[2, 8]), &zeros(&[2, 16])),
        swiglu(&zeros(&[2, 8]).to_kind(Kind::Int64), &zeros(&[2, 8])),
        rotate_write(
            [&zeros(&[2, 1, 24]); 3],
            [&zeros(&[2, 12]); 2],
            (&zeros(&[3, 1, 16, 24]), &zeros(&[3, 1, 16, 24])),
            &Tensor::from_slice(&[0i64, 1]),
        ),
    ];
    assert!(refused.iter().all(|result| matches!(result, Err(CudaError::Unsupported(_)))));
}

/// Whatever a thread reads or writes is ordered after what others do with it.
#[test]
fn nothing_races() {
    random::seed(6);
    let kind = Kind::BFloat16;
    let [x, y] = [0, 1].map(|_| random(&[3, 600], kind));
    let weight = random(&[600], kind);
    let norm = || add_rms_norm(&x, &y, &weight, 1e-6).unwrap();
    let gates = || (swiglu(&x, &y).unwrap(), swiglu_gradient([&x, &y, &x]).unwrap());
    assert_eq!(race(&[&x, &y], unchanged, norm), None);
    assert_eq!(race(&[&x, &y], unchanged, gates), None);
    let without = race(&[&x, &y], |source| source.replace("__syncthreads();", ""), norm);
    assert!(without.is_some(), "without a barrier");

    let [q, k, v] = [4, 2, 2].map(|heads| random(&[3, heads, 64], kind));
    let [cos, sin] = [0, 1].map(|_| random(&[3, 32], Kind::Float));
    let [keys, values] = [0, 1].map(|_| random(&[3, 2, 16, 64], kind));
    let slots = Tensor::from_slice(&[5i64, -1, 47]);
    let (angles, pages) = ([&cos, &sin], (&keys, &values));
    let rotation = || rotate_write([&q, &k, &v], angles, pages, &slots).unwrap();
    assert_eq!(race(&[&q, &k, &v, &cos, &sin], unchanged, rotation), None);
}
