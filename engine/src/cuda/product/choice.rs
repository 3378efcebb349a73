//! Which way to make a product of which shape was chosen on a device, if not libtorch's (see
//! [`crate::device::tuning`]), and products made so.

use super::{Output, Processors, Shape, Way, Workspace};
use crate::{
    cuda::{CudaError, modules::capability},
    torch::TorchError,
};
use std::{
    cell::RefCell,
    collections::{HashMap, hash_map::Entry},
    fmt,
    sync::{LazyLock, PoisonError, RwLock},
};
use tch::{Device, Tensor};

/// What a choice is made for. One row of `x` has one of its own, because libtorch has other kernels
/// for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Case {
    /// Shapes and type.
    pub shape: Shape,
    /// `x` has one row.
    pub single: bool,
}

impl Case {
    /// Of `x` `[M, depth]` and `weight` `[width, depth]`; none if there are no kernels for them.
    pub fn of(x: &Tensor, weight: &Tensor, output: Output) -> Option<Self> {
        let shape = Shape::of(x, weight, output)?;
        Some(Self { shape, single: x.size()[0] == 1 })
    }

    /// The most rows of `x` that it is.
    pub fn rows(&self) -> usize {
        if self.single { 1 } else { self.shape.columns }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rows by {}", self.rows(), self.shape)
    }
}

static CHOICES: LazyLock<RwLock<HashMap<(Device, Case), Way>>> = LazyLock::new(RwLock::default);

thread_local! {
    /// One for each thread, whose operations follow each other.
    static WORKSPACES: RefCell<HashMap<Device, Workspace>> = RefCell::default();
}

/// Makes products of this case on `device` in this way from now on; by libtorch if it is none.
pub fn choose(device: Device, case: Case, way: Option<Way>) {
    let mut choices = CHOICES.write().unwrap_or_else(PoisonError::into_inner);
    match way {
        Some(way) => choices.insert((device, case), way),
        None => choices.remove(&(device, case)),
    };
}

/// The way that was chosen for such a product; none where libtorch is to make it.
pub fn chosen(x: &Tensor, weight: &Tensor, output: Output) -> Option<Way> {
    let case = Case::of(x, weight, output)?;
    let choices = CHOICES.read().unwrap_or_else(PoisonError::into_inner);
    choices.get(&(weight.device(), case)).copied()
}

/// As [`Workspace::product`], in this thread's workspace.
///
/// # Errors
/// As [`Workspace::product`].
pub fn product_by(
    parts: (&Tensor, &Tensor, Option<&Tensor>),
    output: Output,
    way: Way,
) -> Result<Tensor, CudaError> {
    in_workspace(parts.1.device(), |workspace| workspace.product(parts, output, way))?
}

/// The ways to make products of this case on a device: none where the kernels are not for it.
///
/// # Errors
/// If the device has no memory for a workspace.
pub fn ways(device: Device, case: &Case) -> Result<Vec<Way>, CudaError> {
    if let Device::Cuda(index) = device
        && !case.shape.program().is_for(capability(index)?)
    {
        return Ok(Vec::new());
    }
    in_workspace(device, |workspace| workspace.ways(case.shape))
}

/// Runs `body` with this thread's workspace.
fn in_workspace<R>(device: Device, body: impl FnOnce(&mut Workspace) -> R) -> Result<R, CudaError> {
    WORKSPACES.with_borrow_mut(|workspaces| {
        let workspace = match workspaces.entry(device) {
            Entry::Occupied(made) => made.into_mut(),
            Entry::Vacant(place) => {
                let made = Workspace::new(processors(device)?, device);
                let failed = |error: tch::TchError| TorchError(error.to_string());
                place.insert(made.map_err(failed)?)
            }
        };
        Ok(body(workspace))
    })
}

fn processors(device: Device) -> Result<Processors, CudaError> {
    match device {
        Device::Cuda(index) => Processors::of(index),
        #[cfg(test)]
        Device::Cpu => Ok(Processors { count: 3, shared: 228 << 10, shared_of_block: 227 << 10 }),
        _ => Err(CudaError::Unsupported(format!("tensors on {device:?}"))),
    }
}
