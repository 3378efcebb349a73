//! Operations of a CUDA device, recorded once and run again as one: then a step costs one launch, not
//! some hundred.
//!
//! A graph runs the same kernels on the same addresses each time. So what it reads and writes has to
//! be there from before it was recorded, or be kept from within; shapes, grids and numbers that were
//! passed by value stay what they were. Weights that are written in place are read anew.

use super::{
    TorchError, check, op_graph_begin, op_graph_end, op_graph_free, op_graph_new, op_graph_pool,
    op_graph_replay, stream::SideStream,
};
use std::{
    ffi::c_void,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    ptr::{NonNull, null_mut},
};

/// Where the tensors of graphs lie. Graphs that share a pool may use each other's memory: none of
/// them runs while another's result is still wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool([u64; 2]);

/// Recorded operations.
#[derive(Debug)]
pub struct Graph(NonNull<c_void>);

// SAFETY: a graph belongs to no thread; it is run by one at a time, because that takes `&mut`.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `body` does on CUDA device `index`, in this thread; nothing of it is run. Tensors
    /// that `body` returns are the graph's results: each run fills them.
    ///
    /// `body` may not wait for the device, copy to or from pageable memory, or be the first to use a
    /// kernel: run it once before, outside of a graph.
    ///
    /// # Errors
    /// If libtorch's CUDA half is not loaded, or `body` did what cannot be recorded.
    ///
    /// # Panics
    /// If `body` does, after the recording has been ended.
    pub fn record<R>(
        index: usize,
        pool: Option<Pool>,
        body: impl FnOnce() -> R,
    ) -> Result<(Self, R), TorchError> {
        let graph = Self::new()?;
        let _side = SideStream::enter(index)?;
        let made = graph.record_here(pool, body)?;
        Ok((graph, made))
    }

    fn new() -> Result<Self, TorchError> {
        let mut raw = null_mut();
        // SAFETY: a place for the answer.
        check(unsafe { op_graph_new(&raw mut raw) })?;
        Ok(Self(NonNull::new(raw).expect("a graph that was made")))
    }

    /// On this thread's current stream, which is not the default one.
    fn record_here<R>(
        &self,
        pool: Option<Pool>,
        body: impl FnOnce() -> R,
    ) -> Result<R, TorchError> {
        let raw = self.0.as_ptr();
        let [first, second] = pool.map_or([0, 0], |Pool(ids)| ids);
        // SAFETY: a graph that records nothing yet.
        check(unsafe { op_graph_begin(raw, first, second) })?;
        let made = catch_unwind(AssertUnwindSafe(body));
        // SAFETY: a graph that records.
        let ended = check(unsafe { op_graph_end(raw) });
        let made = made.unwrap_or_else(|panic| resume_unwind(panic));
        ended.map(|()| made)
    }

    /// Puts the operations into the queue of this thread's current stream.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn run(&mut self) -> Result<(), TorchError> {
        // SAFETY: a graph that was recorded.
        check(unsafe { op_graph_replay(self.0.as_ptr()) })
    }

    /// The pool of the graph's tensors.
    ///
    /// # Errors
    /// If libtorch has none for it.
    pub fn pool(&self) -> Result<Pool, TorchError> {
        let mut ids = [0; 2];
        // SAFETY: two places for the answer.
        check(unsafe { op_graph_pool(self.0.as_ptr(), ids.as_mut_ptr()) })?;
        Ok(Pool(ids))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `op_graph_new`, and freed once.
        if let Err(error) = check(unsafe { op_graph_free(self.0.as_ptr()) }) {
            tracing::error!("a graph cannot be freed: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::{harness::compiled, library::Library};
    use std::ffi::{CStr, c_char};

    /// Names and calling conventions are those of the C++ compiler, for the same declarations.
    #[test]
    fn the_calls_are_those_of_the_class() {
        if crate::cuda::is_available() {
            return eprintln!("skipped: there is a device, and its own class");
        }
        assert!(Graph::new().unwrap_err().0.contains("CUDA half is not loaded"));
        let fake = Library::open_global(&[compiled(include_str!("graph/fake.cpp"))]).unwrap();
        let calls = || {
            // SAFETY: the fake's own function, which gives a C string.
            unsafe {
                let calls = fake.function::<unsafe extern "C" fn() -> *const c_char>("fake_calls");
                CStr::from_ptr(calls.unwrap()()).to_string_lossy().into_owned()
            }
        };
        let mut graph = Graph::new().unwrap();
        assert_eq!(graph.record_here(None, || 5), Ok(5));
        assert_eq!(graph.pool(), Ok(Pool([3, 4])));
        graph.run().unwrap();
        graph.run().unwrap();
        assert_eq!(calls(), "new begin(0, 0, 1) end replay replay ");
        let other = Graph::new().unwrap();
        let body = || panic!("while recording");
        let panicked =
            catch_unwind(AssertUnwindSafe(|| other.record_here::<()>(Some(Pool([7, 9])), body)));
        assert!(panicked.is_err());
        assert_eq!((other.pool(), calls()), (Ok(Pool([7, 9])), "new begin(7, 9, 1) end ".into()));
        let error = other.record_here(Some(Pool([13, 0])), || ()).unwrap_err();
        assert_eq!(error.0, "an unlucky pool");
        drop((graph, other));
        assert_eq!(calls(), "begin(13, 0, 1) gone gone ");
        let error = Graph::record(0, None, || ()).map(|_| ()).unwrap_err();
        assert!(error.0.contains("CUDA half is not loaded"), "{error}");
    }
}
