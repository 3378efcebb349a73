//! What keeps an engine from generating: a pause, sleep, weights that are not there.

use onpolicy_plugin_api::{EngineError, Memory, PauseMode};
use std::sync::{
    atomic::{AtomicBool, Ordering},
    mpsc::SyncSender,
};

/// Where the answer to a command goes.
pub type Reply<T> = SyncSender<Result<T, EngineError>>;

/// The hold as the engine's handles see it. Only the engine's thread writes it, but for `trained`.
#[derive(Debug, Default)]
pub struct Status {
    /// Takes no steps, or only those that end what runs.
    pub paused: Flag,
    /// Lacks memory, or was told to sleep without giving any back.
    pub asleep: Flag,
    /// The weights are not those of any checkpoint.
    pub empty: Flag,
    /// A trainer reads and writes the weights.
    pub trained: Flag,
}

impl Status {
    /// Whether a request may be taken.
    ///
    /// # Errors
    /// [`EngineError::Unavailable`], with what to do first.
    pub fn ready(&self) -> Result<(), EngineError> {
        if self.asleep.get() {
            return Err(EngineError::unavailable("the engine sleeps; wake it up first"));
        }
        if self.empty.get() {
            let why = "the engine has no weights: they were given back or reset; load all of them \
                       from a directory first";
            return Err(EngineError::unavailable(why));
        }
        Ok(())
    }
}

/// A truth that several threads see.
#[derive(Debug, Default)]
pub struct Flag(AtomicBool);

impl Flag {
    /// Whether it is set.
    pub fn get(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// Sets or clears it.
    pub fn set(&self, value: bool) {
        self.0.store(value, Ordering::Release);
    }
}

/// Whoever waits for the running samples to end.
struct Waiter {
    clear_cache: bool,
    reply: Reply<()>,
}

/// The hold as the engine's thread sees it.
#[derive(Default)]
pub struct Hold {
    pause: Option<PauseMode>,
    waiters: Vec<Waiter>,
    asleep: bool,
    /// What a sleeping engine lacks.
    missing: Vec<Memory>,
}

impl Hold {
    /// Whether steps are taken: a pause that waits lets running samples go on.
    pub fn steps(&self) -> bool {
        !self.asleep && matches!(self.pause, None | Some(PauseMode::Wait))
    }

    /// Whether requests that wait may begin.
    pub fn admits(&self) -> bool {
        !self.asleep && self.pause.is_none()
    }

    /// Whether samples that run may stay where they are for as long as it pleases the owner.
    pub fn keeps(&self) -> bool {
        !self.steps()
    }

    /// Whether the memory is there.
    pub fn has(&self, memory: Memory) -> bool {
        !self.missing.contains(&memory)
    }

    /// Pauses, in place of whatever pause there was.
    pub fn pause(&mut self, mode: PauseMode) {
        self.pause = Some(mode);
        if mode == PauseMode::Keep {
            self.refuse_waiters("another pause, which keeps running samples, took its place");
        }
    }

    /// Whoever asks is answered once the running samples have ended.
    pub fn wait(&mut self, clear_cache: bool, reply: Reply<()>) {
        self.waiters.push(Waiter { clear_cache, reply });
    }

    /// Answers those that wait for running samples: they have ended. `clear_cache` is called if one
    /// of them wants it.
    pub fn drained(&mut self, clear_cache: impl FnOnce()) {
        if self.waiters.iter().any(|waiter| waiter.clear_cache) {
            clear_cache();
        }
        for waiter in self.waiters.drain(..) {
            // Whoever asked may have gone away; the pause stands.
            let _ = waiter.reply.send(Ok(()));
        }
    }

    /// Goes on after a pause.
    pub fn resume(&mut self) {
        self.pause = None;
        self.refuse_waiters("the engine was resumed before the running samples had ended");
    }

    fn refuse_waiters(&mut self, why: &str) {
        for waiter in self.waiters.drain(..) {
            let _ = waiter.reply.send(Err(EngineError::unavailable(why)));
        }
    }

    /// Falls asleep, or deeper asleep, without `memory`.
    pub fn sleep(&mut self, memory: &[Memory]) {
        self.asleep = true;
        self.missing.extend_from_slice(memory);
    }

    /// Has `memory` again; awake once nothing is missing.
    pub fn wake_up(&mut self, memory: &[Memory]) {
        self.missing.retain(|missing| !memory.contains(missing));
        self.asleep &= !self.missing.is_empty();
    }

    /// Shows `status` where things stand.
    pub fn show(&self, status: &Status) {
        status.paused.set(self.pause.is_some());
        status.asleep.set(self.asleep);
    }
}
