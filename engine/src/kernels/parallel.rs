//! The threads that kernels run on: as many as libtorch may use, the calling one among them.
//!
//! A kernel lasts microseconds and the next one follows at once, so the threads wait awake for a
//! while before they go to sleep. libtorch's own (libgomp's) do so only while no more threads exist
//! than cores, which is never so where an engine and a trainer both call it; and a thread that must
//! be woken costs a product as much time as half of the product.
//!
//! One caller at a time has the threads. Another one, and a kernel inside of a kernel, does its work
//! alone, so no more threads compute than there are callers and cores. No result depends on the
//! number of threads.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    ptr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering},
    },
    thread::Thread,
    time::{Duration, Instant},
};

/// How long a thread waits awake for the next kernel.
const AWAKE: Duration = Duration::from_micros(300);
/// Looks at the state between two looks at the clock.
const LOOKS: usize = 64;

/// Calls `work(i)` once for every `i < items`, on the calling thread and the others; returns when
/// all are done. Threads take items one by one, so items need not cost the same.
///
/// # Panics
/// With the first panic of `work`, after the other threads have stopped.
pub fn for_each(items: usize, work: &(dyn Fn(usize) + Sync)) {
    let threads = items.min(tch::get_num_threads().max(1) as usize);
    let crew = if threads > 1 { Crew::take(threads - 1) } else { None };
    let Some(crew) = crew else { return (0..items).for_each(work) };
    let job = Job { work, items, next: AtomicUsize::new(0), panic: Mutex::new(None) };
    crew.run(&job, threads - 1);
    drop(crew);
    if let Some(panic) = job.panic.into_inner().unwrap_or_else(|poison| poison.into_inner()) {
        resume_unwind(panic);
    }
}

/// What is to be done.
struct Job<'a> {
    work: &'a (dyn Fn(usize) + Sync),
    items: usize,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Job<'_> {
    /// Takes items until none is left.
    fn work(&self) {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let item = self.next.fetch_add(1, Ordering::Relaxed);
                if item >= self.items {
                    break;
                }
                (self.work)(item);
            }
        }));
        if let Err(panic) = outcome {
            self.next.store(self.items, Ordering::Relaxed);
            self.panic.lock().unwrap_or_else(|poison| poison.into_inner()).get_or_insert(panic);
        }
    }
}

/// What caller and threads share. The state is the number of threads that are in the job (the lower
/// half), whether more may join (`OPEN`), and above it a count of jobs.
struct Shared {
    state: AtomicU64,
    /// The job; valid while the state is open or a thread is in it.
    job: AtomicPtr<Job<'static>>,
    /// Threads that may join it.
    seats: AtomicUsize,
}

const OPEN: u64 = 1 << 32;
const JOBS: u64 = OPEN << 1;
const INSIDE: u64 = OPEN - 1;

impl Shared {
    /// The life of thread `index`.
    fn serve(&self, index: usize) {
        let mut seen = 0;
        loop {
            let state = self.next_job(seen);
            seen = state / JOBS;
            if index < self.seats.load(Ordering::Relaxed) && self.join(seen) {
                // SAFETY: it joined, so the caller waits for it before the job ends.
                unsafe { &*self.job.load(Ordering::Relaxed) }.work();
                self.state.fetch_sub(1, Ordering::Release);
            }
        }
    }

    /// Waits for a job after number `seen`, awake at first.
    fn next_job(&self, seen: u64) -> u64 {
        let started = Instant::now();
        loop {
            for _ in 0..LOOKS {
                let state = self.state.load(Ordering::Acquire);
                if state & OPEN != 0 && state / JOBS != seen {
                    return state;
                }
                std::hint::spin_loop();
            }
            if started.elapsed() > AWAKE {
                // Returns at once if a caller has called since the last time.
                std::thread::park();
            }
        }
    }

    /// Joins job number `job`, if it is still open.
    fn join(&self, job: u64) -> bool {
        let enter = |state: u64| (state & OPEN != 0 && state / JOBS == job).then_some(state + 1);
        self.state.fetch_update(Ordering::AcqRel, Ordering::Relaxed, enter).is_ok()
    }
}

/// The threads beside the caller's, held by one caller.
struct Crew(MutexGuard<'static, Vec<Thread>>);

struct Pool {
    shared: Arc<Shared>,
    threads: Mutex<Vec<Thread>>,
}

fn pool() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(|| Pool {
        shared: Arc::new(Shared {
            state: AtomicU64::new(0),
            job: AtomicPtr::new(ptr::null_mut()),
            seats: AtomicUsize::new(0),
        }),
        threads: Mutex::new(Vec::new()),
    })
}

impl Crew {
    /// The threads, at least `count` where the system grants them; none if another caller has them.
    fn take(count: usize) -> Option<Self> {
        let pool = pool();
        let mut threads = pool.threads.try_lock().ok()?;
        while threads.len() < count {
            let (shared, index) = (pool.shared.clone(), threads.len());
            let thread = std::thread::Builder::new().name(format!("kernels-{}", index + 1));
            let Ok(handle) = thread.spawn(move || shared.serve(index)) else { break };
            threads.push(handle.thread().clone());
        }
        Some(Self(threads))
    }

    /// Runs a job on the calling thread and up to `seats` others.
    fn run(&self, job: &Job<'_>, seats: usize) {
        let shared = &pool().shared;
        shared.job.store(ptr::from_ref(job).cast_mut().cast(), Ordering::Relaxed);
        shared.seats.store(seats, Ordering::Relaxed);
        let number = shared.state.load(Ordering::Relaxed) / JOBS + 1;
        shared.state.store((number * JOBS) | OPEN, Ordering::Release);
        // Nothing but an atomic exchange where the thread is awake.
        self.0.iter().take(seats).for_each(Thread::unpark);
        job.work();
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        while shared.state.load(Ordering::Acquire) & INSIDE != 0 {
            // A thread that has lost its core to another process needs one.
            std::thread::yield_now();
        }
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
    fn callers_and_nested_calls_do_not_wait_for_each_other() {
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        for_each(5, &|i| {
                            for_each(3, &|j| {
                                total.fetch_add(i * 3 + j, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 500 * (0..15).sum::<usize>());
    }

    #[test]
    fn sleeping_threads_are_woken() {
        for _ in 0..3 {
            std::thread::sleep(AWAKE * 5);
            let met = AtomicUsize::new(0);
            let deadline = Instant::now() + Duration::from_secs(10);
            if tch::get_num_threads() < 2 {
                return;
            }
            // Each of two items waits for the other one, unless another caller has the threads.
            for_each(2, &|_| {
                met.fetch_add(1, Ordering::AcqRel);
                let alone = || Instant::now() > deadline;
                while met.load(Ordering::Acquire) < 2 && !alone() {
                    std::thread::yield_now();
                    if pool().shared.state.load(Ordering::Relaxed) & OPEN == 0 {
                        break;
                    }
                }
            });
            assert!(Instant::now() < deadline, "a thread slept through its job");
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
