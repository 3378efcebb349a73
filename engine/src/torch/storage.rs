//! Memory of a tensor that goes and comes while its handles stay.

use super::{TorchError, check, op_empty_cache, op_give_back, op_take};
use tch::{Device, Tensor};

/// Tensors that are all there is in their storages.
#[derive(Debug)]
pub struct Storages {
    tensors: Vec<Tensor>,
    there: bool,
}

impl Storages {
    /// Handles to `tensors`, which are there.
    pub fn of<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> Self {
        Self { tensors: tensors.map(Tensor::shallow_clone).collect(), there: true }
    }

    /// Frees their memory, and what the allocator holds free beside. Until it is taken again nobody
    /// may read or write what lies in the tensors, through any handle.
    ///
    /// # Errors
    /// A tensor over memory that is not the allocator's.
    pub fn give_back(&mut self) -> Result<(), TorchError> {
        if !std::mem::replace(&mut self.there, false) {
            return Ok(());
        }
        for tensor in &self.tensors {
            // SAFETY: a valid tensor.
            check(unsafe { op_give_back(tensor.as_ptr()) })?;
        }
        self.tensors.first().map_or(Ok(()), |tensor| empty_cache(tensor.device()))
    }

    /// Takes the memory again, filled with zeros, if it was given back. Handles stay valid;
    /// addresses change.
    ///
    /// # Errors
    /// There is not as much. What was taken by then stays.
    pub fn take(&mut self) -> Result<(), TorchError> {
        if self.there {
            return Ok(());
        }
        for tensor in &self.tensors {
            // SAFETY: a valid tensor.
            check(unsafe { op_take(tensor.as_ptr()) })?;
            let _ = crate::torch::no_grad(|| tensor.shallow_clone().zero_());
        }
        self.there = true;
        Ok(())
    }
}

/// What libtorch's allocator holds free goes back to the device; on the CPU it holds nothing.
///
/// # Errors
/// What libtorch refuses.
pub fn empty_cache(device: Device) -> Result<(), TorchError> {
    if !device.is_cuda() {
        return Ok(());
    }
    // SAFETY: frees what nobody uses.
    check(unsafe { op_empty_cache() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_one_storage() {
        let whole = Tensor::from_slice(&[1f32, 2.0, 3.0]);
        let parts = [whole.narrow(0, 0, 1), whole.narrow(0, 1, 2)];
        let mut storages = Storages::of(parts.iter());
        storages.give_back().unwrap();
        assert!(whole.data_ptr().is_null());
        storages.take().unwrap();
        assert_eq!(Vec::<f32>::try_from(&whole).unwrap(), [0.0; 3]);
        let _ = parts[1].shallow_clone().fill_(3.0);
        assert_eq!(Vec::<f32>::try_from(&whole).unwrap(), [0.0, 3.0, 3.0]);
    }

    #[test]
    fn handles_outlive_the_memory() {
        let tensor = Tensor::from_slice(&[1f32, 2.0]);
        let handle = tensor.detach();
        let mut storages = Storages::of([&tensor].into_iter());
        storages.give_back().unwrap();
        assert!(tensor.data_ptr().is_null() && handle.data_ptr().is_null());
        storages.give_back().unwrap();
        storages.take().unwrap();
        assert_eq!(Vec::<f32>::try_from(&handle).unwrap(), [0.0, 0.0]);
        let _ = tensor.shallow_clone().fill_(3.0);
        storages.take().unwrap();
        assert_eq!(Vec::<f32>::try_from(&handle).unwrap(), [3.0, 3.0]);
    }
}
