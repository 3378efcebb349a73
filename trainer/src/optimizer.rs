//! AdamW over the served tensors themselves.

use crate::config::Train;
use onpolicy_engine::{
    torch::{
        TorchError,
        autograd::set_grad,
        optim::{AdamW, AdamWState, adamw, total_norm},
    },
    weights::Weights,
};
use std::path::Path;
use tch::Tensor;

/// Settings that stay the same over a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptimizerSettings {
    /// Decay of the first and second moment.
    pub betas: (f64, f64),
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay, on every parameter.
    pub weight_decay: f64,
    /// Gradients are scaled down to this global norm; 0 leaves them alone.
    pub max_grad_norm: f64,
}

impl OptimizerSettings {
    /// What `[train]` says.
    pub fn new(train: &Train) -> Self {
        Self {
            betas: (train.betas[0], train.betas[1]),
            eps: train.eps,
            weight_decay: train.weight_decay,
            max_grad_norm: train.max_grad_norm,
        }
    }
}

/// The optimizer: handles to the policy's tensors, and their moments.
pub struct Optimizer {
    settings: OptimizerSettings,
    names: Vec<String>,
    params: Vec<Tensor>,
    first: Vec<Tensor>,
    second: Vec<Tensor>,
    steps: Vec<Tensor>,
    taken: u64,
}

impl Optimizer {
    /// An optimizer without history over trainable handles (see [`Weights::share_trainable`]).
    /// Weights without a gradient get one of zeros: made during a backward pass, gradients would
    /// lie between its activations and keep their memory from being used again as a whole.
    pub fn new(weights: &Weights, settings: OptimizerSettings) -> Self {
        for (_, weight) in weights.iter().filter(|(_, weight)| !weight.grad().defined()) {
            let zeros = weight.detach().zeros_like();
            set_grad(weight, &zeros).expect("a gradient shaped as its weight");
        }
        let zeros = || weights.iter().map(|(_, t)| t.detach().zeros_like()).collect();
        Self {
            settings,
            names: weights.iter().map(|(name, _)| name.to_string()).collect(),
            params: weights.iter().map(|(_, t)| t.shallow_clone()).collect(),
            first: zeros(),
            second: zeros(),
            steps: weights.iter().map(|_| Tensor::from(0f32)).collect(),
            taken: 0,
        }
    }

    /// Steps taken so far.
    pub fn steps(&self) -> u64 {
        self.taken
    }

    /// Global L2 norm of the gradients.
    ///
    /// # Errors
    /// What libtorch refuses.
    pub fn grad_norm(&self) -> Result<f64, TorchError> {
        total_norm(&self.gradients().collect::<Vec<_>>())
    }

    fn gradients(&self) -> impl Iterator<Item = Tensor> {
        self.params.iter().map(Tensor::grad).filter(Tensor::defined)
    }

    /// Clips the gradients (whose norm is `grad_norm`) and writes the weights in place. To be
    /// called while nothing else reads them; gradients are zero afterwards.
    ///
    /// # Errors
    /// A norm that is not finite (nothing is written), or what libtorch refuses.
    pub fn step(&mut self, lr: f64, grad_norm: f64) -> Result<(), TorchError> {
        if !grad_norm.is_finite() {
            return Err(TorchError(format!(
                "the gradient's norm is {grad_norm}: lower train.lr, or look at the rewards"
            )));
        }
        self.taken += 1;
        let updated = self.params.iter().enumerate().filter(|(_, param)| param.grad().defined());
        let updated: Vec<usize> = updated.map(|(index, _)| index).collect();
        let pick = |tensors: &[Tensor]| -> Vec<Tensor> {
            updated.iter().map(|&index| tensors[index].shallow_clone()).collect()
        };
        let (params, steps) = (pick(&self.params), pick(&self.steps));
        let grads: Vec<Tensor> = params.iter().map(Tensor::grad).collect();
        tch::no_grad(|| {
            for step in &steps {
                let _ = step.shallow_clone().g_add_scalar_(1.0);
            }
            let settings = self.adamw(lr, grad_norm);
            let (first, second) = (pick(&self.first), pick(&self.second));
            let (params, first) = (&params[..], &first[..]);
            let state = AdamWState { params, grads: &grads, first, second: &second, steps: &steps };
            adamw(settings, &state)
        })?;
        self.zero_grad();
        Ok(())
    }

    fn adamw(&self, lr: f64, grad_norm: f64) -> AdamW {
        let OptimizerSettings { betas, eps, weight_decay, max_grad_norm } = self.settings;
        // As torch.nn.utils.clip_grad_norm_: the factor is max / (norm + 1e-6), at most 1.
        let clip = if max_grad_norm > 0.0 { max_grad_norm / (grad_norm + 1e-6) } else { 1.0 };
        AdamW { lr, betas, eps, weight_decay, grad_scale: 1.0 / clip.min(1.0) }
    }

    /// Sets all gradients to zero.
    pub fn zero_grad(&mut self) {
        self.params.iter_mut().for_each(Tensor::zero_grad);
    }

    /// Writes moments and step counts to a safetensors file.
    ///
    /// # Errors
    /// What libtorch or the file system refuses.
    pub fn save(&self, path: &Path) -> Result<(), TorchError> {
        let columns = [("first", &self.first), ("second", &self.second), ("steps", &self.steps)];
        let named = columns.iter().flat_map(|(column, tensors)| {
            let names = self.names.iter().map(move |name| format!("{column}.{name}"));
            names.zip(tensors.iter())
        });
        let named: Vec<(String, &Tensor)> = named.collect();
        Tensor::write_safetensors(&named, path).map_err(|e| TorchError(e.to_string()))
    }

    /// Reads what [`Optimizer::save`] wrote; `taken` is the number of steps behind it.
    ///
    /// # Errors
    /// A file that is damaged, or of another model.
    pub fn load(&mut self, path: &Path, taken: u64) -> Result<(), TorchError> {
        let stored = Tensor::read_safetensors(path).map_err(|e| TorchError(e.to_string()))?;
        let stored: std::collections::HashMap<String, Tensor> = stored.into_iter().collect();
        let columns =
            [("first", &mut self.first), ("second", &mut self.second), ("steps", &mut self.steps)];
        for (column, tensors) in columns {
            for (name, tensor) in self.names.iter().zip(tensors) {
                let key = format!("{column}.{name}");
                let value = stored.get(&key).filter(|value| value.size() == tensor.size());
                let value = value.ok_or_else(|| {
                    TorchError(format!("{}: '{key}' is missing or misshapen", path.display()))
                })?;
                tensor.copy_(value);
            }
        }
        self.taken = taken;
        Ok(())
    }
}
