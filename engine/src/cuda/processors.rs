//! The multiprocessors of a device, and how much of a kernel they run at once.

use super::{
    CudaError,
    driver::{Attribute, Driver},
};

/// What the system takes of a block's shared memory.
const TAKEN: usize = 1024;

/// The multiprocessors of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Processors {
    /// How many there are.
    pub count: usize,
    /// Bytes of shared memory of each.
    pub shared: usize,
    /// Bytes of it that one block may have.
    pub shared_of_block: usize,
}

impl Processors {
    /// Of CUDA device `index`.
    ///
    /// # Errors
    /// If there is none.
    pub fn of(index: usize) -> Result<Self, CudaError> {
        let driver = Driver::get()?;
        let number = |attribute| driver.attribute(index, attribute).map(|number| number as usize);
        Ok(Self {
            count: number(Attribute::Multiprocessors)?,
            shared: number(Attribute::SharedMemory)?,
            shared_of_block: number(Attribute::SharedMemoryOfBlock)?,
        })
    }

    /// Blocks with so many bytes of shared memory that run at once, of which a multiprocessor holds
    /// `most` at most; none if one alone has not enough.
    pub fn at_once(&self, bytes: usize, most: u32) -> usize {
        if bytes > self.shared_of_block {
            return 0;
        }
        self.count * (self.shared / (bytes + TAKEN)).min(most as usize)
    }
}
