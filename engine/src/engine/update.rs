//! New weights, applied between two steps.

use super::{OnUpdate, hold::Reply, worker::Worker};
use crate::panic::text;
use onpolicy_plugin_api::{EngineError, Memory};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::Instant,
};
use tch::Tensor;

/// Writes the weights; an error means that nothing has changed.
pub type Write = Box<dyn FnOnce() -> Result<(), String> + Send>;

/// How the weights change.
pub enum Change {
    /// The owner writes them where they lie.
    Write(Write),
    /// All of them are copied from these, which have the same names and shapes.
    Load(Vec<(String, Tensor)>),
    /// They become random numbers.
    Reset,
}

/// New weights that wait for the end of the step in progress.
pub struct Update {
    pub change: Change,
    /// The version to be; one more than before if none.
    pub version: Option<u64>,
    pub reply: Reply<u64>,
}

impl Worker {
    /// Applies the updates that wait, unless they wait for running samples to end.
    pub(super) fn apply_updates(&mut self) {
        let drain = self.on_update == OnUpdate::Drain && !self.updates.is_empty();
        self.scheduler.hold_admissions(drain || !self.hold.admits());
        if drain && !self.is_drained() {
            if self.hold.keeps() {
                self.refuse_updates();
            }
            return;
        }
        while let Some(update) = self.updates.pop_front() {
            let started = Instant::now();
            let answer = self.apply(update.change, update.version);
            metrics::histogram!("onpolicy_weight_update_seconds").record(started.elapsed());
            if self.runner.copied_bytes() > 0 {
                metrics::histogram!("onpolicy_weight_refresh_seconds").record(self.refresh);
            }
            self.publish();
            // The updater may have gone away; the update stands.
            let _ = update.reply.send(answer);
        }
        self.scheduler.hold_admissions(!self.hold.admits());
    }

    /// With `drain`, running samples see one version only, and those of a pause do not end.
    fn refuse_updates(&mut self) {
        for update in self.updates.drain(..) {
            let why = "on_update is \"drain\" and a pause keeps running samples, which this update \
                       would wait for; resume first, or pause with mode wait or abort";
            let _ = update.reply.send(Err(EngineError::unavailable(why)));
        }
    }

    fn apply(&mut self, change: Change, version: Option<u64>) -> Result<u64, EngineError> {
        self.check_change(&change)?;
        let empty = match change {
            Change::Write(_) => self.shared.status.empty.get(),
            Change::Load(_) => false,
            Change::Reset => true,
        };
        let write = || -> Result<(), String> {
            // Gradients come from another thread's stream, and weights are read there.
            self.runner.synchronize()?;
            match change {
                Change::Write(write) => write()?,
                Change::Load(tensors) => self.runner.load(&tensors),
                Change::Reset => self.runner.reset_weights(),
            }
            self.refresh = self.runner.refresh();
            self.runner.synchronize()
        };
        let written = catch_unwind(AssertUnwindSafe(write));
        written.unwrap_or_else(|panic| Err(text(panic.as_ref()))).map_err(EngineError::Internal)?;
        let version = version.unwrap_or_else(|| self.shared.version.get() + 1);
        self.shared.version.set(version);
        self.shared.status.empty.set(empty);
        self.scheduler.change_version(version, self.on_update == OnUpdate::Recompute);
        Ok(version)
    }

    fn check_change(&self, change: &Change) -> Result<(), EngineError> {
        if !self.hold.has(Memory::Weights) {
            let why =
                "the weights' memory is given back; wake the engine up with tag weights first";
            return Err(EngineError::unavailable(why));
        }
        match change {
            Change::Write(_) if self.shared.status.empty.get() => self.shared.status.ready(),
            Change::Reset if self.shared.status.trained.get() => {
                Err(EngineError::unsupported("resetting weights that a trainer works on"))
            }
            _ => Ok(()),
        }
    }
}
