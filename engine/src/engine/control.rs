//! What the engine's owner may ask of its thread, done between two steps.

use super::{hold::Reply, worker::Worker};
use onpolicy_plugin_api::{EngineError, Memory, PauseMode, RequestId, Sleep};

/// A command of the engine's owner.
pub enum Control {
    /// Take no more steps; see [`PauseMode`].
    Pause { mode: PauseMode, clear_cache: bool, reply: Reply<()> },
    /// Go on.
    Resume { reply: Reply<()> },
    /// End all requests.
    AbortAll { reply: Reply<()> },
    /// Forget the KV of earlier requests.
    ResetPrefixCache { reply: Reply<()> },
    /// Give memory back.
    Sleep { depth: Sleep, reply: Reply<()> },
    /// Take memory again.
    WakeUp { memory: Vec<Memory>, reply: Reply<()> },
    /// Hash the weights.
    Checksums { reply: Reply<Vec<(String, u64)>> },
}

impl Worker {
    /// Does what the owner asks.
    pub(super) fn control(&mut self, command: Control) {
        // Whoever asked may have gone away; what was done stands.
        match command {
            Control::Pause { mode, clear_cache, reply } => self.pause(mode, clear_cache, reply),
            Control::Resume { reply } => {
                self.hold.resume();
                self.hold.show(&self.shared.status);
                let _ = reply.send(Ok(()));
            }
            Control::AbortAll { reply } => {
                self.abort_all();
                let _ = reply.send(Ok(()));
            }
            Control::ResetPrefixCache { reply } => {
                self.scheduler.reset_prefix_cache();
                let _ = reply.send(Ok(()));
            }
            Control::Sleep { depth, reply } => {
                let slept = self.sleep(depth);
                self.hold.show(&self.shared.status);
                let _ = reply.send(slept);
            }
            Control::WakeUp { memory, reply } => {
                let woken = self.wake_up(&memory);
                self.hold.show(&self.shared.status);
                let _ = reply.send(woken);
            }
            Control::Checksums { reply } => {
                let _ = reply.send(self.checksums());
            }
        }
        self.hold.show(&self.shared.status);
    }

    fn pause(&mut self, mode: PauseMode, clear_cache: bool, reply: Reply<()>) {
        self.hold.pause(mode);
        self.hold.show(&self.shared.status);
        match mode {
            PauseMode::Wait => return self.hold.wait(clear_cache, reply),
            PauseMode::Abort => self.abort_all(),
            PauseMode::Keep => {}
        }
        if clear_cache {
            self.scheduler.reset_prefix_cache();
        }
        let _ = reply.send(Ok(()));
    }

    /// Answers pauses that waited for the running samples, once those have ended.
    pub(super) fn answer_pauses(&mut self) {
        if self.is_drained() {
            self.hold.drained(|| self.scheduler.reset_prefix_cache());
        }
    }

    fn abort_all(&mut self) {
        let ids: Vec<RequestId> = self.live.keys().copied().collect();
        ids.into_iter().for_each(|id| self.abort(id, None));
    }

    fn sleep(&mut self, depth: Sleep) -> Result<(), EngineError> {
        if depth == Sleep::Weights && self.shared.status.trained.get() {
            let what = "giving back weights that a trainer works on (sleep level 2); level 1 gives \
                        back the pages of K and V";
            return Err(EngineError::unsupported(what));
        }
        self.abort_all();
        self.hold.sleep(match depth {
            Sleep::Paused => &[],
            Sleep::KvCache => &[Memory::KvCache],
            Sleep::Weights => &[Memory::KvCache, Memory::Weights],
        });
        if depth == Sleep::Paused {
            return Ok(());
        }
        self.scheduler.reset_prefix_cache();
        let mut given = self.runner.give_back_pages();
        if depth == Sleep::Weights {
            self.shared.status.empty.set(true);
            given &= self.runner.give_back_weights();
        }
        let kept = || EngineError::Internal("the system did not take all memory back".into());
        given.then_some(()).ok_or_else(kept)
    }

    /// Takes memory again; on an error the engine goes on sleeping, and may be woken later.
    fn wake_up(&mut self, memory: &[Memory]) -> Result<(), EngineError> {
        let missing: Vec<Memory> =
            memory.iter().copied().filter(|&memory| !self.hold.has(memory)).collect();
        self.runner.take(&missing).map_err(|error| {
            EngineError::unavailable(format!("the memory cannot be taken again: {error}"))
        })?;
        self.hold.wake_up(memory);
        Ok(())
    }

    fn checksums(&self) -> Result<Vec<(String, u64)>, EngineError> {
        if !self.hold.has(Memory::Weights) {
            let why = "the weights' memory is given back; wake the engine up first";
            return Err(EngineError::unavailable(why));
        }
        Ok(self.runner.checksums())
    }
}
