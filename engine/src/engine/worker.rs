//! The engine's loop, on its own thread: take commands, schedule, run, sample, deliver.

use super::{
    EngineStats, OnUpdate, Shared,
    control::Control,
    hold::Hold,
    request::LiveRequest,
    runner::{Runner, StepOutput, predicted_prompt},
    targets::{self, Sampled, Target},
    update::Update,
};
use crate::{
    grammar::Place,
    profile::{self, Phase, Profile, timed},
    sampler::{Draw, NOTHING_LEFT},
    scheduler::{NewRequest, Scheduler, Step},
};
use onpolicy_plugin_api::{EngineError, FinishReason, Request, RequestId, Sink, Token};
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
    /// Tokens are delivered while the next step is computed.
    late: bool,
    steps: u64,
    /// How long the last update took to make the served copies anew.
    pub(super) refresh: Duration,
}

impl Worker {
    pub fn new(
        runner: Runner,
        scheduler: Scheduler,
        shared: Arc<Shared>,
        (on_update, late): (OnUpdate, bool),
    ) -> Self {
        let (live, updates, hold) = (HashMap::new(), VecDeque::new(), Hold::default());
        let (steps, refresh) = (0, Duration::ZERO);
        Self { runner, scheduler, live, updates, hold, shared, on_update, late, steps, refresh }
    }

    /// Works until told to stop, or until every handle is gone.
    pub fn run(mut self, inbox: &Receiver<Command>) {
        self.publish();
        while timed(Phase::Schedule, || self.take_commands(inbox)) {
            timed(Phase::Schedule, || self.drop_abandoned());
            timed(Phase::Update, || self.apply_updates());
            if self.hold.steps() {
                let step = catch_unwind(AssertUnwindSafe(|| tch::no_grad(|| self.step())));
                if let Err(panic) = step {
                    self.fail_all(&EngineError::Internal(panic_text(panic.as_ref())));
                }
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
        !works && self.updates.is_empty()
    }

    /// Waits for a command; not for long if requests wait whose listeners may go away.
    fn wait(&self, inbox: &Receiver<Command>) -> Result<Command, RecvTimeoutError> {
        if self.live.is_empty() {
            return inbox.recv().map_err(RecvTimeoutError::from);
        }
        inbox.recv_timeout(LOOK_AFTER)
    }

    fn take(&mut self, command: Command) -> bool {
        // What has been computed is there before the answer.
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
            draft: live.may_draft(),
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

    fn step(&mut self) {
        let started = Instant::now();
        let step = timed(Phase::Schedule, || self.scheduler.schedule());
        if step.is_empty() {
            return self.hand_over();
        }
        let output = self.runner.forward(&step, &self.scheduler);
        // While the device computes.
        self.hand_over();
        timed(Phase::Sampling, || self.collect_prompt_logprobs(&step, &output));
        timed(Phase::Schedule, || self.scheduler.computed(&step));
        let sampled = timed(Phase::Sampling, || self.sample(&step, &output));
        timed(Phase::Delivery, || self.deliver(sampled));
        self.steps += 1;
        profile::count_step(step.num_tokens());
        metrics::counter!("onpolicy_step_tokens_total").increment(step.num_tokens() as u64);
        metrics::histogram!("onpolicy_step_seconds").record(started.elapsed());
    }

    fn collect_prompt_logprobs(&mut self, step: &Step, output: &StepOutput) {
        for (index, chunk) in step.chunks.iter().enumerate() {
            let Some(sequence) = self.scheduler.sequence(chunk.seq) else { continue };
            let Some(live) = self.live.get_mut(&sequence.group) else { continue };
            if let Some(top) = live.wanted_of_prompt() {
                let (first, next) = predicted_prompt(chunk, &sequence.tokens, sequence.prompt_len);
                live.add_prompt_tokens(first, self.runner.next_tokens(output, index, &next, top));
            }
        }
    }

    /// Draws a token for every sample whose turn it is, and for each of their guesses the one that
    /// follows it. A group's first tokens are all drawn from the one row that its prompt ends in.
    fn sample(&mut self, step: &Step, output: &StepOutput) -> Vec<Sampled> {
        let targets = self.targets(step);
        if targets.is_empty() {
            return Vec::new();
        }
        let stuck = targets::look(&mut self.live, &targets);
        let is_stuck = |target: &Target| stuck.contains_key(&target.request);
        let (lost, targets): (Vec<_>, Vec<_>) =
            targets.into_iter().partition(|(_, target)| is_stuck(target));
        let (targets, draws): (Vec<Target>, Vec<Draw<'_>>) = targets
            .into_iter()
            .map(|(row, target)| {
                let sequence = self.scheduler.sequence(target.seq).expect("a sequence that draws");
                let draw = self.live[&target.request].draw(row, sequence, target.ahead);
                (target, draw)
            })
            .unzip();
        let drawn = self.runner.sample(output, &draws);
        let drawn = targets.into_iter().zip(drawn).map(|(target, drawn)| {
            let drawn = drawn.map_err(|reason| draw_error(reason, &self.live[&target.request]));
            (target, drawn)
        });
        let lost = lost.into_iter().map(|(_, target)| {
            let error = stuck[&target.request].clone();
            (target, Err(error))
        });
        lost.chain(drawn).collect()
    }

    /// Who draws from which of the step's sampled rows.
    fn targets(&mut self, step: &Step) -> Vec<(usize, Target)> {
        let (mut targets, mut row) = (Vec::new(), 0);
        for chunk in step.chunks.iter().filter(|chunk| chunk.sample) {
            for seq in self.scheduler.fork(chunk.seq) {
                let sequence = self.scheduler.sequence(seq).expect("a forked sequence exists");
                let ahead = 0..=chunk.drafts;
                targets.extend(ahead.map(|ahead| (row + ahead, Target::of(sequence, ahead))));
            }
            row += 1 + chunk.drafts;
        }
        targets
    }

    fn deliver(&mut self, sampled: Vec<Sampled>) {
        let weight_version = self.shared.version.get();
        let mut delivered = 0;
        for (target, drawn) in sampled {
            // An earlier token was another than the guess that this one follows, or the last.
            if target.ahead > 0 && !self.scheduler.draws(target.seq) {
                continue;
            }
            // An earlier sample of the same step may have ended the whole request.
            let Some(live) = self.live.get_mut(&target.request) else { continue };
            let taken = drawn.and_then(|drawn| {
                live.advance(target.index, drawn.id)?;
                Ok(drawn)
            });
            let drawn = match taken {
                Ok(drawn) => drawn,
                Err(error) => {
                    self.fail(target.request, error);
                    continue;
                }
            };
            delivered += 1;
            let stop = live.stops_at(drawn.id);
            let token = Token { id: drawn.id, stats: drawn.stats, weight_version, top: drawn.top };
            live.take(target.index, token);
            let full = self.scheduler.append(target.seq, drawn.id);
            if stop || full {
                let reason = if stop { FinishReason::Stop } else { FinishReason::Length };
                self.scheduler.finish(target.seq);
                if live.finish(target.index, reason) {
                    self.live.remove(&target.request);
                }
            }
        }
        metrics::counter!("onpolicy_generated_tokens_total").increment(delivered);
        if !self.late {
            self.hand_over();
        }
    }

    /// Delivers what samples have got. What is late waits for the next step or the next command: an
    /// engine with running samples neither rests nor changes without one of them.
    fn hand_over(&mut self) {
        timed(Phase::Delivery, || self.live.values_mut().for_each(LiveRequest::hand_over));
    }

    fn fail(&mut self, id: RequestId, error: EngineError) {
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
        metrics::counter!("onpolicy_preemptions_total").absolute(stats.preemptions);
        metrics::counter!("onpolicy_prefix_cache_hit_tokens_total").absolute(stats.prefix_hits);
        metrics::counter!("onpolicy_prefix_cache_query_tokens_total")
            .absolute(stats.prefix_queries);
        metrics::counter!("onpolicy_draft_tokens_total").absolute(stats.drafted);
        metrics::counter!("onpolicy_draft_accepted_tokens_total").absolute(stats.accepted);
    }
}

/// Whose fault it is that no token could be drawn.
fn draw_error(reason: String, live: &LiveRequest) -> EngineError {
    match live.restriction().filter(|_| reason == NOTHING_LEFT) {
        Some(field) => {
            EngineError::invalid(field, "no token is left to draw: allow more, or forbid fewer")
        }
        None => EngineError::Internal(reason),
    }
}

/// What a panic said.
pub(super) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    crate::panic::message(panic).unwrap_or("a panic without a message").to_string()
}
