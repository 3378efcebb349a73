//! Rotary position embedding, applied.

use super::{may_record, on_cuda};
use crate::{
    cuda::{elementwise as cuda, takes},
    device::{is_native, wide},
    kernels::elementwise::rotary::Rotary,
    torch::{
        function::{Function, apply},
        slices::{floats, floats_mut},
    },
};
use tch::{Kind, Tensor};

/// Turns the halves of every head against each other: `x` `[N, heads, head_dim]`, `cos` and `sin`
/// `[N, head_dim / 2]`, which get no gradient; the shape of `x`. `x` is not kept for the backward
/// pass.
///
/// # Panics
/// If a shape does not fit, or the tensors differ in device.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let (rows, _, head_dim) = x.size3().expect("x has three axes");
    for angles in [cos, sin] {
        assert!(
            head_dim % 2 == 0 && angles.size() == [rows, head_dim / 2],
            "half a head of angles"
        );
    }
    if !is_native(x) {
        if let Some(made) = on_cuda(&[x], || cuda::rotate(x, cos, sin)) {
            return made;
        }
        if !takes(x.device()) || wide(x.kind()) != Kind::Float {
            return turn(x, cos, sin);
        }
    }
    let (x, cos, sin) = (x.contiguous(), cos.contiguous(), sin.contiguous());
    if !may_record(&[&x]) {
        return Rotate.forward(&[x, cos, sin]);
    }
    apply(Rotate, &[&x, &cos, &sin]).unwrap_or_else(|error| panic!("rotate: {error}"))
}

/// [`rotate`] in libtorch's operations; rounded once, to the type of `x`.
fn turn(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let (cos, sin) = (cos.unsqueeze(1), sin.unsqueeze(1));
    let halves = x.to_kind(wide(x.kind())).chunk(2, -1);
    let (first, second) = (&halves[0], &halves[1]);
    let turned = [first * &cos - second * &sin, second * &cos + first * &sin];
    Tensor::cat(&turned, -1).to_kind(x.kind())
}

/// [`rotate`] by a kernel of a CUDA device.
fn on_device(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    cuda::rotate(x, cos, sin).unwrap_or_else(|error| panic!("{error}"))
}

struct Rotate;

/// The angles in `inputs`, for rows shaped as those of `x`.
fn rotary<'a>(inputs: &'a [Tensor], x: &Tensor) -> Rotary<'a> {
    let (_, heads, head_dim) = x.size3().expect("x has three axes");
    let (half, width) = (head_dim as usize / 2, (heads * head_dim) as usize);
    Rotary { cos: floats(&inputs[1]), sin: floats(&inputs[2]), half, width }
}

impl Function for Rotate {
    const READS: u64 = 0b110;

    fn forward(&self, inputs: &[Tensor]) -> Tensor {
        let x = &inputs[0];
        if !is_native(x) {
            return on_device(x, &inputs[1], &inputs[2]);
        }
        let mut y = x.empty_like();
        rotary(inputs, x).forward(floats(x), floats_mut(&mut y));
        y
    }

    fn backward(&self, inputs: &[Tensor], gradient: &Tensor) -> Vec<Option<Tensor>> {
        let gradient = gradient.contiguous();
        if !is_native(&gradient) {
            let by_x = on_device(&gradient, &inputs[1], &inputs[2].neg());
            return vec![Some(by_x), None, None];
        }
        let mut by_x = gradient.empty_like();
        rotary(inputs, &gradient).backward(floats(&gradient), floats_mut(&mut by_x));
        vec![Some(by_x), None, None]
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check, check_wide};
    use super::*;
    use crate::torch::random::{normal, seed};

    fn theirs(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
        let twice = |angles: &Tensor| Tensor::cat(&[angles, angles], -1).unsqueeze(1);
        let halves = x.chunk(2, -1);
        let turned = Tensor::cat(&[&(-&halves[1]), &halves[0]], -1);
        x * twice(cos) + turned * twice(sin)
    }

    #[test]
    fn values_and_gradients_are_those_of_libtorch() {
        seed(1);
        for half in (1..=35).chain([64, 128]) {
            for (rows, heads) in [(1, 1), (7, 3), (70, 9)] {
                let angles = normal(&[rows, half]) * 3.0;
                let (cos, sin) = (angles.cos(), angles.sin());
                check(
                    &[normal(&[rows, heads, 2 * half])],
                    &|inputs| rotate(&inputs[0], &cos, &sin),
                    &|inputs| theirs(&inputs[0], &cos, &sin),
                );
            }
        }
    }

    #[test]
    fn the_libtorch_path_gives_the_same() {
        seed(3);
        let angles = normal(&[20, 8]) * 3.0;
        let (cos, sin) = (angles.cos(), angles.sin());
        check_wide(&[normal(&[20, 3, 16])], &|inputs| rotate(&inputs[0], &cos, &sin));
    }

    #[test]
    fn a_transposed_input() {
        seed(2);
        let angles = normal(&[20, 8]);
        let (cos, sin) = (angles.cos(), angles.sin());
        check(
            &[normal(&[3, 20, 16])],
            &|inputs| rotate(&inputs[0].transpose(0, 1), &cos, &sin),
            &|inputs| theirs(&inputs[0].transpose(0, 1), &cos, &sin),
        );
    }

    #[test]
    #[should_panic(expected = "half a head of angles")]
    fn angles_must_fit() {
        let _ = rotate(&normal(&[2, 1, 8]), &normal(&[2, 8]), &normal(&[2, 8]));
    }
}
