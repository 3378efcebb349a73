//! Comparing an operation with libtorch's own.

use crate::torch::{autograd::backward, random::normal};
use tch::{Kind, Tensor};

type Operation<'a> = &'a dyn Fn(&[Tensor]) -> Tensor;

/// Asserts that two operations agree on values and gradients, twice with the gradients added up,
/// and that ours makes no graph where none is recorded.
pub(super) fn check(inputs: &[Tensor], ours: Operation<'_>, theirs: Operation<'_>) {
    let leaves = || -> Vec<Tensor> {
        inputs.iter().map(|x| x.detach().copy().set_requires_grad(true)).collect()
    };
    let (our_leaves, their_leaves) = (leaves(), leaves());
    let gradient = normal(&ours(inputs).size());
    for _ in 0..2 {
        let (got, want) = (ours(&our_leaves), theirs(&their_leaves));
        assert_same(&got, &want, "output");
        backward(&got, &gradient).unwrap();
        backward(&want, &gradient).unwrap();
    }
    for (got, want) in our_leaves.iter().zip(&their_leaves) {
        assert_same(&got.grad(), &want.grad(), "gradient");
    }
    let plain = crate::torch::no_grad(|| ours(&our_leaves));
    assert!(!plain.requires_grad() && plain.equal(&ours(&our_leaves)));
}

/// Asserts that an operation's kernels, in f32, and its libtorch path, in f64, agree on values and
/// gradients, twice with the gradients added up.
pub(super) fn check_wide(inputs: &[Tensor], operation: Operation<'_>) {
    let leaves = |kind: Kind| -> Vec<Tensor> {
        inputs.iter().map(|x| x.to_kind(kind).copy().set_requires_grad(true)).collect()
    };
    let (native, wide) = (leaves(Kind::Float), leaves(Kind::Double));
    let gradient = normal(&operation(inputs).size());
    for _ in 0..2 {
        let (got, want) = (operation(&wide), operation(&native));
        assert_eq!(got.kind(), Kind::Double);
        assert_same(&got, &want, "output");
        backward(&got, &gradient.to_kind(Kind::Double)).unwrap();
        backward(&want, &gradient).unwrap();
    }
    for (got, want) in wide.iter().zip(&native) {
        assert_same(&got.grad(), &want.grad(), "gradient");
    }
}

fn assert_same(got: &Tensor, want: &Tensor, what: &str) {
    assert_eq!(got.size(), want.size(), "{what}");
    let error = (got - want).abs().max().double_value(&[]);
    let size = want.abs().max().double_value(&[]);
    assert!(error <= 1e-5 * size, "{what} {:?}: off by {error:e} of {size:e}", got.size());
}
