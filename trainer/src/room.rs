//! How much of a batch goes through the model at a time: less, from then on, where memory has not
//! sufficed.

use crate::error::TrainError;
use onpolicy_engine::{
    panic::message,
    torch::{TorchError, is_out_of_memory, memory::trim, storage::empty_cache},
};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use tch::Device;

/// Rows of one forward and backward pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    rows: usize,
    failures: usize,
}

/// What there is to choose from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Rows of the longest sample, with its prompt: no pass can have fewer.
    pub least: usize,
    /// Rows of everything: no pass has more.
    pub most: usize,
}

impl Room {
    /// Room for `rows` rows, as far as is known.
    pub fn new(rows: usize) -> Self {
        Self { rows, failures: 0 }
    }

    /// Rows that a pass may have.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// How often memory has not sufficed since this was last asked.
    pub fn take_failures(&mut self) -> usize {
        std::mem::take(&mut self.failures)
    }

    /// `work` with the rows that a pass may have. Where memory does not suffice it is called again
    /// with half of them, as long as that makes passes smaller, and the smaller number stays.
    ///
    /// # Errors
    /// Memory that does not suffice for a single sample, or another failure of `work`.
    pub fn run<T>(
        &mut self,
        span: Span,
        mut work: impl FnMut(usize) -> Result<T, TorchError>,
    ) -> Result<T, TrainError> {
        loop {
            let error = match attempt(|| work(self.rows)) {
                Ok(value) => return Ok(value),
                Err(error) if !is_out_of_memory(&error.0) => return Err(error.into()),
                Err(error) => error,
            };
            self.failures += 1;
            give_back();
            let rows = self.rows.min(span.most);
            let half = (rows / 2).max(span.least);
            if half >= rows {
                return Err(too_long(span.least, &error));
            }
            self.rows = half;
            tracing::warn!(rows, half, %error, "memory does not suffice; going on with smaller passes");
        }
    }
}

/// Gives what the allocators hold free back, so that what is asked for next finds whole pieces.
fn give_back() {
    trim();
    // Should that fail, the next pass will say so.
    let _ = empty_cache(Device::cuda_if_available());
}

fn too_long(rows: usize, error: &TorchError) -> TrainError {
    TrainError::Refused(format!(
        "memory does not suffice for a pass over one sample of {rows} tokens, and there is nothing \
         smaller: set train.activation_checkpointing = true, lower rollout.max_new_tokens or \
         engine.kv_memory_mb ({error})"
    ))
}

/// Runs `work`; a panic that says that memory did not suffice becomes an error, as tch's functions
/// panic with the text of libtorch's error.
fn attempt<T>(work: impl FnOnce() -> Result<T, TorchError>) -> Result<T, TorchError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| match message(&*panic) {
        Some(text) if is_out_of_memory(text) => Err(TorchError(text.to_string())),
        _ => resume_unwind(panic),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Kind, Tensor};

    const SPAN: Span = Span { least: 10, most: 100 };

    /// Fails as a device does where a pass has more rows than `fit`.
    fn run(room: &mut Room, fit: usize) -> (Vec<usize>, Result<usize, TrainError>) {
        let mut tried = Vec::new();
        let result = room.run(SPAN, |rows| {
            tried.push(rows);
            match rows <= fit {
                true => Ok(rows),
                false => Err(TorchError("CUDA out of memory. Tried to allocate 2 GiB".into())),
            }
        });
        (tried, result)
    }

    #[test]
    fn passes_become_smaller_and_stay_so() {
        let mut room = Room::new(4096);
        let (tried, result) = run(&mut room, 30);
        // 100 rows in all: half of 4096 would make the same passes.
        assert_eq!((tried, result.expect("fits")), (vec![4096, 50, 25], 25));
        assert_eq!((room.take_failures(), room.take_failures()), (2, 0));
        let (tried, _) = run(&mut room, 30);
        assert_eq!((tried, room.rows(), room.take_failures()), (vec![25], 25, 0));
    }

    #[test]
    fn a_sample_that_does_not_fit_is_an_error_that_says_what_to_do() {
        let (tried, result) = run(&mut Room::new(64), 9);
        assert_eq!(tried, [64, 32, 16, 10]);
        let error = result.expect_err("nothing smaller").to_string();
        assert!(error.contains("one sample of 10 tokens"), "{error}");
        assert!(error.contains("activation_checkpointing"), "{error}");
    }

    #[test]
    fn what_libtorch_panics_with_is_understood() {
        let mut room = Room::new(100);
        let result = room.run(SPAN, |rows| {
            if rows > 50 {
                let _ = Tensor::empty([1 << 50], (Kind::Float, Device::Cpu));
            }
            Ok(rows)
        });
        assert_eq!(result.expect("a second try"), 50);
        for text in
            ["CUDA out of memory.", "CUBLAS_STATUS_ALLOC_FAILED when calling", "OUT_OF_MEMORY"]
        {
            assert!(is_out_of_memory(text), "{text}");
        }
    }

    #[test]
    fn other_failures_are_passed_on() {
        let mut room = Room::new(100);
        let error = room.run(SPAN, |_| Err::<(), _>(TorchError("shapes".into())));
        assert_eq!(error.expect_err("an error").to_string(), "libtorch: shapes");
        let panic = catch_unwind(AssertUnwindSafe(|| {
            room.run(SPAN, |_| -> Result<(), _> { panic!("a bug") })
        }));
        assert_eq!(message(&*panic.expect_err("a panic")), Some("a bug"));
        assert_eq!(room.take_failures(), 0);
    }
}
