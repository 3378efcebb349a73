//! Work on libtorch's own threads, so that kernels and matrix products never compete for cores.

use super::{check, op_parallel};
use std::{
    any::Any,
    ffi::c_void,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

struct Job<'a> {
    work: &'a (dyn Fn(usize) + Sync),
    items: usize,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Calls `work(i)` once for every `i < items`, on libtorch's intra-op threads; returns when all
/// are done. Threads take items one by one, so items need not cost the same.
///
/// # Panics
/// With the first panic of `work`, after the other threads have stopped.
pub fn for_each(items: usize, work: &(dyn Fn(usize) + Sync)) {
    let workers = items.min(tch::get_num_threads().max(1) as usize);
    if workers <= 1 {
        (0..items).for_each(work);
        return;
    }
    let mut job = Job { work, items, next: AtomicUsize::new(0), panic: Mutex::new(None) };
    // SAFETY: `job` outlives the call, which returns only when every worker has returned.
    let answer = unsafe { op_parallel(workers as i64, run, (&raw mut job).cast()) };
    if let Some(panic) = job.panic.into_inner().unwrap_or_else(|poison| poison.into_inner()) {
        resume_unwind(panic);
    }
    check(answer).expect("libtorch's thread pool");
}

/// One worker: takes items until none is left. Panics must not cross into C++.
unsafe extern "C" fn run(context: *mut c_void, _worker: i64) {
    // SAFETY: `context` is the `Job` of `for_each`, which is only shared by reference here.
    let job = unsafe { &*context.cast::<Job<'_>>() };
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        loop {
            let item = job.next.fetch_add(1, Ordering::Relaxed);
            if item >= job.items {
                break;
            }
            (job.work)(item);
        }
    }));
    if let Err(panic) = outcome {
        job.next.store(job.items, Ordering::Relaxed);
        job.panic.lock().unwrap_or_else(|poison| poison.into_inner()).get_or_insert(panic);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_runs_once() {
        for items in [0, 1, 2, 7, 1000] {
            let hits: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
            for_each(items, &|i| {
                hits[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(hits.iter().all(|hit| hit.load(Ordering::Relaxed) == 1), "{items} items");
        }
    }

    #[test]
    fn a_panic_reaches_the_caller() {
        let caught = catch_unwind(|| {
            for_each(100, &|i| {
                if i == 57 {
                    panic!("item {i}")
                }
            })
        });
        let panic = caught.expect_err("the panic is passed on");
        assert_eq!(panic.downcast_ref::<String>().map(String::as_str), Some("item 57"));
        every_item_runs_once();
    }
}
