//! Tokens that are being drawn: a device has them before the host does, and can go on with them.

use super::{sampling, upload};
use crate::{
    cuda::{CudaError, sampling as kernel, takes},
    sampler::{Draw, Drawn},
};
use tch::Tensor;

/// The tokens of some draws.
#[derive(Debug)]
pub struct Drawing {
    tokens: Option<Tensor>,
    host: Host,
}

/// What the host has of them.
#[derive(Debug)]
enum Host {
    Known(Vec<Result<Drawn, String>>),
    Coming(kernel::Coming),
}

impl Drawing {
    /// Tokens that the host has drawn.
    pub fn known(drawn: Vec<Result<Drawn, String>>) -> Self {
        Self { tokens: None, host: Host::Known(drawn) }
    }

    /// Draws as [`sampling::sample`] does. Where no draw of a CUDA device has to see all logits, this does
    /// not wait for it.
    ///
    /// # Panics
    /// As there.
    pub fn start(logits: &Tensor, draws: &[Draw<'_>]) -> Self {
        if !takes(logits.device()) {
            let drawn = sampling::sample(logits, draws);
            // A row without a token ends its sample, whatever follows.
            let id = |drawn: &Result<Drawn, String>| drawn.as_ref().map_or(0, |d| i64::from(d.id));
            let ids: Vec<i64> = drawn.iter().map(id).collect();
            return Self { tokens: Some(upload(&ids, logits.device())), ..Self::known(drawn) };
        }
        match Self::by_kernels(logits, draws) {
            Ok(Some(drawing)) => drawing,
            Ok(None) | Err(CudaError::Unsupported(_)) => {
                Self::known(sampling::sample(logits, draws))
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn by_kernels(logits: &Tensor, draws: &[Draw<'_>]) -> Result<Option<Self>, CudaError> {
        let Some(numbers) = kernel::sample_all(logits, draws)? else { return Ok(None) };
        let host = Host::Coming(numbers.to_host()?);
        Ok(Some(Self { tokens: Some(numbers.tokens), host }))
    }

    /// The tokens where the logits are, i64 `[draws]`, if the device has them before the host: what is
    /// drawn without one is 0.
    pub fn tokens(&self) -> Option<&Tensor> {
        self.tokens.as_ref()
    }

    /// What was drawn, or why nothing was, as [`sampler::sample`](crate::sampler::sample) says it. Waits for
    /// the draws, and for nothing that the device was given after them.
    ///
    /// # Panics
    /// If the device fails.
    pub fn wait(self) -> Vec<Result<Drawn, String>> {
        match self.host {
            Host::Known(drawn) => drawn,
            Host::Coming(coming) => coming.wait().unwrap_or_else(|error| panic!("{error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use onpolicy_plugin_api::SamplingParams;
    use tch::{Device, Kind};

    /// By tensor operations, and by kernels in their harness.
    #[test]
    fn the_next_step_gets_the_tokens_that_the_host_gets() {
        let logits = Tensor::zeros([3, 9], (Kind::Float, Device::Cpu));
        let _ = logits.get(0).get(4).fill_(5.0);
        let _ = logits.get(1).get(2).fill_(f64::NAN);
        let _ = logits.get(2).get(8).fill_(5.0);
        let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let draws = [2, 1, 0, 0].map(|row| Draw::new(row, &greedy));
        let by_kernels = Drawing::by_kernels(&logits, &draws).unwrap().expect("of sums alone");
        for drawing in [Drawing::start(&logits, &draws), by_kernels] {
            let tokens = drawing.tokens().expect("a device has them").shallow_clone();
            assert_eq!(Vec::<i64>::try_from(tokens).unwrap(), [8, 0, 4, 4]);
            let drawn = drawing.wait();
            assert!(drawn[1].as_ref().is_err_and(|why| why.contains("NaN")), "{drawn:?}");
            assert_eq!([0, 2, 3].map(|i| drawn[i].as_ref().unwrap().id), [8, 4, 4]);
            assert!(Drawing::known(drawn).tokens().is_none(), "the host had them first");
        }
    }
}
