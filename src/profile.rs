//! Prints where the engine's time goes.

use onpolicy_engine::{engine::EngineHandle, profile::Profile};
use std::time::{Duration, Instant};

/// How often a server that is at work prints.
const INTERVAL: Duration = Duration::from_secs(10);

/// Prints the engine's profile to standard error; nothing if it keeps none.
pub struct Printer {
    engine: Option<EngineHandle>,
    printed: Option<Profile>,
    at: Instant,
}

impl Printer {
    /// A printer of what the engine does from now on; without a native engine it prints nothing.
    pub fn new(engine: Option<&EngineHandle>) -> Self {
        let printed = engine.and_then(|engine| engine.profile().ok().flatten());
        Self { printed, engine: engine.cloned(), at: Instant::now() }
    }

    /// Prints what was done since it last printed, if it is time and there was a step.
    pub fn tick(&mut self) {
        if self.printed.is_some() && self.at.elapsed() >= INTERVAL {
            self.print();
        }
    }

    /// Prints what was done since it last printed, if there was a step.
    pub fn print(&mut self) {
        self.at = Instant::now();
        let now = self.engine.as_ref().and_then(|engine| engine.profile().ok().flatten());
        let (Some(printed), Some(now)) = (self.printed, now) else { return };
        if now.steps > printed.steps {
            eprint!("engine profile: {}", now.since(&printed));
            self.printed = Some(now);
        }
    }
}
