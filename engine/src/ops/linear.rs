//! `y = x W^T + b` with matrix products of our own, read from the weight where the optimizer
//! writes it. Tensors that are not native take libtorch's.

use super::{made, may_record};
use crate::{
    cuda::{
        are_set_aside,
        product::{Output, choice},
    },
    device::{is_native, wide},
    kernels::matmul::{self, Layer, narrow::Narrow},
    torch::{
        autograd::set_grad,
        function::{Function, apply},
        slices::{floats, floats_mut},
    },
};
use tch::{Device, Kind, Tensor};

/// `x W^T + b`: `x` `[M, K]`, `weight` `[N, K]`, `bias` `[N]`; `[M, N]`. The gradient by the weight
/// is added to its `grad` during the backward pass, not afterwards.
///
/// # Panics
/// If a shape does not fit, or the tensors differ in device or type.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    if !is_native(weight) {
        return chosen((x, weight, bias), Output::Plain).unwrap_or_else(|| x.linear(weight, bias));
    }
    let x = x.contiguous();
    if !may_record(&[&x, weight]) {
        return forward(&x, weight, bias);
    }
    let inputs: Vec<&Tensor> = [&x, weight].into_iter().chain(bias).collect();
    apply(Linear, &inputs).unwrap_or_else(|error| panic!("linear: {error}"))
}

/// What the kernel that was chosen for such a product makes; none where libtorch is to make it, or there
/// is a graph.
pub(super) fn chosen(
    (x, weight, bias): (&Tensor, &Tensor, Option<&Tensor>),
    output: Output,
) -> Option<Tensor> {
    if may_record(&[x, weight]) || bias.is_some_and(|bias| may_record(&[bias])) {
        return None;
    }
    let way = choice::chosen(x, weight, output).filter(|_| !are_set_aside())?;
    made(choice::product_by((&x.contiguous(), weight, bias), output, way))
}

/// [`linear`] with the same `x` for several weights and biases. Without a graph it is one go over
/// all threads; the results are the same, bit for bit.
///
/// # Panics
/// As [`linear`].
pub fn linear_each<const N: usize>(
    x: &Tensor,
    layers: [(&Tensor, Option<&Tensor>); N],
) -> [Tensor; N] {
    if layers.iter().any(|(weight, _)| !is_native(weight)) {
        return layers.map(|(weight, bias)| linear(x, weight, bias));
    }
    let x = x.contiguous();
    if layers.iter().any(|(weight, _)| may_record(&[&x, weight])) {
        return layers.map(|(weight, bias)| linear(&x, weight, bias));
    }
    let mut outputs = layers.map(|(weight, _)| output(shape(&x, weight)));
    let each = layers.into_iter().zip(&mut outputs).map(|((weight, bias), output)| Layer {
        weight: floats(weight),
        bias: bias.map(floats),
        output: floats_mut(output),
    });
    let (m, k) = x.size2().expect("an input has two axes");
    matmul::nt_each(floats(&x), &mut each.collect::<Vec<_>>(), [m as usize, k as usize]);
    outputs
}

/// Rows of a head that are widened at a time.
const WIDENED: i64 = 8192;

/// `hidden W^T` of the output head, summed and kept in f32 (f64 for f64): `hidden` `[M, K]`,
/// `weight` `[N, K]`; `[M, N]`. Only native tensors have a gradient.
///
/// # Panics
/// As [`linear`].
pub fn logits(hidden: &Tensor, weight: &Tensor) -> Tensor {
    let kind = weight.kind();
    if is_native(weight) || wide(kind) == kind {
        return linear(hidden, weight, None);
    }
    crate::torch::no_grad(|| {
        if let Some(logits) = chosen((hidden, weight, None), Output::Wide) {
            return logits;
        }
        if weight.device().is_cuda() {
            return hidden.mm_dtype(&weight.tr(), Kind::Float);
        }
        // There is no such product on the CPU.
        let hidden = hidden.to_kind(Kind::Float);
        let tiles = weight.split(WIDENED, 0);
        let tiles = tiles.iter().map(|tile| hidden.matmul(&tile.to_kind(Kind::Float).tr()));
        Tensor::cat(&tiles.collect::<Vec<_>>(), 1)
    })
}

/// `x W^T + b` with a weight in a narrow type, as [`linear`] otherwise, but without a gradient.
///
/// # Panics
/// If a shape does not fit, `x` or `bias` is not f32 on the CPU, or `x` requires a gradient.
pub fn narrow_linear(x: &Tensor, weight: &Narrow, bias: Option<&Tensor>) -> Tensor {
    assert!(!may_record(&[x]), "a narrow weight has no gradient");
    let x = x.contiguous();
    let rows = x.size2().expect("an input has two axes").0;
    let mut y = Tensor::empty([rows, weight.shape()[0] as i64], (Kind::Float, Device::Cpu));
    weight.multiply(floats(&x), bias.map(floats), floats_mut(&mut y));
    y
}

/// Adds `gradient^T x` (`gradient` `[M, N]`, `x` `[M, K]`) to the `grad` of the leaf `weight`, in the
/// type of the weight.
///
/// # Panics
/// As [`linear`].
pub fn accumulate_weight_gradient(weight: &Tensor, gradient: &Tensor, x: &Tensor) {
    if !is_native(weight) {
        return add_gradient(weight, gradient, x);
    }
    let [m, n, k] = shape(x, weight);
    let mut sum = weight.grad();
    let accumulate = sum.defined();
    if !accumulate {
        sum = Tensor::empty(weight.size(), (Kind::Float, Device::Cpu));
    }
    matmul::tn(floats(gradient), floats(x), accumulate, floats_mut(&mut sum), [n, k, m]);
    if !accumulate {
        set_grad(weight, &sum).unwrap_or_else(|error| panic!("a weight's gradient: {error}"));
    }
}

fn add_gradient(weight: &Tensor, gradient: &Tensor, x: &Tensor) {
    let kind = weight.kind();
    let added = crate::torch::no_grad(|| gradient.to_kind(kind).tr().matmul(&x.to_kind(kind)));
    let mut sum = weight.grad();
    if sum.defined() {
        let _ = crate::torch::no_grad(|| sum.g_add_(&added));
    } else {
        set_grad(weight, &added).unwrap_or_else(|error| panic!("a weight's gradient: {error}"));
    }
}

/// `gradient W`, the gradient by `x`, `[M, K]`, in the type of the weight.
///
/// # Panics
/// As [`linear`].
pub fn input_gradient(gradient: &Tensor, weight: &Tensor) -> Tensor {
    if !is_native(weight) {
        return crate::torch::no_grad(|| gradient.to_kind(weight.kind()).matmul(weight));
    }
    let (n, k) = weight.size2().expect("a weight has two axes");
    let m = gradient.size()[0];
    let mut by_x = Tensor::empty([m, k], (Kind::Float, Device::Cpu));
    let shape = [m as usize, k as usize, n as usize];
    matmul::nn(floats(gradient), floats(weight), floats_mut(&mut by_x), shape);
    by_x
}

fn shape(x: &Tensor, weight: &Tensor) -> [usize; 3] {
    let (m, k) = x.size2().expect("an input has two axes");
    let (n, inner) = weight.size2().expect("a weight has two axes");
    assert_eq!(k, inner, "the input's rows fit the weight");
    [m, n, k].map(|axis| axis as usize)
}

fn forward(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let [m, n, k] = shape(x, weight);
    let mut y = output([m, n, k]);
    matmul::nt(floats(x), floats(weight), bias.map(floats), floats_mut(&mut y), [m, n, k]);
    y
}

/// Room for the results of a product of this shape.
fn output([m, n, _]: [usize; 3]) -> Tensor {
    Tensor::empty([m as i64, n as i64], (Kind::Float, Device::Cpu))
}

struct Linear;

impl Function for Linear {
    fn forward(&self, inputs: &[Tensor]) -> Tensor {
        forward(&inputs[0], &inputs[1], inputs.get(2))
    }

    fn backward(&self, inputs: &[Tensor], gradient: &Tensor) -> Vec<Option<Tensor>> {
        let (x, weight, gradient) = (&inputs[0], &inputs[1], gradient.contiguous());
        if weight.requires_grad() {
            accumulate_weight_gradient(weight, &gradient, x);
        }
        let by_x = x.requires_grad().then(|| input_gradient(&gradient, weight));
        let by_bias = inputs.get(2).map(|bias| {
            bias.requires_grad()
                .then(|| gradient.sum_dim_intlist([0i64].as_slice(), false, Kind::Float))
        });
        [by_x, None].into_iter().chain(by_bias).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;
    use crate::torch::random::{normal, seed};

    #[test]
    fn the_libtorch_path_gives_the_same() {
        seed(4);
        for (m, n, k) in [(1, 3, 5), (70, 48, 112)] {
            let inputs = [normal(&[m, k]), normal(&[n, k]), normal(&[n])];
            testing::check_wide(&inputs, &|t| linear(&t[0], &t[1], Some(&t[2])));
            testing::check_wide(&inputs[..2], &|t| linear(&t[0], &t[1], None));
            testing::check_wide(&inputs, &|t| {
                let [y, z] = linear_each(&t[0], [(&t[1], Some(&t[2])), (&t[1], None)]);
                y * 2.0 + z
            });
        }
    }

    #[test]
    fn gradients_are_added_in_the_type_of_the_weight() {
        seed(5);
        let (weight, x, gradient) = (normal(&[7, 5]), normal(&[9, 5]), normal(&[9, 7]));
        for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::BFloat16, 0.05)] {
            let leaf = weight.to_kind(kind).set_requires_grad(true);
            for _ in 0..2 {
                accumulate_weight_gradient(&leaf, &gradient, &x.to_kind(kind));
            }
            let (want, by_x) = (gradient.tr().matmul(&x) * 2.0, gradient.matmul(&weight));
            let got = input_gradient(&gradient, &leaf.detach());
            for (got, want) in [(leaf.grad(), want), (got, by_x)] {
                assert_eq!(got.kind(), kind);
                let want = want.to_kind(Kind::Double);
                let error = (got - &want).abs().max().double_value(&[]);
                let size = want.abs().max().double_value(&[]);
                // The wanted values were summed in f32.
                assert!(error <= size * f64::max(tolerance, 1e-6), "{kind:?}: {error:e}");
            }
        }
    }

    #[test]
    fn logits_of_a_narrow_head_are_wide() {
        seed(6);
        let (hidden, weight) = (normal(&[3, 16]), normal(&[WIDENED + 5, 16]));
        let [hidden, weight] = [hidden, weight].map(|t| t.to_kind(Kind::BFloat16));
        let got = logits(&hidden, &weight);
        let [hidden, weight] = [hidden, weight].map(|t| t.to_kind(Kind::Double));
        assert_eq!(got.kind(), Kind::Float);
        assert_same(&got.to_kind(Kind::Double), &hidden.matmul(&weight.tr()), "logits");
        let wide = logits(&hidden, &weight);
        assert_eq!(wide.kind(), Kind::Double);
    }

    fn assert_same(got: &Tensor, want: &Tensor, what: &str) {
        let error = (got - want).abs().max().double_value(&[]);
        let size = want.abs().max().double_value(&[]);
        assert!(error <= 1e-5 * size, "{what}: off by {error:e} of {size:e}");
    }

    #[test]
    fn values_and_gradients_are_those_of_libtorch() {
        seed(1);
        for (m, n, k) in [(1, 3, 5), (7, 33, 20), (70, 48, 112), (130, 65, 31)] {
            let leaf = |t: &Tensor| t.copy().detach().set_requires_grad(true);
            let (x, w, b) = (normal(&[m, k]), normal(&[n, k]), normal(&[1, n]).squeeze());
            let ours = [leaf(&x), leaf(&w), leaf(&b.view([n]))];
            let theirs = [leaf(&x), leaf(&w), leaf(&b.view([n]))];
            let gradient = normal(&[m, n]);
            // Twice, so that the second backward pass adds to what the first left.
            for _ in 0..2 {
                let y = linear(&ours[0], &ours[1], Some(&ours[2]));
                let z = theirs[0].linear(&theirs[1], Some(&theirs[2]));
                assert_same(&y, &z, "output");
                crate::torch::autograd::backward(&y, &gradient).unwrap();
                crate::torch::autograd::backward(&z, &gradient).unwrap();
            }
            for (ours, theirs) in ours.iter().zip(&theirs) {
                assert_same(&ours.grad(), &theirs.grad(), "gradient");
            }
            let plain = crate::torch::no_grad(|| linear(&x, &w, None));
            assert_same(&plain, &x.linear(&w, None::<&Tensor>), "output without a graph");
            assert!(!plain.requires_grad());
            for [y, z] in [
                crate::torch::no_grad(|| linear_each(&x, [(&w, None), (&w, Some(&b.view([n])))])),
                linear_each(&ours[0], [(&ours[1], None), (&ours[1], Some(&ours[2]))]),
            ] {
                assert!(y.equal(&plain) && z.equal(&linear(&x, &w, Some(&b.view([n])))));
            }
        }
    }
}
