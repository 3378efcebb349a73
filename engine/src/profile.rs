//! Where a thread's time goes, by phase of a step. Each moment counts for one phase only: a phase
//! inside another interrupts it.

use crate::torch::stream::synchronize;
use std::{cell::RefCell, fmt, time::Instant};

/// What a thread is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Waiting for something to do.
    Idle,
    /// Commands, admissions, block tables: what to compute next.
    Schedule,
    /// Token ids, positions and slots of the batch, and rows of the embedding.
    Gather,
    /// A decode step recorded as a graph, from the embedding to the last norm.
    Recorded,
    /// Norms, rotary embedding, gate and residual sums.
    Elementwise,
    /// Linear layers.
    Linear,
    /// Attention over pages, K and V written to them included.
    Attention,
    /// The output head.
    Head,
    /// Statistics and draws.
    Sampling,
    /// Events to the requests' sinks, and the bookkeeping of new tokens.
    Delivery,
    /// Weight updates.
    Update,
}

impl Phase {
    /// All phases, in a step's order.
    pub const ALL: [Self; 11] = [
        Self::Idle,
        Self::Schedule,
        Self::Gather,
        Self::Recorded,
        Self::Elementwise,
        Self::Linear,
        Self::Attention,
        Self::Head,
        Self::Sampling,
        Self::Delivery,
        Self::Update,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Schedule => "schedule",
            Self::Gather => "gather",
            Self::Recorded => "recorded step",
            Self::Elementwise => "norm, rope, gate",
            Self::Linear => "linear layers",
            Self::Attention => "attention",
            Self::Head => "head",
            Self::Sampling => "sampling",
            Self::Delivery => "delivery",
            Self::Update => "weight update",
        }
    }
}

/// Time per phase.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct Profile {
    /// Seconds, in the order of [`Phase::ALL`].
    seconds: [f64; Phase::ALL.len()],
    /// Engine steps.
    pub steps: u64,
    /// Rows computed in them.
    pub rows: u64,
}

impl Profile {
    /// Seconds spent in `phase`.
    pub fn seconds(&self, phase: Phase) -> f64 {
        self.seconds[phase as usize]
    }

    /// Seconds spent in all phases but the idle one.
    pub fn busy_seconds(&self) -> f64 {
        self.seconds.iter().sum::<f64>() - self.seconds(Phase::Idle)
    }

    /// What was added since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            seconds: std::array::from_fn(|i| self.seconds[i] - earlier.seconds[i]),
            steps: self.steps - earlier.steps,
            rows: self.rows - earlier.rows,
        }
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (busy, steps) = (self.busy_seconds(), self.steps.max(1) as f64);
        writeln!(
            f,
            "{} steps of {:.1} rows, {:.3} ms each ({:.1} s busy, {:.1} s idle)",
            self.steps,
            self.rows as f64 / steps,
            busy * 1e3 / steps,
            busy,
            self.seconds(Phase::Idle)
        )?;
        for phase in Phase::ALL.into_iter().filter(|&phase| phase != Phase::Idle) {
            let seconds = self.seconds(phase);
            let share = 100.0 * seconds / busy.max(f64::MIN_POSITIVE);
            let name = phase.name();
            writeln!(f, "  {name:<17}{:>10.3} ms a step {share:>6.1} %", seconds * 1e3 / steps)?;
        }
        Ok(())
    }
}

struct Clock {
    /// CUDA device whose work is waited for at the end of each phase.
    device: Option<usize>,
    profile: Profile,
    phase: Phase,
    since: Instant,
}

impl Clock {
    /// Charges the time until now to the current phase and goes on in `phase`.
    fn switch(&mut self, phase: Phase) -> Phase {
        // A device that fails will say so where its results are asked for.
        let _ = self.device.map(synchronize);
        let now = Instant::now();
        self.profile.seconds[self.phase as usize] += (now - self.since).as_secs_f64();
        self.since = now;
        std::mem::replace(&mut self.phase, phase)
    }
}

thread_local! {
    static CLOCK: RefCell<Option<Clock>> = const { RefCell::new(None) };
}

/// Starts the clock of the calling thread, in [`Phase::Idle`]. Without this nothing is timed. At the end
/// of each phase the work of a CUDA `device`, if one is given, is waited for.
pub fn start(device: Option<usize>) {
    let clock =
        Clock { device, profile: Profile::default(), phase: Phase::Idle, since: Instant::now() };
    CLOCK.set(Some(clock));
}

/// Runs `work` without a look at the clock, or a wait for a device, in between.
pub fn untimed<T>(work: impl FnOnce() -> T) -> T {
    let clock = CLOCK.take();
    let made = work();
    CLOCK.set(clock);
    made
}

/// The calling thread's times so far; none if its clock was not started.
pub fn read() -> Option<Profile> {
    CLOCK.with_borrow_mut(|clock| {
        clock.as_mut().map(|clock| {
            clock.switch(clock.phase);
            clock.profile
        })
    })
}

/// Counts an engine step of so many rows.
pub fn count_step(rows: usize) {
    CLOCK.with_borrow_mut(|clock| {
        if let Some(clock) = clock {
            clock.profile.steps += 1;
            clock.profile.rows += rows as u64;
        }
    });
}

/// Runs `work`, whose time counts for `phase`.
pub fn timed<T>(phase: Phase, work: impl FnOnce() -> T) -> T {
    let _back = Back(switch(phase));
    work()
}

fn switch(phase: Phase) -> Option<Phase> {
    CLOCK.with_borrow_mut(|clock| clock.as_mut().map(|clock| clock.switch(phase)))
}

/// Goes back to the phase before, also when the work panics.
struct Back(Option<Phase>);

impl Drop for Back {
    fn drop(&mut self) {
        if let Some(phase) = self.0 {
            switch(phase);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        panic::{AssertUnwindSafe, catch_unwind},
        thread::sleep,
        time::Duration,
    };

    fn pause(ms: u64) {
        sleep(Duration::from_millis(ms));
    }

    #[test]
    fn every_moment_counts_for_the_innermost_phase() {
        assert_eq!(read(), None);
        timed(Phase::Linear, || pause(1));
        start(None);
        timed(Phase::Schedule, || {
            pause(20);
            timed(Phase::Linear, || pause(60));
            let panic = catch_unwind(AssertUnwindSafe(|| timed(Phase::Head, || panic!("stop"))));
            assert!(panic.is_err());
            pause(20);
        });
        count_step(7);
        let profile = read().unwrap();
        let within = |phase, low, high| {
            let seconds = profile.seconds(phase);
            assert!((low..high).contains(&seconds), "{phase:?}: {seconds}");
        };
        within(Phase::Schedule, 0.04, 0.06);
        within(Phase::Linear, 0.06, 0.08);
        assert_eq!((profile.seconds(Phase::Attention), profile.steps, profile.rows), (0.0, 1, 7));
        let total: f64 = Phase::ALL.iter().map(|&phase| profile.seconds(phase)).sum();
        assert!((total - profile.seconds(Phase::Idle) - profile.busy_seconds()).abs() < 1e-12);
        assert_eq!(read().unwrap().since(&profile).steps, 0);
        assert!(profile.to_string().starts_with("1 steps of 7.0 rows"));
    }
}
