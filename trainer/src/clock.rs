//! How long the parts of something take.

use std::time::{Duration, Instant};

/// Times the phases of a step.
#[derive(Debug)]
pub struct Clock {
    start: Instant,
    lap: Instant,
}

impl Clock {
    /// A clock that shows `seconds` already.
    pub fn start(seconds: f64) -> Self {
        let start = Instant::now() - Duration::from_secs_f64(seconds);
        Self { start, lap: start }
    }

    /// Seconds since the last lap.
    pub fn lap(&mut self) -> f64 {
        let now = Instant::now();
        let seconds = now.duration_since(self.lap).as_secs_f64();
        self.lap = now;
        seconds
    }

    /// Seconds since the start.
    pub fn total(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }
}
