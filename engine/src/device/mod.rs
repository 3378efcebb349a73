//! Where tensors live, and the decoder's and sampler's work on them in libtorch's own operations.
//!
//! Tensors of f32 on the CPU are *native*: the kernels of this crate compute with them. All others,
//! on a CUDA device or in a narrow type, take the libtorch path, which runs on any device.
//!
//! # Layout
//! - [`placement`]: device and type of a model's tensors, out of a configuration.
//! - [`varlen`]: causal attention of rows that belong to sequences of different lengths.
//! - [`attention`]: attention over pages. [`plan`]: which rows of a step read which pages.
//! - [`pages`]: the pages of all layers. [`graphs`]: decode steps that are recorded.
//! - [`agreement`]: whether kernels of our own can be relied upon. [`tuning`]: the fastest kernels for a
//!   model's products.
//! - [`stats`]: log-prob, entropy and baseline of rows of logits. [`sampling`]: draws from them.
//!   [`drawing`]: draws that the host does not wait for.

pub mod agreement;
pub mod attention;
pub mod drawing;
pub mod graphs;
pub mod pages;
pub mod placement;
pub mod plan;
pub mod sampling;
pub mod stats;
pub mod tuning;
pub mod varlen;

pub use placement::{DeviceName, Dtype, Placement, PlacementError};

use crate::torch::{
    TorchError,
    transfer::{copy_async, pinned},
};
use std::sync::Once;
use tch::{Device, Kind, Tensor};

/// Whether the kernels of this crate compute with such a tensor: f32 on the CPU.
pub fn is_native(tensor: &Tensor) -> bool {
    Placement::of(tensor).is_native()
}

/// The type that sums over numbers of type `kind` are made in.
pub fn wide(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

/// Numbers from the host, on `device`. Does not wait for what the device is doing.
pub fn upload<T: tch::kind::Element>(values: &[T], device: Device) -> Tensor {
    let host = on_host(values, device);
    if device == Device::Cpu { host } else { host.to_device_(device, T::KIND, true, false) }
}

/// Writes numbers from the host over those of a tensor, which has as many. Does not wait for what the
/// device is doing.
///
/// # Panics
/// If it has not, or what the device refuses.
pub fn send<T: tch::kind::Element>(values: &[T], to: &Tensor) {
    let sent = copy_async(&on_host(values, to.device()), to);
    sent.unwrap_or_else(|error| panic!("{error}"));
}

/// Numbers for `device`, where it takes them from.
fn on_host<T: tch::kind::Element>(values: &[T], device: Device) -> Tensor {
    let host = Tensor::from_slice(values);
    if device == Device::Cpu {
        return host;
    }
    pinned(&host).unwrap_or_else(|error| {
        warn_of_pinned_memory(&error);
        host
    })
}

/// A tensor's numbers on their way to the host: they are there once the device has come to the end of what
/// it was given by now.
///
/// # Errors
/// What the device refuses.
pub fn fetch(tensor: &Tensor) -> Result<Tensor, TorchError> {
    let fetch = |waits: bool| {
        let sent = tensor.f_to_device_(Device::Cpu, tensor.kind(), !waits, false);
        sent.map_err(TorchError::from)
    };
    fetch(false).or_else(|error| {
        warn_of_pinned_memory(&error);
        fetch(true)
    })
}

fn warn_of_pinned_memory(error: &TorchError) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| tracing::warn!(%error, "no pinned memory: the host waits for its copies"));
}

/// The bytes of a tensor, row by row, little-endian, as safetensors stores them. Waits for the
/// device.
pub fn bytes(tensor: &Tensor) -> Vec<u8> {
    const { assert!(cfg!(target_endian = "little")) };
    let host = tensor.to_device(Device::Cpu).contiguous();
    let mut bytes = vec![0; host.numel() * host.kind().elt_size_in_bytes()];
    host.copy_data_u8(&mut bytes, host.numel());
    bytes
}

/// The elements of a tensor as f32, row by row, on the host. Waits for the device.
pub fn download(tensor: &Tensor) -> Vec<f32> {
    let host = tensor.to_device(Device::Cpu).to_kind(Kind::Float).contiguous();
    let mut values = vec![0.0; host.numel()];
    host.copy_data(&mut values, host.numel());
    values
}

/// The largest distance of two tensors' numbers, as a part of the largest number that is wanted; infinite
/// where one is no number.
fn distance(got: &Tensor, wanted: &Tensor) -> f64 {
    let [got, wanted] = [got, wanted].map(|t| t.to_kind(Kind::Double));
    let error = (got - &wanted).abs().max().double_value(&[]);
    let distance = error / wanted.abs().max().double_value(&[]);
    if distance.is_nan() { f64::INFINITY } else { distance }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_numbers_are_told_from_rounding() {
        let wanted = Tensor::from_slice(&[4.0f32, -1.0, 0.5]);
        assert_eq!(distance(&wanted, &wanted), 0.0);
        assert_eq!(distance(&(&wanted + 1.0), &wanted), 0.25);
        assert!(distance(&(&wanted * f64::NAN), &wanted).is_infinite());
    }

    #[test]
    fn numbers_go_and_come() {
        let there = upload(&[1.0f32, 2.0, 3.0], Device::Cpu);
        send(&[7.0f32, 8.0], &there.narrow(0, 1, 2));
        let back = fetch(&there.to_kind(Kind::Double)).unwrap();
        assert_eq!(Vec::<f64>::try_from(back).unwrap(), [1.0, 7.0, 8.0]);
    }
}
