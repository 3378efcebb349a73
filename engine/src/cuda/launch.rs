//! Kernels put into the queue of libtorch's current stream.

use super::{
    CudaError,
    driver::{Driver, Extent},
    modules, scoped,
    source::Program,
};
use crate::torch::stream;
use std::cell::Cell;
use tch::{Device, Tensor};

thread_local! {
    static OVERLAPPING: Cell<bool> = const { Cell::new(false) };
}

/// Runs `body`. Kernels of our own that this thread launches in it may begin before the one before
/// them has ended, where the device can do that: they wait for it only before they touch what others
/// write (see kernels/device.cuh). Weights they may read ahead of that; so this is for recording
/// operations, among which none writes weights.
pub fn overlapping<R>(body: impl FnOnce() -> R) -> R {
    scoped::with(&OVERLAPPING, true, body)
}

/// The first compute capability whose kernels can overlap.
const OVERLAPS: (i32, i32) = (9, 0);

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
    /// Blocks along x that run together and see each other's shared memory; 1: each runs by itself.
    pub cluster: u32,
}

/// What a kernel takes: one struct of plain numbers and addresses.
pub trait Argument: Copy {}

impl Launch {
    /// Of a kernel whose blocks run by themselves and need no dynamic shared memory.
    pub fn plain(program: Program, name: &'static str, grid: [usize; 2]) -> Self {
        Self { program, name, grid, shared: 0, cluster: 1 }
    }

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
        let extent = Extent {
            grid: self.grid.map(|blocks| blocks as u32),
            threads: self.program.threads(self.name),
            shared: self.shared,
            cluster: self.cluster,
            overlaps: OVERLAPPING.get() && modules::capability(index)? >= OVERLAPS,
        };
        // SAFETY: as the caller of `run` says.
        unsafe { driver.launch(function, extent, stream::current(index)?, argument) }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::catch_unwind;

    #[test]
    fn kernels_overlap_only_where_that_is_said() {
        assert!(!OVERLAPPING.get());
        overlapping(|| {
            overlapping(|| assert!(OVERLAPPING.get()));
            assert!(OVERLAPPING.get());
            std::thread::spawn(|| assert!(!OVERLAPPING.get())).join().unwrap();
        });
        assert!(catch_unwind(|| overlapping(|| panic!("in the midst of it"))).is_err());
        assert!(!OVERLAPPING.get());
    }
}
