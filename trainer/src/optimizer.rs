//! AdamW over the served tensors themselves, or over f32 copies of those that are narrower, from
//! which it writes them in place.

use crate::config::Train;
use onpolicy_engine::{
    cuda::{
        adamw::{FusedAdamW, Parameter},
        takes,
    },
    device::wide,
    torch::{
        TorchError,
        autograd::set_grad,
        optim::{AdamW, AdamWState, adamw, copy_each, total_norm},
    },
    weights::Weights,
};
use std::path::Path;
use tch::{Kind, Tensor};

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

/// The optimizer: handles to the policy's tensors, and their moments. Gradients are the tensors'
/// `grad`, in f32 where the tensor is narrower; backward passes add to them.
pub struct Optimizer {
    settings: OptimizerSettings,
    names: Vec<String>,
    /// The served tensors.
    params: Vec<Tensor>,
    /// What AdamW works on: an f32 copy of a parameter that is narrower, else the parameter itself.
    masters: Vec<Tensor>,
    first: Vec<Tensor>,
    second: Vec<Tensor>,
    steps: Vec<Tensor>,
    taken: u64,
    /// Steps on a CUDA device.
    fused: FusedAdamW,
}

impl Optimizer {
    /// An optimizer without history over trainable handles (see [`Weights::share_trainable`]).
    /// Weights without a gradient get one of zeros: made during a backward pass, gradients would
    /// lie between its activations and keep their memory from being used again as a whole.
    ///
    /// # Errors
    /// What libtorch refuses; memory that does not suffice is one reason.
    pub fn new(weights: &Weights, settings: OptimizerSettings) -> Result<Self, TorchError> {
        for (_, weight) in weights.iter() {
            prepare_gradient(weight)?;
        }
        let each = |make: fn(&Tensor) -> Result<Tensor, TorchError>| -> Result<Vec<_>, _> {
            weights.iter().map(|(_, weight)| make(&weight.detach())).collect()
        };
        Ok(Self {
            settings,
            names: weights.iter().map(|(name, _)| name.to_string()).collect(),
            params: weights.iter().map(|(_, t)| t.shallow_clone()).collect(),
            masters: each(master)?,
            first: each(zeros)?,
            second: each(zeros)?,
            steps: each(|weight| told(Tensor::f_zeros([0i64; 0], (Kind::Float, weight.device()))))?,
            taken: 0,
            fused: FusedAdamW::default(),
        })
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
        let settings = self.adamw(lr, grad_norm);
        match self.params.first() {
            Some(param) if takes(param.device()) => self.step_fused(&settings),
            _ => self.step_of_libtorch(settings),
        }
    }

    /// One kernel for everything.
    fn step_fused(&mut self, settings: &AdamW) -> Result<(), TorchError> {
        let grads: Vec<Tensor> = self.params.iter().map(Tensor::grad).collect();
        let parameter = |index: usize| Parameter {
            served: &self.params[index],
            master: &self.masters[index],
            gradient: &grads[index],
            moments: [&self.first[index], &self.second[index]],
        };
        let parameters: Vec<Parameter<'_>> = (0..grads.len()).map(parameter).collect();
        let stepped = self.fused.step(settings, self.taken, &parameters);
        stepped.map_err(|error| TorchError(error.to_string()))
    }

    /// libtorch's kernel; then the served tensors, and the gradients.
    fn step_of_libtorch(&mut self, settings: AdamW) -> Result<(), TorchError> {
        let updated = self.params.iter().enumerate().filter(|(_, param)| param.grad().defined());
        let updated: Vec<usize> = updated.map(|(index, _)| index).collect();
        let pick = |tensors: &[Tensor]| -> Vec<Tensor> {
            updated.iter().map(|&index| tensors[index].shallow_clone()).collect()
        };
        let (params, steps) = (pick(&self.masters), pick(&self.steps));
        let grads: Vec<Tensor> = updated.iter().map(|&index| self.params[index].grad()).collect();
        onpolicy_engine::torch::no_grad(|| {
            for mut step in steps.iter().map(Tensor::shallow_clone) {
                // Our kernel has counted none.
                let _ = match step.device().is_cuda() {
                    true => step.fill_(self.taken as f64),
                    false => step.g_add_scalar_(1.0),
                };
            }
            let (first, second) = (pick(&self.first), pick(&self.second));
            let (params, first) = (&params[..], &first[..]);
            let state = AdamWState { params, grads: &grads, first, second: &second, steps: &steps };
            adamw(settings, &state)
        })?;
        self.write_served()?;
        self.zero_grad();
        Ok(())
    }

    /// Rounds the f32 copies into the tensors that are served.
    fn write_served(&self) -> Result<(), TorchError> {
        let narrow: Vec<(Tensor, Tensor)> = self.narrow().collect();
        let (served, masters): (Vec<Tensor>, Vec<Tensor>) = narrow.into_iter().unzip();
        if served.is_empty() { Ok(()) } else { copy_each(&served, &masters) }
    }

    /// Served tensors that are narrower than f32, each with its f32 copy.
    fn narrow(&self) -> impl Iterator<Item = (Tensor, Tensor)> {
        let pairs = self.params.iter().zip(&self.masters);
        let pairs = pairs.filter(|(param, _)| is_narrow(param));
        pairs.map(|(param, master)| (param.detach(), master.shallow_clone()))
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

    /// Bytes that it holds beside the served tensors: gradients, moments and f32 copies.
    pub fn bytes(&self) -> usize {
        let of = |tensors: &[Tensor]| -> usize { tensors.iter().map(bytes).sum() };
        let copies: usize = self.narrow().map(|(_, master)| bytes(&master)).sum();
        let gradients: usize = self.gradients().map(|gradient| bytes(&gradient)).sum();
        of(&self.first) + of(&self.second) + copies + gradients
    }

    /// Writes moments, step counts and f32 copies to a safetensors file.
    ///
    /// # Errors
    /// What libtorch or the file system refuses.
    pub fn save(&self, path: &Path) -> Result<(), TorchError> {
        if self.params.first().is_some_and(|param| param.device().is_cuda()) {
            // There all tensors take the same steps, and nobody counts them for each.
            let count = |step: &Tensor| drop(step.shallow_clone().fill_(self.taken as f64));
            self.steps.iter().for_each(count);
        }
        let mut named: Vec<(String, &Tensor)> = Vec::new();
        for (column, tensors) in self.columns() {
            named.extend(tensors.into_iter().map(|(name, t)| (format!("{column}.{name}"), t)));
        }
        Tensor::write_safetensors(&named, path).map_err(TorchError::from)
    }

    /// Reads what [`Optimizer::save`] wrote; `taken` is the number of steps behind it. Narrow
    /// weights are written from their f32 copies.
    ///
    /// # Errors
    /// A file that is damaged, or of another model, or of a run with another `model.dtype`.
    pub fn load(&mut self, path: &Path, taken: u64) -> Result<(), TorchError> {
        let stored = Tensor::read_safetensors(path).map_err(TorchError::from)?;
        let stored: std::collections::HashMap<String, Tensor> = stored.into_iter().collect();
        for (column, tensors) in self.columns() {
            for (name, tensor) in tensors {
                let key = format!("{column}.{name}");
                let value = stored.get(&key).filter(|value| value.size() == tensor.size());
                let value = value.ok_or_else(|| {
                    let hint = match column {
                        MASTER => "; is it of a run with another model.dtype?",
                        _ => "",
                    };
                    TorchError(format!("{}: '{key}' is missing or misshapen{hint}", path.display()))
                })?;
                tensor.shallow_clone().copy_(value);
            }
        }
        self.taken = taken;
        self.write_served()
    }

    /// What a file of the optimizer holds: columns of named tensors.
    fn columns(&self) -> [(&'static str, Vec<(&str, &Tensor)>); 4] {
        let names = || self.names.iter().map(String::as_str);
        let masters = names().zip(&self.masters).zip(&self.params);
        let masters = masters.filter(|(_, param)| is_narrow(param)).map(|(master, _)| master);
        [
            ("first", names().zip(&self.first).collect()),
            ("second", names().zip(&self.second).collect()),
            ("steps", names().zip(&self.steps).collect()),
            (MASTER, masters.collect()),
        ]
    }
}

/// The column of f32 copies in a file.
const MASTER: &str = "master";

fn is_narrow(tensor: &Tensor) -> bool {
    matches!(tensor.kind(), Kind::BFloat16 | Kind::Half)
}

fn bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

/// What AdamW works on for this weight.
fn master(weight: &Tensor) -> Result<Tensor, TorchError> {
    // Where the type stays it is the tensor itself.
    told(weight.f_to_kind(wide(weight.kind())))
}

/// Zeros shaped as the weight, on its device.
fn zeros(weight: &Tensor) -> Result<Tensor, TorchError> {
    told(Tensor::f_zeros(weight.size(), (wide(weight.kind()), weight.device())))
}

/// Sees to it that the weight has a gradient, which is not narrow.
fn prepare_gradient(weight: &Tensor) -> Result<(), TorchError> {
    let gradient = weight.grad();
    match gradient.defined() {
        true if !is_narrow(&gradient) => Ok(()),
        true => set_grad(weight, &told(gradient.f_to_kind(wide(weight.kind())))?),
        false => set_grad(weight, &zeros(&weight.detach())?),
    }
}

fn told<T>(result: Result<T, tch::TchError>) -> Result<T, TorchError> {
    result.map_err(TorchError::from)
}
