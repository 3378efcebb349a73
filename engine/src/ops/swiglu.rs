//! The gate of the MLP.

use super::{
    linear::{chosen, linear},
    may_record, on_cuda,
};
use crate::{
    cuda::{elementwise as cuda, product::Output, takes},
    device::is_native,
    kernels::elementwise::gate::SwiGlu as Kernel,
    torch::{
        function::{Function, apply},
        slices::{floats, floats_mut},
    },
};
use tch::Tensor;

/// `silu(gate) * up`, element by element: both of one shape, which is the result's.
///
/// # Panics
/// If the shapes differ, or the tensors differ in device or type.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Tensor {
    assert_eq!(gate.size(), up.size(), "gate and up of one shape");
    if !is_native(gate) {
        if let Some(made) = on_cuda(&[gate, up], || cuda::swiglu(gate, up)) {
            return made;
        }
        if !takes(gate.device()) || !cuda::has_gates(gate) {
            return gate.silu() * up;
        }
    }
    let (gate, up) = (gate.contiguous(), up.contiguous());
    if !may_record(&[&gate, &up]) {
        return SwiGlu.forward(&[gate, up]);
    }
    apply(SwiGlu, &[&gate, &up]).unwrap_or_else(|error| panic!("swiglu: {error}"))
}

/// [`swiglu`] of the halves of `x W^T + b`: `x` `[M, K]`, `weight` `[2 N, K]`, `bias` `[2 N]`; `[M, N]`.
///
/// # Panics
/// As [`linear`] and [`swiglu`].
pub fn gated(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    chosen((x, weight, bias), Output::Gated).unwrap_or_else(|| {
        let both = linear(x, weight, bias);
        let half = both.size()[1] / 2;
        swiglu(&both.narrow(1, 0, half), &both.narrow(1, half, half))
    })
}

struct SwiGlu;

fn kernel(inputs: &[Tensor]) -> Kernel<'_> {
    Kernel { gate: floats(&inputs[0]), up: floats(&inputs[1]) }
}

impl Function for SwiGlu {
    fn forward(&self, inputs: &[Tensor]) -> Tensor {
        if !is_native(&inputs[0]) {
            let made = cuda::swiglu(&inputs[0], &inputs[1]);
            return made.unwrap_or_else(|error| panic!("{error}"));
        }
        let mut y = inputs[0].empty_like();
        kernel(inputs).forward(floats_mut(&mut y));
        y
    }

    fn backward(&self, inputs: &[Tensor], gradient: &Tensor) -> Vec<Option<Tensor>> {
        let gradient = gradient.contiguous();
        if !is_native(&gradient) {
            let made = cuda::swiglu_gradient([&inputs[0], &inputs[1], &gradient]);
            return made.unwrap_or_else(|error| panic!("{error}")).map(Some).into();
        }
        let (mut by_gate, mut by_up) = (inputs[0].empty_like(), inputs[1].empty_like());
        let (gate_slice, up_slice) = (floats_mut(&mut by_gate), floats_mut(&mut by_up));
        kernel(inputs).backward(floats(&gradient), gate_slice, up_slice);
        vec![Some(by_gate), Some(by_up)]
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
        let theirs = |inputs: &[Tensor]| inputs[0].silu() * &inputs[1];
        for width in (1..=70).chain([576, 1536]) {
            for shape in [vec![1, width], vec![37, width], vec![5, 3, width]] {
                let inputs = [normal(&shape) * 5.0, normal(&shape)];
                check(&inputs, &|inputs| swiglu(&inputs[0], &inputs[1]), &theirs);
            }
        }
    }

    #[test]
    fn the_libtorch_path_gives_the_same() {
        seed(3);
        let inputs = [normal(&[37, 70]) * 5.0, normal(&[37, 70])];
        check_wide(&inputs, &|inputs| swiglu(&inputs[0], &inputs[1]));
    }

    #[test]
    fn a_transposed_input() {
        seed(2);
        check(
            &[normal(&[40, 30]), normal(&[30, 40])],
            &|inputs| swiglu(&inputs[0].tr(), &inputs[1]),
            &|inputs| inputs[0].tr().silu() * &inputs[1],
        );
    }

    #[test]
    #[should_panic(expected = "gate and up of one shape")]
    fn shapes_must_agree() {
        let _ = swiglu(&normal(&[2, 3]), &normal(&[3, 2]));
    }
}
