//! Matrices that kernels read in boxes, which the hardware copies (from compute capability 9.0 on).

use super::{CudaError, driver::Driver, source::Element};
use tch::{Device, Tensor};

/// Columns of a box: 128 bytes of 16-bit numbers, as many as its rows may have to be read from shared
/// memory by the tensor cores.
pub const COLUMNS: usize = 64;

/// A matrix and the boxes that it is read in, as a kernel takes it: `CUtensorMap`.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy)]
pub struct Boxes([u64; 16]);

impl Boxes {
    /// Of a contiguous `matrix` `[M, K]` of 16-bit numbers, K a multiple of 8; boxes have so many rows, 256
    /// at most.
    ///
    /// # Errors
    /// Another tensor, or what the driver refuses.
    pub fn of(matrix: &Tensor, rows: usize) -> Result<Self, CudaError> {
        let refused = || CudaError::Unsupported(format!("boxes of {rows} rows of {matrix:?}"));
        let element = Element::of(matrix.kind()).filter(|&element| element != Element::F32);
        let element = element.ok_or_else(refused)?;
        let size: [u64; 2] = match matrix.size2() {
            Ok((height, width)) if height > 0 && width > 0 && width % 8 == 0 => {
                [width as u64, height as u64]
            }
            _ => return Err(refused()),
        };
        if !matrix.is_contiguous() || !(1..=256).contains(&rows) {
            return Err(refused());
        }
        let mut made = Self([0; 16]);
        match matrix.device() {
            Device::Cuda(_) => {
                let sizes = (size, [COLUMNS as u32, rows as u32]);
                Driver::get()?.describe_boxes(
                    &mut made.0,
                    element,
                    matrix.data_ptr() as usize,
                    sizes,
                )?;
            }
            #[cfg(test)]
            // As harness/machine.h has it.
            Device::Cpu => {
                let at = matrix.data_ptr() as u64;
                made.0[..5].copy_from_slice(&[at, size[0], size[1], size[0], rows as u64]);
            }
            _ => return Err(refused()),
        }
        Ok(made)
    }
}
