//! AdamW over f32 masters, in one pass that also writes the served tensors and clears the gradients.

use super::{
    CudaError,
    launch::{Argument, Launch, device_of, require},
    source::{Element, Program},
};
use crate::{device::upload, torch::optim::AdamW as Settings};
use tch::{Kind, Tensor};

/// Elements that a block takes.
const CHUNK: usize = 8192;

/// As in adamw.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct AdamW {
    tensors: *const i64,
    chunks: *const i32,
    scale: f32,
    beta1: f32,
    beta2: f32,
    kept: f32,
    rate: f32,
    root: f32,
    eps: f32,
}

impl Argument for AdamW {}

/// One parameter: all of one shape, contiguous, and f32 but for the served one.
#[derive(Debug)]
pub struct Parameter<'a> {
    /// What is served; may be the master itself.
    pub served: &'a Tensor,
    /// What is trained.
    pub master: &'a Tensor,
    /// Read, and zero afterwards.
    pub gradient: &'a Tensor,
    /// First and second moment.
    pub moments: [&'a Tensor; 2],
}

impl Parameter<'_> {
    fn tensors(&self) -> [&Tensor; 5] {
        [self.served, self.master, self.gradient, self.moments[0], self.moments[1]]
    }

    /// Addresses, and the number of elements, as the kernel reads them.
    fn numbers(&self) -> [i64; 6] {
        let [a, b, c, d, e] = self.tensors().map(|tensor| tensor.data_ptr() as i64);
        [a, b, c, d, e, self.master.numel() as i64]
    }

    fn fits(&self, served: Kind) -> bool {
        let plain = |tensor: &&Tensor| {
            let kind = if std::ptr::eq(*tensor, self.served) { served } else { Kind::Float };
            tensor.kind() == kind && tensor.is_contiguous() && tensor.size() == self.master.size()
        };
        self.tensors().iter().all(plain)
    }
}

/// Steps over the same parameters: where they lie is told to the device when that changes.
#[derive(Debug, Default)]
pub struct FusedAdamW {
    numbers: Vec<i64>,
    /// The same on the device, and the chunks.
    told: Option<(Tensor, Tensor)>,
}

impl FusedAdamW {
    /// Step number `step`, from 1 on. All served tensors are of one type.
    ///
    /// # Errors
    /// Shapes or types that do not fit, or what [`Launch::run`] says.
    pub fn step(
        &mut self,
        settings: &Settings,
        step: u64,
        parameters: &[Parameter<'_>],
    ) -> Result<(), CudaError> {
        let Some(first) = parameters.first() else { return Ok(()) };
        require(step > 0, || "the steps of AdamW count from 1".into())?;
        let element = Element::of(first.served.kind()).ok_or_else(|| {
            CudaError::Unsupported(format!("AdamW over parameters like {first:?}"))
        })?;
        let numbers: Vec<i64> = parameters.iter().flat_map(Parameter::numbers).collect();
        if self.told.is_none() || numbers != self.numbers {
            self.told = Some(tell(&numbers, parameters)?);
            self.numbers = numbers;
        }
        let device = first.master.device();
        let (tensors, chunks) = self.told.as_ref().expect("told above");
        let Settings { lr, betas: (beta1, beta2), eps, weight_decay, grad_scale } = *settings;
        let remaining = |beta: f64| 1.0 - beta.powf(step as f64);
        let argument = AdamW {
            tensors: tensors.data_ptr().cast(),
            chunks: chunks.data_ptr().cast(),
            scale: (1.0 / grad_scale) as f32,
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            kept: (1.0 - lr * weight_decay) as f32,
            rate: (lr / remaining(beta1)) as f32,
            root: remaining(beta2).sqrt() as f32,
            eps: eps as f32,
        };
        let grid = [chunks.numel() / 2, 1];
        let launch = Launch::plain(Program::AdamW(element), "adamw", grid);
        // SAFETY: shapes and types were checked, and the table is of these tensors.
        unsafe { launch.run(device, &argument) }
    }
}

/// Checks the parameters and brings their addresses and chunks to the device.
fn tell(numbers: &[i64], parameters: &[Parameter<'_>]) -> Result<(Tensor, Tensor), CudaError> {
    let kind = parameters[0].served.kind();
    for parameter in parameters {
        require(parameter.fits(kind), || format!("AdamW over {parameter:?}"))?;
    }
    let tensors: Vec<&Tensor> = parameters.iter().flat_map(Parameter::tensors).collect();
    let device = device_of(&tensors)?;
    Ok((upload(numbers, device), upload(&chunks(parameters), device)))
}

/// Every chunk of every parameter, `[chunks, 2]`: which parameter, and its how manieth.
fn chunks(parameters: &[Parameter<'_>]) -> Vec<i32> {
    let of = |(index, parameter): (usize, &Parameter<'_>)| {
        let count = parameter.master.numel().div_ceil(CHUNK);
        (0..count).flat_map(move |chunk| [index as i32, chunk as i32])
    };
    parameters.iter().enumerate().flat_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cuda::harness::{race, unchanged},
        torch::random,
    };
    use tch::Device;

    const SETTINGS: Settings =
        Settings { lr: 1e-2, betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.1, grad_scale: 2.5 };

    /// Against the formulas in f64; rows that lie unaligned among them.
    #[test]
    fn steps_are_those_of_the_formulas() {
        random::seed(1);
        let random = |len: i64| random::normal(&[len]);
        for (kind, digits) in [(Kind::BFloat16, 8), (Kind::Half, 11), (Kind::Float, 21)] {
            let lengths = [5i64, 8192, 20_003, 1];
            let masters: Vec<Tensor> = lengths.iter().map(|&len| random(len)).collect();
            // One element in: addresses that are no multiple of 16.
            let buffers: Vec<Tensor> = masters
                .iter()
                .map(|m| Tensor::zeros([m.numel() as i64 + 1], (kind, Device::Cpu)))
                .collect();
            let served: Vec<Tensor> = buffers
                .iter()
                .zip(&lengths)
                .enumerate()
                .map(|(i, (buffer, &len))| buffer.narrow(0, i as i64 % 2, len))
                .collect();
            let zeros = || masters.iter().map(Tensor::zeros_like).collect::<Vec<_>>();
            let (first, second, gradients) = (zeros(), zeros(), zeros());
            let wide = |tensors: &[Tensor]| -> Vec<Tensor> {
                tensors.iter().map(|t| t.to_kind(Kind::Double)).collect()
            };
            let (mut want, mut m, mut v) = (wide(&masters), wide(&first), wide(&second));
            let mut fused = FusedAdamW::default();
            for step in 1..=3 {
                gradients.iter().for_each(|g| g.shallow_clone().copy_(&random(g.numel() as i64)));
                let Settings { lr, betas: (b1, b2), eps, weight_decay, grad_scale } = SETTINGS;
                for (i, g) in wide(&gradients).into_iter().enumerate() {
                    let g = g / grad_scale;
                    m[i] = &m[i] * b1 + &g * (1.0 - b1);
                    v[i] = &v[i] * b2 + g.square() * (1.0 - b2);
                    let direction = (&m[i] / (1.0 - b1.powi(step)))
                        / ((&v[i] / (1.0 - b2.powi(step))).sqrt() + eps);
                    want[i] = &want[i] * (1.0 - lr * weight_decay) - direction * lr;
                }
                let parameters: Vec<Parameter<'_>> = (0..lengths.len())
                    .map(|i| Parameter {
                        served: &served[i],
                        master: &masters[i],
                        gradient: &gradients[i],
                        moments: [&first[i], &second[i]],
                    })
                    .collect();
                let made: Vec<&Tensor> = gradients.iter().collect();
                let step = || fused.step(&SETTINGS, step as u64, &parameters).unwrap();
                assert_eq!(race(&made, unchanged, step), None);
            }
            for (i, want) in want.iter().enumerate() {
                let off = |got: &Tensor, digits: i32| {
                    let error =
                        (got.to_kind(Kind::Double) - want).abs() / want.abs().clamp_min(0.1);
                    let error = error.max().double_value(&[]);
                    assert!(error < 2f64.powi(-digits), "{kind:?}, {i}: {error:e}");
                };
                off(&masters[i], 19);
                off(&served[i], digits.min(19));
                assert_eq!(gradients[i].abs().max().double_value(&[]), 0.0);
            }
            assert_eq!(buffers[1].double_value(&[0]), 0.0, "what lies before is left alone");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let [a, b] = [3i64, 4].map(|len| Tensor::zeros([len], (Kind::Float, Device::Cpu)));
        let with = |served, gradient| Parameter { served, master: &a, gradient, moments: [&a, &a] };
        let mut fused = FusedAdamW::default();
        let wide = a.to_kind(Kind::Double);
        for parameters in [[with(&a, &b)], [with(&wide, &a)], [with(&a, &wide)]] {
            let refused = fused.step(&SETTINGS, 1, &parameters);
            assert!(matches!(refused, Err(CudaError::Unsupported(_))));
        }
        assert!(fused.step(&SETTINGS, 0, &[with(&a, &a)]).is_err());
        assert_eq!(fused.step(&SETTINGS, 1, &[]), Ok(()));
    }
}
