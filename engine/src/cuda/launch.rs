//! Kernels put into the queue of libtorch's current stream.

use super::{CudaError, driver::Driver, modules, source::Program};
use crate::torch::stream;
use tch::{Device, Tensor};

/// A kernel and how much of it.
#[derive(Debug, Clone, Copy)]
pub struct Launch {
    /// Whose.
    pub program: Program,
    /// Its name.
    pub name: &'static str,
    /// Blocks along x and y.
    pub grid: [usize; 2],
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
}

/// What a kernel takes: one struct of plain numbers and addresses.
pub trait Argument: Copy {}

impl Launch {
    /// Puts the kernel into the queue of the current stream of `device`; nothing where a grid is
    /// empty.
    ///
    /// # Errors
    /// Anything but a CUDA device, a kernel that does not compile, or what the driver refuses.
    ///
    /// # Safety
    /// `argument` is what this kernel takes, and its addresses are those of tensors on `device`
    /// that are large enough and live until the call returns: libtorch's allocator keeps the memory
    /// for the stream until the kernel has run.
    pub unsafe fn run<A: Argument>(&self, device: Device, argument: &A) -> Result<(), CudaError> {
        if self.grid.contains(&0) {
            return Ok(());
        }
        match device {
            // SAFETY: as the caller says.
            Device::Cuda(index) => unsafe { self.run_on(index, argument) },
            #[cfg(test)]
            Device::Cpu => {
                // SAFETY: as the caller says, on the CPU.
                unsafe { super::harness::run(self, argument) };
                Ok(())
            }
            _ => Err(CudaError::Unsupported(format!("tensors on {device:?}"))),
        }
    }

    unsafe fn run_on<A: Argument>(&self, index: usize, argument: &A) -> Result<(), CudaError> {
        let driver = Driver::get()?;
        driver.enter(index)?;
        let function = modules::function(index, self)?;
        let grid = self.grid.map(|blocks| blocks as u32);
        let shape = (grid, self.program.threads(self.name), self.shared);
        // SAFETY: as the caller of `run` says.
        unsafe { driver.launch(function, shape, stream::current(index)?, argument) }
    }
}

/// Refuses tensors that are not on one device that kernels run on; says which one it is.
pub(super) fn device_of(tensors: &[&Tensor]) -> Result<Device, CudaError> {
    let device = tensors[0].device();
    if tensors.iter().any(|tensor| tensor.device() != device) {
        return Err(CudaError::Unsupported("tensors on different devices".into()));
    }
    Ok(device)
}

/// Refuses what is not so, for this reason.
pub(super) fn require(so: bool, reason: impl FnOnce() -> String) -> Result<(), CudaError> {
    if so { Ok(()) } else { Err(CudaError::Unsupported(reason())) }
}
