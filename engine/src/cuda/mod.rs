//! The GPU: what of CUDA is loaded, compiled and launched, and the kernels of our own.
//!
//! Nothing of CUDA is linked: libtorch's CUDA half, the driver and the compiler (NVRTC) are opened
//! when [`load`] is called. Kernels are CUDA C++ (`kernels/`), compiled for the device at hand once
//! and kept in the cache. Their sources also compile for the CPU (`harness/`, tests only), where
//! they are compared with the slow, obvious versions.
//!
//! # Layout
//! - [`attention`]: attention over pages; [`plan`]: how its work is cut. [`pages`]: writing them.
//! - [`product`]: the linear layers of few rows.
//! - [`sampling`]: logits to tokens, statistics and gradients.
//! - [`elementwise`]: norm, rotary embedding, gate. [`adamw`]: the optimizer's step.
//! - [`source`]: the programs. [`nvrtc`]: compiles them. `modules`: keeps them. [`launch`]: runs them.
//! - [`cache`]: what is found out about a device, on disk. [`processors`]: how much it runs at once.
//! - [`library`], [`driver`]: shared objects and what is called in them. `scoped`: settings of a thread.

pub mod adamw;
pub mod attention;
pub mod boxes;
pub mod cache;
pub mod driver;
pub mod elementwise;
#[cfg(test)]
pub(crate) mod harness;
pub mod launch;
pub mod library;
mod modules;
pub mod nvrtc;
pub mod pages;
pub mod plan;
pub mod processors;
pub mod product;
pub mod sampling;
mod scoped;
pub mod source;

pub use self::source::Element;

use self::{driver::Driver, library::Library};
use crate::torch::{TorchError, without_cudnn_attention};
use std::{
    cell::Cell,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};
use tch::Device;

/// What can go wrong with a GPU.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// A part of CUDA is not there.
    #[error("{what} cannot be used: {why}; {advice}")]
    Missing {
        /// Which one.
        what: &'static str,
        /// What was tried, in the words of the system.
        why: String,
        /// What to do.
        advice: &'static str,
    },
    /// The driver refused a call.
    #[error("the CUDA driver refused {call}: {text}")]
    Driver {
        /// Its name.
        call: &'static str,
        /// In the driver's words.
        text: String,
    },
    /// A kernel does not compile for the device.
    #[error("the kernels '{program}' do not compile: {log}")]
    Compile {
        /// Which ones.
        program: String,
        /// In the compiler's words.
        log: String,
    },
    /// Shapes, types or a device that a kernel is not made for.
    #[error("not for these kernels: {0}")]
    Unsupported(String),
    /// A failure inside libtorch.
    #[error(transparent)]
    Torch(#[from] TorchError),
}

/// Opens libtorch's CUDA half, before anything asks tch for a CUDA device, and the driver. A second
/// call gives the first one's answer.
///
/// # Errors
/// What is missing, and what to do.
pub fn load() -> Result<(), CudaError> {
    static LOADED: OnceLock<Result<(), CudaError>> = OnceLock::new();
    LOADED.get_or_init(open).clone()
}

fn open() -> Result<(), CudaError> {
    Driver::get()?;
    let names: Vec<_> = library::torch_directory()
        .map(|directory| directory.join("libtorch_cuda.so"))
        .into_iter()
        .chain(["libtorch_cuda.so".into()])
        .collect();
    Library::open_global(&names).map_err(|why| CudaError::Missing {
        what: "libtorch's CUDA half (libtorch_cuda.so)",
        why,
        advice: "install torch 2.11.0 for CUDA and put its torch/lib first in LD_LIBRARY_PATH, or \
                 take device = \"cpu\"",
    })?;
    // Its plans are made anew for every length, and some of its kernels have been wrong for single rows
    // (pytorch/pytorch#193893).
    without_cudnn_attention()?;
    if tch::Cuda::device_count() > 0 {
        return Ok(());
    }
    Err(CudaError::Missing {
        what: "CUDA",
        why: "libtorch finds no device".into(),
        advice: "see what nvidia-smi says and whether CUDA_VISIBLE_DEVICES hides it",
    })
}

static SET_ASIDE: AtomicBool = AtomicBool::new(false);

thread_local! {
    static WITHOUT: Cell<bool> = const { Cell::new(false) };
}

/// Does without kernels of our own from now on, in the trainer and in engines that are started then, but for
/// kernels that are called for by name. In tests on this thread, whose harness no longer stands in for a device.
pub fn set_aside() {
    #[cfg(test)]
    return harness::stand_in(false);
    #[cfg(not(test))]
    SET_ASIDE.store(true, Ordering::Relaxed);
}

/// Runs `body` without kernels of our own on this thread.
pub fn without<R>(body: impl FnOnce() -> R) -> R {
    scoped::with(&WITHOUT, true, body)
}

/// Whether this thread does without kernels of our own now.
pub fn are_set_aside() -> bool {
    WITHOUT.get() || SET_ASIDE.load(Ordering::Relaxed)
}

/// Whether kernels of our own take tensors of `device`: of a CUDA device, unless they are set aside; in tests
/// the harness can stand in for one.
pub fn takes(device: Device) -> bool {
    if are_set_aside() {
        return false;
    }
    #[cfg(test)]
    if harness::stands_in() {
        return true;
    }
    device.is_cuda()
}

/// Whether there is a device that tensors and these kernels run on.
pub fn is_available() -> bool {
    load().is_ok() && tch::Cuda::is_available()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_gpu_is_told_what_to_do() {
        match load() {
            Ok(()) => assert!(is_available(), "a device was found"),
            Err(error) => {
                assert!(!is_available());
                assert!(matches!(error, CudaError::Missing { .. }), "{error}");
                assert!(error.to_string().contains("cannot be used"), "{error}");
            }
        }
    }
}
