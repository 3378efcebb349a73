//! What the engine's handle does of [`Engine`]: it checks, sends commands, and waits for answers.

use super::{
    EngineHandle, Inner,
    check::check,
    control::Control,
    hold::Reply,
    update::{Change, Update},
    worker::{Command, Submission},
};
use crate::{model::loading::load_weights, torch::memory::trim, weights::Weights};
use onpolicy_plugin_api::{
    Engine, EngineError, Memory, ModelInfo, PauseMode, Request, RequestId, Sink, Sleep,
    WeightUpdate,
};
use std::{path::Path, sync::atomic::Ordering};
use tch::Tensor;

impl Inner {
    /// Sends the owner's command and waits for its answer.
    fn control<T>(&self, command: impl FnOnce(Reply<T>) -> Control) -> Result<T, EngineError> {
        self.ask(|reply| Command::Control(command(reply)))?
    }

    /// Changes the weights between two steps.
    fn change(&self, change: Change, version: Option<u64>) -> Result<u64, EngineError> {
        self.ask(|reply| Command::Update(Update { change, version, reply }))?
    }

    /// Reads all weights from a directory, checks them, and copies them to where they are served.
    fn load(&self, dir: &Path, version: Option<u64>) -> Result<u64, EngineError> {
        let read = self.read(dir).map_err(|why| EngineError::invalid("directory", why));
        let loaded = read.and_then(|read| self.change(Change::Load(read), version));
        // What was read is not needed any more.
        trim();
        loaded
    }

    fn read(&self, dir: &Path) -> Result<Vec<(String, Tensor)>, String> {
        let read = load_weights(dir, &self.model).map_err(|error| error.to_string())?;
        let read = Weights::new(read);
        read.check_finite()?;
        self.serve_dtype.check(&read)?;
        read.check_fits(self.placement.kind)?;
        Ok(read.into_tensors())
    }
}

impl Engine for EngineHandle {
    fn info(&self) -> ModelInfo {
        self.inner.info.clone()
    }

    fn submit(&self, request: Request, sink: Box<dyn Sink>) -> Result<RequestId, EngineError> {
        Ok(self.submit_all(vec![(request, sink)])?[0])
    }

    fn submit_all(
        &self,
        requests: Vec<(Request, Box<dyn Sink>)>,
    ) -> Result<Vec<RequestId>, EngineError> {
        let inner = &self.inner;
        let check = |request| check(request, &inner.info, &inner.limits);
        requests.iter().try_for_each(|(request, _)| check(request))?;
        inner.shared.status.ready()?;
        let grammars = requests.iter().map(|(request, _)| inner.grammar(request));
        let grammars: Vec<_> = grammars.collect::<Result<_, _>>()?;
        let count = requests.len();
        let places = inner.shared.take_places(count, inner.limits.max_waiting);
        places.map_err(|waiting| EngineError::Overloaded { waiting })?;
        let first = inner.next_id.fetch_add(count as u64, Ordering::Relaxed);
        let ids: Vec<RequestId> = (first..first + count as u64).map(RequestId).collect();
        let requests = ids.iter().copied().zip(requests).zip(grammars);
        let submissions = requests.map(|((id, (request, sink)), grammar)| Submission {
            id,
            request,
            sink,
            grammar,
        });
        let submissions = submissions.collect();
        let sent = inner.commands.send(Command::Submit(submissions));
        sent.map(|()| ids).map_err(|_| EngineError::Stopped)
    }

    fn abort(&self, id: RequestId, index: Option<usize>) {
        // An engine that has stopped has nothing left to abort.
        let _ = self.inner.commands.send(Command::Abort { id, index });
    }

    fn weight_version(&self) -> u64 {
        self.inner.shared.version.get()
    }

    fn health(&self) -> Result<(), EngineError> {
        let thread = self.inner.thread.lock().unwrap_or_else(|poison| poison.into_inner());
        let runs = thread.as_ref().is_some_and(|thread| !thread.is_finished());
        if runs { Ok(()) } else { Err(EngineError::Stopped) }
    }

    fn shares_weights(&self) -> bool {
        true
    }

    fn update_weights(
        &self,
        update: WeightUpdate,
        version: Option<u64>,
    ) -> Result<u64, EngineError> {
        match update {
            WeightUpdate::InPlace(write) => self.inner.change(Change::Write(write), version),
            WeightUpdate::Directory(dir) => self.inner.load(&dir, version),
        }
    }

    fn set_weight_version(&self, version: u64) -> Result<(), EngineError> {
        self.inner.ask(|reply| Command::SetVersion { version, reply })
    }

    fn checksums(&self) -> Result<Vec<(String, u64)>, EngineError> {
        self.inner.control(|reply| Control::Checksums { reply })
    }

    fn reset_weights(&self) -> Result<(), EngineError> {
        self.inner.change(Change::Reset, None).map(drop)
    }

    fn ping(&self) -> Result<(), EngineError> {
        self.stats().map(drop)
    }

    fn pause(&self, mode: PauseMode, clear_cache: bool) -> Result<(), EngineError> {
        self.inner.control(|reply| Control::Pause { mode, clear_cache, reply })
    }

    fn resume(&self) -> Result<(), EngineError> {
        self.inner.control(|reply| Control::Resume { reply })
    }

    fn is_paused(&self) -> bool {
        self.inner.shared.status.paused.get()
    }

    fn abort_all(&self) -> Result<(), EngineError> {
        self.inner.control(|reply| Control::AbortAll { reply })
    }

    fn reset_prefix_cache(&self) -> Result<(), EngineError> {
        self.inner.control(|reply| Control::ResetPrefixCache { reply })
    }

    fn sleep(&self, depth: Sleep) -> Result<(), EngineError> {
        self.inner.control(|reply| Control::Sleep { depth, reply })
    }

    fn wake_up(&self, memory: &[Memory]) -> Result<(), EngineError> {
        self.inner.control(|reply| Control::WakeUp { memory: memory.to_vec(), reply })
    }

    fn is_sleeping(&self) -> bool {
        self.inner.shared.status.asleep.get()
    }
}
