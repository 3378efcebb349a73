//! The engine's loop, on its own thread: take commands, apply updates, take a step.

use super::{
    EngineStats, OnUpdate, Shared, control::Control, flight::Flight, hold::Hold,
    request::LiveRequest, runner::Runner, update::Update,
};
use crate::{
    grammar::Place,
    panic::text,
    profile::{self, Phase, Profile, timed},
    scheduler::{NewRequest, Scheduler},
    torch::no_grad,
};
use onpolicy_plugin_api::{EngineError, FinishReason, Request, RequestId, Sink};
use std::{
    collections::{HashMap, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError},
    },
    time::{Duration, Instant},
};

/// How often an engine that takes no steps looks whether somebody still listens to its requests.
const LOOK_AFTER: Duration = Duration::from_millis(20);

/// A request on its way in.
pub struct Submission {
    pub id: RequestId,
    pub request: Request,
    pub sink: Box<dyn Sink>,
    /// The request's grammar, compiled.
    pub grammar: Option<Place>,
}

/// What the handle asks of the engine.
pub enum Command {
    /// Take requests, all of them before the next step.
    Submit(Vec<Submission>),
    /// End a request or one of its samples.
    Abort { id: RequestId, index: Option<usize> },
    /// Change the weights between two steps; the answer is the new version.
    Update(Update),
    /// Set the version without changing the weights.
    SetVersion { version: u64, reply: SyncSender<()> },
    /// What the engine's owner wants.
    Control(Control),
    /// Say how things stand.
    Stats { reply: SyncSender<EngineStats> },
    /// Say whether the books are right.
    Check { reply: SyncSender<Result<(), String>> },
    /// Say where the time has gone.
    Profile { reply: SyncSender<Option<Profile>> },
    /// Fail everything and end.
    Stop,
}

/// The engine's thread.
pub struct Worker {
    pub(super) runner: Runner,
    pub(super) scheduler: Scheduler,
    pub(super) live: HashMap<RequestId, LiveRequest>,
    pub(super) updates: VecDeque<Update>,
    pub(super) hold: Hold,
    pub(super) shared: Arc<Shared>,
    pub(super) on_update: OnUpdate,
    /// The step that is computed.
    pub(super) flight: Option<Flight>,
    /// While a step is computed, the tokens of the one before are delivered and the next one is planned.
    pub(super) overlaps: bool,
    pub(super) steps: u64,
    /// Those of them that were planned before the tokens of the one before were known.
    pub(super) steps_ahead: u64,
    /// When the last step has ended.
    pub(super) landed: Option<Instant>,
    /// How long the last update took to make the served copies anew.
    pub(super) refresh: Duration,
}

impl Worker {
    pub fn new(
        runner: Runner,
        scheduler: Scheduler,
        shared: Arc<Shared>,
        (on_update, overlaps): (OnUpdate, bool),
    ) -> Self {
        let (live, updates, hold) = (HashMap::new(), VecDeque::new(), Hold::default());
        Self {
            runner,
            scheduler,
            live,
            updates,
            hold,
            shared,
            on_update,
            flight: None,
            overlaps,
            steps: 0,
            steps_ahead: 0,
            landed: None,
            refresh: Duration::ZERO,
        }
    }

    /// Works until told to stop, or until every handle is gone.
    pub fn run(mut self, inbox: &Receiver<Command>) {
        self.publish();
        while timed(Phase::Schedule, || self.take_commands(inbox)) {
            timed(Phase::Schedule, || self.drop_abandoned());
            timed(Phase::Update, || self.apply_updates());
            if self.hold.steps() {
                self.guarded(Self::step);
            }
            // After the step, which may have ended the last of the running samples.
            self.answer_pauses();
            timed(Phase::Delivery, || self.publish());
        }
        self.fail_all(&EngineError::Stopped);
        for update in self.updates.drain(..) {
            let _ = update.reply.send(Err(EngineError::Stopped));
        }
        self.publish();
    }

    /// Does a part of a step; if it panics, all requests fail.
    pub(super) fn guarded(&mut self, part: impl FnOnce(&mut Self)) {
        let done = catch_unwind(AssertUnwindSafe(|| no_grad(|| part(self))));
        if let Err(panic) = done {
            self.fail_all(&EngineError::Internal(text(panic.as_ref())));
        }
    }

    /// Takes what has been sent; waits if there is nothing to do. False: stop.
    fn take_commands(&mut self, inbox: &Receiver<Command>) -> bool {
        if self.rests() {
            let command = match timed(Phase::Idle, || self.wait(inbox)) {
                Ok(command) => command,
                Err(RecvTimeoutError::Timeout) => return true,
                Err(RecvTimeoutError::Disconnected) => return false,
            };
            if !self.take(command) {
                return false;
            }
        }
        loop {
            match inbox.try_recv() {
                Ok(command) => {
                    if !self.take(command) {
                        return false;
                    }
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// True if there is nothing to do before the next command.
    fn rests(&self) -> bool {
        let works = if self.hold.admits() {
            !self.scheduler.is_idle()
        } else {
            self.hold.steps() && !self.scheduler.is_drained()
        };
        !works && self.flight.is_none() && self.updates.is_empty()
    }

    /// Waits for a command; not for long if requests wait whose listeners may go away.
    fn wait(&self, inbox: &Receiver<Command>) -> Result<Command, RecvTimeoutError> {
        if self.live.is_empty() {
            return inbox.recv().map_err(RecvTimeoutError::from);
        }
        inbox.recv_timeout(LOOK_AFTER)
    }

    fn take(&mut self, command: Command) -> bool {
        // What has been computed is there before the answer, and no step sees what is changed. Requests
        // may come and go meanwhile.
        if !matches!(command, Command::Submit(_) | Command::Abort { .. }) {
            self.guarded(Self::land_flight);
        }
        self.hand_over();
        match command {
            Command::Submit(submissions) => {
                for submission in submissions {
                    self.submit(submission);
                    self.shared.arrived(self.scheduler.waiting());
                }
            }
            Command::Abort { id, index } => self.abort(id, index),
            Command::Update(update) => self.updates.push_back(update),
            Command::SetVersion { version, reply } => {
                self.set_version(version);
                let _ = reply.send(());
            }
            Command::Control(control) => self.control(control),
            Command::Stats { reply } => {
                let _ = reply.send(self.stats());
            }
            Command::Check { reply } => {
                let _ = reply.send(self.scheduler.check());
            }
            Command::Profile { reply } => {
                let _ = reply.send(profile::read());
            }
            Command::Stop => return false,
        }
        true
    }

    fn submit(&mut self, submission: Submission) {
        let Submission { id, request, sink, grammar } = submission;
        let live = LiveRequest::new(&request, self.runner.eos_token_ids(), sink, grammar);
        if let Err(error) = self.shared.status.ready() {
            return live.fail(error);
        }
        let params = &request.params;
        let taken = self.scheduler.add(NewRequest {
            id,
            n: params.n,
            max_tokens: params.max_tokens,
            reuse_prefix: params.prompt_logprobs.is_none(),
            draft: live.draws_blindly(),
            prompt: request.prompt,
            priority: request.priority,
            cache_salt: request.cache_salt,
        });
        match taken {
            Ok(()) => {
                metrics::counter!("onpolicy_requests_total").increment(1);
                self.live.insert(id, live);
            }
            Err(error) => live.fail(error),
        }
    }

    pub(super) fn abort(&mut self, id: RequestId, index: Option<usize>) {
        let Some(live) = self.live.get_mut(&id) else { return };
        metrics::counter!("onpolicy_aborts_total").increment(1);
        match index {
            Some(index) => {
                if let Some(seq) = self.scheduler.sample(id, index) {
                    self.scheduler.finish(seq);
                }
                if live.finish(index, FinishReason::Abort) {
                    self.live.remove(&id);
                }
            }
            None => {
                self.scheduler.abort(id);
                live.finish_all(FinishReason::Abort);
                self.live.remove(&id);
            }
        }
    }

    fn drop_abandoned(&mut self) {
        let abandoned = self.live.iter().filter(|(_, live)| live.is_abandoned());
        let abandoned: Vec<RequestId> = abandoned.map(|(&id, _)| id).collect();
        abandoned.into_iter().for_each(|id| self.abort(id, None));
    }

    fn set_version(&mut self, version: u64) {
        self.shared.version.set(version);
        self.scheduler.set_version(version, self.on_update == OnUpdate::Recompute);
    }

    /// Delivers what samples have got. What is late waits for the next step or the next command: an
    /// engine with running samples neither rests nor changes without one of them.
    pub(super) fn hand_over(&mut self) {
        timed(Phase::Delivery, || self.live.values_mut().for_each(LiveRequest::hand_over));
    }

    pub(super) fn fail(&mut self, id: RequestId, error: EngineError) {
        self.scheduler.abort(id);
        if let Some(live) = self.live.remove(&id) {
            tracing::error!(request = id.0, %error, "request failed");
            metrics::counter!("onpolicy_request_failures_total").increment(1);
            live.fail(error);
        }
    }

    fn fail_all(&mut self, error: &EngineError) {
        let ids: Vec<RequestId> = self.live.keys().copied().collect();
        ids.into_iter().for_each(|id| self.fail(id, error.clone()));
    }

    fn stats(&self) -> EngineStats {
        let scheduler = &self.scheduler;
        let counters = scheduler.stats();
        EngineStats {
            running: scheduler.running(),
            waiting: scheduler.waiting(),
            blocks_used: scheduler.blocks_used(),
            blocks_total: scheduler.blocks_total(),
            steps: self.steps,
            steps_ahead: self.steps_ahead,
            preemptions: counters.preemptions,
            prefix_hits: counters.prefix_hits,
            prefix_queries: counters.prefix_queries,
            drafted: counters.drafted,
            accepted: counters.accepted,
            graph_steps: self.runner.graph_steps(),
            copied_bytes: self.runner.copied_bytes(),
            refresh: self.refresh,
        }
    }

    pub(super) fn publish(&self) {
        let stats = self.stats();
        self.shared.waiting.store(stats.waiting, Ordering::Relaxed);
        metrics::gauge!("onpolicy_weight_version").set(self.shared.version.get() as f64);
        metrics::gauge!("onpolicy_samples_running").set(stats.running as f64);
        metrics::gauge!("onpolicy_requests_waiting").set(stats.waiting as f64);
        metrics::gauge!("onpolicy_kv_blocks_used").set(stats.blocks_used as f64);
        metrics::gauge!("onpolicy_kv_blocks_total").set(stats.blocks_total as f64);
        metrics::gauge!("onpolicy_weight_copies_bytes").set(stats.copied_bytes as f64);
        metrics::counter!("onpolicy_graph_steps_total").absolute(stats.graph_steps);
        metrics::counter!("onpolicy_steps_ahead_total").absolute(stats.steps_ahead);
        metrics::counter!("onpolicy_preemptions_total").absolute(stats.preemptions);
        metrics::counter!("onpolicy_prefix_cache_hit_tokens_total").absolute(stats.prefix_hits);
        metrics::counter!("onpolicy_prefix_cache_query_tokens_total")
            .absolute(stats.prefix_queries);
        metrics::counter!("onpolicy_draft_tokens_total").absolute(stats.drafted);
        metrics::counter!("onpolicy_draft_accepted_tokens_total").absolute(stats.accepted);
    }
}
