//! Root-mean-square norm over the last axis.

use super::{may_record, on_cuda};
use crate::{
    cuda::elementwise as cuda,
    device::is_native,
    kernels::elementwise::norm::{RmsNorm as Kernel, add_norm},
    torch::{
        function::{Function, apply},
        slices::{floats, floats_mut},
    },
};
use tch::Tensor;

/// `x / sqrt(mean(x^2) + eps) * weight`, the mean over the last axis: `x` `[.., H]`, `weight`
/// `[H]`; the shape of `x`. A row's result does not depend on the other rows.
///
/// # Panics
/// If a shape does not fit, or the tensors differ in device or type.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    assert_eq!(x.size().last(), Some(&(weight.numel() as i64)), "rows as long as the weight");
    if !is_native(x) {
        let made = on_cuda(&[x, weight], || cuda::rms_norm(x, weight, eps));
        return made.unwrap_or_else(|| x.rms_norm(weight.size(), Some(weight), eps));
    }
    let (norm, x, weight) = (RmsNorm { eps }, x.contiguous(), weight.contiguous());
    if !may_record(&[&x, &weight]) {
        return norm.forward(&[x, weight]);
    }
    apply(norm, &[&x, &weight]).unwrap_or_else(|error| panic!("rms_norm: {error}"))
}

/// `x + y`, and [`rms_norm`] of it: the residual stream and what goes on from it, in one pass where
/// there is no graph.
///
/// # Panics
/// As [`rms_norm`]; or if `y` has another shape than `x`.
pub fn add_rms_norm(x: &Tensor, y: &Tensor, weight: &Tensor, eps: f64) -> (Tensor, Tensor) {
    assert_eq!(x.size(), y.size(), "a sum of equal shapes");
    if let Some(made) = on_cuda(&[x, y, weight], || cuda::add_rms_norm(x, y, weight, eps)) {
        return made;
    }
    if !is_native(x) || may_record(&[x, y, weight]) {
        let sum = x + y;
        let normed = rms_norm(&sum, weight, eps);
        return (sum, normed);
    }
    let (x, y, weight) = (x.contiguous(), y.contiguous(), weight.contiguous());
    let (mut sum, mut normed) = (x.empty_like(), x.empty_like());
    let terms = [floats(&x), floats(&y)];
    add_norm(terms, (floats(&weight), eps), [floats_mut(&mut sum), floats_mut(&mut normed)]);
    (sum, normed)
}

struct RmsNorm {
    eps: f64,
}

impl RmsNorm {
    fn kernel<'a>(&self, inputs: &'a [Tensor]) -> Kernel<'a> {
        Kernel { x: floats(&inputs[0]), weight: floats(&inputs[1]), eps: self.eps }
    }
}

impl Function for RmsNorm {
    fn forward(&self, inputs: &[Tensor]) -> Tensor {
        let mut y = inputs[0].empty_like();
        self.kernel(inputs).forward(floats_mut(&mut y));
        y
    }

    fn backward(&self, inputs: &[Tensor], gradient: &Tensor) -> Vec<Option<Tensor>> {
        let gradient = gradient.contiguous();
        let (mut by_x, mut by_weight) = (inputs[0].empty_like(), inputs[1].empty_like());
        let (x_slice, weight_slice) = (floats_mut(&mut by_x), floats_mut(&mut by_weight));
        self.kernel(inputs).backward(floats(&gradient), x_slice, weight_slice);
        vec![Some(by_x), Some(by_weight)]
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check, check_wide};
    use super::*;
    use crate::torch::random::{normal, seed};

    #[test]
    fn values_and_gradients_are_those_of_libtorch() {
        seed(1);
        for width in (1..=70).chain([576, 1536]) {
            // A short row has next to no gradient but through eps.
            let eps = if width < 8 { 0.5 } else { 1e-5 };
            for shape in [vec![1, width], vec![37, width], vec![5, 3, width]] {
                check(
                    &[normal(&shape), normal(&[width])],
                    &|inputs| rms_norm(&inputs[0], &inputs[1], eps),
                    &|inputs| inputs[0].rms_norm([width], Some(&inputs[1]), eps),
                );
            }
        }
    }

    #[test]
    fn the_libtorch_path_gives_the_same() {
        seed(4);
        for shape in [vec![1, 33], vec![37, 576], vec![5, 3, 16]] {
            let width = *shape.last().unwrap();
            let inputs = [normal(&shape), normal(&[width]), normal(&shape)];
            check_wide(&inputs[..2], &|inputs| rms_norm(&inputs[0], &inputs[1], 1e-5));
            check_wide(&inputs, &|inputs| {
                let (sum, normed) = add_rms_norm(&inputs[0], &inputs[2], &inputs[1], 1e-5);
                sum * 0.5 + normed
            });
        }
        // Squares beyond the range of f16 are no matter.
        let [x, weight] = [normal(&[4, 32]) * 3000.0, normal(&[32])];
        let [x, weight] = [x, weight].map(|t| t.to_kind(tch::Kind::Half));
        let got = rms_norm(&x, &weight, 1e-5).to_kind(tch::Kind::Float);
        let [x, weight] = [x, weight].map(|t| t.to_kind(tch::Kind::Float));
        let error = (got - rms_norm(&x, &weight, 1e-5)).abs().max().double_value(&[]);
        assert!(error < 0.01, "{error}");
    }

    #[test]
    fn a_sum_and_its_norm_are_the_same_in_one_pass() {
        seed(3);
        for shape in [[1, 576], [64, 70], [300, 576]] {
            let [x, y] = [normal(&shape), normal(&shape)];
            let weight = normal(&shape[1..]);
            let (sum, normed) = crate::torch::no_grad(|| add_rms_norm(&x, &y, &weight, 1e-5));
            assert!(sum.equal(&(&x + &y)) && normed.equal(&rms_norm(&sum, &weight, 1e-5)));
            let x = x.set_requires_grad(true);
            let (recorded, normed_too) = add_rms_norm(&x, &y, &weight, 1e-5);
            assert!(recorded.requires_grad() && normed_too.requires_grad());
            assert!(recorded.equal(&sum) && normed_too.equal(&normed));
        }
    }

    #[test]
    fn a_transposed_input_and_many_rows() {
        seed(2);
        check(
            &[normal(&[576, 300]), normal(&[576])],
            &|inputs| rms_norm(&inputs[0].tr(), &inputs[1], 1e-6),
            &|inputs| inputs[0].tr().rms_norm([576], Some(&inputs[1]), 1e-6),
        );
    }
}
