//! The fused optimizer of libtorch.

use super::{TorchError, check, op_adamw, op_copy_each, op_total_norm, pointers};
use tch::Tensor;

/// Settings of one AdamW step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first and second moment.
    pub betas: (f64, f64),
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The gradients are divided by this first (1 leaves them alone).
    pub grad_scale: f64,
}

/// Parameters and their state, index by index: parameter, gradient, first moment, second moment,
/// and the number of steps taken (a scalar f32 tensor each, on the parameter's device).
#[derive(Debug)]
pub struct AdamWState<'a> {
    /// Written in place.
    pub params: &'a [Tensor],
    /// Read, and divided by `grad_scale` in place.
    pub grads: &'a [Tensor],
    /// First moments, written in place.
    pub first: &'a [Tensor],
    /// Second moments, written in place.
    pub second: &'a [Tensor],
    /// Step counters. The caller adds one before the call.
    pub steps: &'a [Tensor],
}

/// One step of AdamW with bias correction, in one pass over all state.
///
/// # Errors
/// Lists of different lengths, or what libtorch refuses.
pub fn adamw(settings: AdamW, state: &AdamWState<'_>) -> Result<(), TorchError> {
    let count = state.params.len();
    let lists = [state.grads, state.first, state.second, state.steps];
    if lists.iter().any(|list| list.len() != count) {
        return Err(TorchError("AdamW: the lists differ in length".into()));
    }
    let params = pointers(state.params);
    let [grads, first, second, steps] = lists.map(pointers);
    // SAFETY: five arrays of `count` valid tensors each.
    check(unsafe {
        op_adamw(
            params.as_ptr(),
            grads.as_ptr(),
            first.as_ptr(),
            second.as_ptr(),
            steps.as_ptr(),
            count as i64,
            settings.lr,
            settings.betas.0,
            settings.betas.1,
            settings.eps,
            settings.weight_decay,
            settings.grad_scale,
        )
    })
}

/// Copies each tensor of `from` into that of `to`, rounding where the type is narrower. Addresses
/// stay.
///
/// # Errors
/// Lists of different lengths, or what libtorch refuses.
pub fn copy_each(to: &[Tensor], from: &[Tensor]) -> Result<(), TorchError> {
    if to.len() != from.len() {
        return Err(TorchError("copy_each: the lists differ in length".into()));
    }
    let (to, from) = (pointers(to), pointers(from));
    // SAFETY: two arrays of as many valid tensors.
    check(unsafe { op_copy_each(to.as_ptr(), from.as_ptr(), to.len() as i64) })
}

/// L2 norm of all tensors taken together.
///
/// # Errors
/// What libtorch refuses.
pub fn total_norm(tensors: &[Tensor]) -> Result<f64, TorchError> {
    let tensors = pointers(tensors);
    let mut norm = 0.0;
    // SAFETY: `tensors` holds valid tensors, `norm` is a valid place for the answer.
    check(unsafe { op_total_norm(tensors.as_ptr(), tensors.len() as i64, &raw mut norm) })?;
    Ok(norm)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand: after one step from zero moments the bias-corrected update is sign(g), so
    /// w = 1 - lr * (wd * 1 + 1).
    #[test]
    fn first_step_moves_by_the_learning_rate() {
        let tensor = |value: f32| Tensor::from_slice(&[value]);
        let (params, grads) = ([tensor(1.0)], [tensor(8.0)]);
        let (first, second, steps) = ([tensor(0.0)], [tensor(0.0)], [Tensor::from(1f32)]);
        let state = AdamWState {
            params: &params,
            grads: &grads,
            first: &first,
            second: &second,
            steps: &steps,
        };
        let settings =
            AdamW { lr: 0.1, betas: (0.9, 0.999), eps: 0.0, weight_decay: 0.5, grad_scale: 4.0 };
        adamw(settings, &state).unwrap();
        assert!((params[0].double_value(&[0]) - (1.0 - 0.1 * 1.5)).abs() < 1e-6);
        assert!((first[0].double_value(&[0]) - 0.1 * 2.0).abs() < 1e-6);
        assert!((total_norm(&[tensor(3.0), tensor(4.0)]).unwrap() - 5.0).abs() < 1e-6);
    }

    #[test]
    fn copies_round_to_the_nearest_bf16() {
        let kind = tch::Kind::BFloat16;
        let to = [Tensor::zeros([2], (kind, tch::Device::Cpu))];
        let address = to[0].data_ptr();
        // 1 + 2^-9 lies halfway below the next bf16 above 1; ties go to the even one.
        copy_each(&to, &[Tensor::from_slice(&[1.0 + 2f32.powi(-9), -3.5])]).unwrap();
        let copied = Vec::<f32>::try_from(to[0].to_kind(tch::Kind::Float)).unwrap();
        assert_eq!(copied, [1.0, -3.5]);
        assert_eq!(to[0].data_ptr(), address);
        assert!(copy_each(&to, &[]).is_err());
    }
}
