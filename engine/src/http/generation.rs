//! One HTTP request at the engine: submits a prompt or several, turns the engine's token events
//! into text events, ends samples at stop strings, and aborts what is left when it is dropped.

use super::error::ApiError;
use super::feed::{Feed, FeedLimits, feed};
use super::metrics::{RequestClock, SampleClock};
use super::registry::Registered;
use super::structured;
use super::text::{Piece, SampleText, TextRules};
use super::{Admission, AppState, Limits};
use onpolicy_plugin_api::{
    Engine, EngineError, Event, FinishReason, PromptToken, Request, RequestId, Sink, Token,
};
use serde::Serialize;
use std::collections::VecDeque;
use std::future::{Future, pending};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use utoipa::ToSchema;

/// A validated request, ready for the engine.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// One per prompt, each with the same number of samples.
    pub requests: Vec<Request>,
    /// How the samples become text.
    pub rules: Arc<TextRules>,
    /// Tokens may wait for their reader, who may be slow; a whole answer is gathered at once.
    pub stream: bool,
    /// The field that says what the text must be; refusals of the grammar are about it.
    pub structured: Option<String>,
}

impl Job {
    /// Samples per prompt.
    pub fn samples(&self) -> usize {
        self.requests.first().map_or(0, |request| request.params.n)
    }

    /// Checks what all prompts ask for together.
    ///
    /// # Errors
    /// 400 with the numbers.
    fn check(&self, limits: &Limits) -> Result<(), ApiError> {
        let (prompts, n) = (self.requests.len(), self.samples());
        let (samples, most) = (prompts.saturating_mul(n), limits.samples);
        if samples > most {
            let rule = format!(
                "{prompts} prompts with {n} samples each are {samples} samples; one request may \
                 ask for {most}: send several requests"
            );
            return Err(ApiError::invalid("n", rule));
        }
        let tokens: usize = self.requests.iter().map(|request| request.prompt.len()).sum();
        if tokens > limits.prompt_tokens {
            let most = limits.prompt_tokens;
            let rule = format!(
                "the prompts have {tokens} tokens together; one request may have {most}: send \
                 several requests"
            );
            return Err(ApiError::invalid("prompt", rule));
        }
        Ok(())
    }
}

/// What ended a sample beside the token limit and end-of-sequence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum StopReason {
    /// A stop string.
    Text(String),
    /// A token of `stop_token_ids`.
    Token(u32),
}

/// How a sample ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// What stopped it, if it was a stop string or a stop token.
    pub stop_reason: Option<StopReason>,
    /// Weight versions of its first and last token, if it has a token.
    pub weight_versions: Option<[u64; 2]>,
    /// Tokens generated.
    pub tokens: usize,
}

/// What a generation tells the route. `index` counts samples over all prompts: prompt times
/// samples per prompt, plus sample.
#[derive(Debug, Clone, PartialEq)]
pub enum Update {
    /// Each token of a prompt after the first.
    Prompt { prompt: usize, tokens: Vec<PromptToken> },
    /// More text of a sample.
    Piece { index: usize, piece: Piece },
    /// A sample has ended.
    Finished { index: usize, finish: Finish },
}

/// A whole sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// All its text and tokens.
    pub piece: Piece,
    /// How it ended.
    pub finish: Finish,
}

/// Everything a request generated.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Answers {
    /// Log-probs of the prompts, where they were asked for.
    pub prompt_logprobs: Vec<Option<Vec<PromptToken>>>,
    /// The samples, by index.
    pub samples: Vec<Sample>,
}

/// A request that the engine has taken, and how many of its samples are not over.
struct Submitted {
    id: RequestId,
    open: usize,
}

/// A sample that is not over.
struct Running {
    text: SampleText,
    clock: SampleClock,
    weight_versions: Option<[u64; 2]>,
    last: Option<u32>,
    tokens: usize,
}

/// A running request. Dropping it aborts at the engine whatever is not over.
pub struct Generation {
    engine: Arc<dyn Engine>,
    eos: Vec<u32>,
    samples_per_prompt: usize,
    submitted: Vec<Submitted>,
    running: Vec<Option<Running>>,
    open: usize,
    events: Feed,
    /// Most tokens that wait for the reader.
    backlog: usize,
    ready: VecDeque<Update>,
    clock: RequestClock,
    structured: Option<String>,
    registered: Registered,
    /// What ends it from outside.
    ending: Ending,
    _admission: Admission,
}

/// Waits for what ends a request whether or not its samples are over, and says why.
type Ending = Pin<Box<dyn Future<Output = ApiError> + Send>>;

fn ending(deadline: Option<Instant>, time: Option<Duration>, admission: &Admission) -> Ending {
    let lifetime = admission.lifetime.clone();
    Box::pin(async move {
        let cut_off = async {
            match lifetime {
                Some(lifetime) => lifetime.cut_off().await,
                None => pending().await,
            }
        };
        let late = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
                None => pending().await,
            }
        };
        tokio::select! {
            () = cut_off => ApiError::shutting_down(),
            () = late => ApiError::out_of_time(time.unwrap_or_default()),
        }
    })
}

impl Generation {
    /// Submits all prompts of the job.
    ///
    /// # Errors
    /// The engine's refusal, or more than one request may ask for; nothing is started then.
    pub fn start(
        state: &AppState,
        job: Job,
        admission: Admission,
        clock: RequestClock,
    ) -> Result<Self, ApiError> {
        let limits = &state.limits;
        job.check(limits)?;
        let backlog = if job.stream { limits.undelivered_tokens } else { usize::MAX };
        let deadline = limits.request_time.and_then(|time| Instant::now().checked_add(time));
        let (sinks, events) = feed(job.requests.len(), FeedLimits { tokens: backlog, deadline });
        let samples_per_prompt = job.samples();
        let running = || Running {
            text: SampleText::new(&state.tokenizer, job.rules.clone()),
            clock: SampleClock::new(clock.route),
            weight_versions: None,
            last: None,
            tokens: 0,
        };
        let samples = job.requests.len() * samples_per_prompt;
        let mut this = Self {
            engine: state.engine.clone(),
            eos: eos_that_end(&job, &state.info.eos_token_ids),
            samples_per_prompt,
            submitted: Vec::new(),
            running: (0..samples).map(|_| Some(running())).collect(),
            open: samples,
            events,
            backlog,
            ready: VecDeque::new(),
            clock,
            structured: job.structured,
            registered: state.registry.add(),
            ending: ending(deadline, limits.request_time, &admission),
            _admission: admission,
        };
        let sinks = sinks.into_iter().map(|sink| Box::new(sink) as Box<dyn Sink>);
        let ids = this.engine.submit_all(job.requests.into_iter().zip(sinks).collect());
        let ids = ids.map_err(|error| this.error(error))?;
        ids.iter().for_each(|&id| this.registered.request(id));
        let submitted = |id| Submitted { id, open: samples_per_prompt };
        this.submitted = ids.into_iter().map(submitted).collect();
        Ok(this)
    }

    /// The engine's error, about the field that the client wrote.
    fn error(&self, error: EngineError) -> ApiError {
        structured::named(error.into(), self.structured.as_deref())
    }

    /// Clients may abort it by the answer's id from now on, and by what they have called it.
    #[must_use]
    pub fn named(self, id: &str) -> Self {
        self.registered.name(id);
        self
    }

    /// As [`Generation::named`], prompt by prompt.
    #[must_use]
    pub fn named_each(self, ids: &[String]) -> Self {
        self.registered.name_each(ids);
        self
    }

    /// Samples over all prompts.
    pub fn samples(&self) -> usize {
        self.running.len()
    }

    /// Samples per prompt.
    pub fn samples_per_prompt(&self) -> usize {
        self.samples_per_prompt
    }

    /// The next update; `None` once every sample has finished.
    ///
    /// # Errors
    /// The engine's failure, the end of the request's time, or a server that stops; after it there
    /// are no more updates.
    pub async fn next(&mut self) -> Option<Result<Update, ApiError>> {
        loop {
            if let Some(update) = self.ready.pop_front() {
                return Some(Ok(update));
            }
            if self.open == 0 {
                return None;
            }
            let taken = tokio::select! {
                biased;
                error = &mut self.ending => Err(error),
                event = self.events.next() => match event {
                    Some((prompt, event)) => self.take(prompt, event),
                    None => Err(self.dropped().await),
                },
            };
            if let Err(error) = taken {
                self.abort_all();
                return Some(Err(error));
            }
        }
    }

    /// Waits for all samples.
    ///
    /// # Errors
    /// The engine's failure.
    pub async fn collect(mut self) -> Result<Answers, ApiError> {
        let mut prompt_logprobs = vec![None; self.submitted.len()];
        let mut pieces = vec![Piece::default(); self.samples()];
        let mut finishes = vec![None; self.samples()];
        while let Some(update) = self.next().await {
            match update? {
                Update::Prompt { prompt, tokens } => prompt_logprobs[prompt] = Some(tokens),
                Update::Piece { index, piece } => pieces[index].extend(piece),
                Update::Finished { index, finish } => finishes[index] = Some(finish),
            }
        }
        let samples = pieces.into_iter().zip(finishes);
        let samples = samples.filter_map(|(piece, finish)| Some(Sample { piece, finish: finish? }));
        Ok(Answers { prompt_logprobs, samples: samples.collect() })
    }

    /// Why the engine has let go of a request whose samples are not over.
    async fn dropped(&mut self) -> ApiError {
        if self.events.lagged() {
            return ApiError::slow_reader(self.backlog);
        }
        // The engine may see the deadline a moment before the timer does.
        let late = tokio::time::timeout(Duration::from_millis(20), &mut self.ending).await;
        late.unwrap_or_else(|_| ApiError::internal("the engine dropped the request"))
    }

    fn take(&mut self, prompt: usize, event: Event) -> Result<(), ApiError> {
        match event {
            Event::Prompt { tokens } => self.ready.push_back(Update::Prompt { prompt, tokens }),
            Event::Token { index, token } => {
                self.token(prompt * self.samples_per_prompt + index, token)?;
            }
            Event::Finished { index, reason } => {
                self.finished(prompt * self.samples_per_prompt + index, reason)?;
            }
            Event::Failed { error } => return Err(self.error(error)),
        }
        Ok(())
    }

    fn token(&mut self, index: usize, token: Token) -> Result<(), ApiError> {
        let Some(running) = self.running[index].as_mut() else { return Ok(()) };
        self.clock.token();
        running.clock.token();
        running.tokens += 1;
        running.last = Some(token.id);
        let first = running.weight_versions.map_or(token.weight_version, |[first, _]| first);
        running.weight_versions = Some([first, token.weight_version]);
        let (piece, stop) = running.text.push(token)?;
        self.piece(index, piece);
        if let Some(stop) = stop {
            let (prompt, sample) =
                (index / self.samples_per_prompt, index % self.samples_per_prompt);
            self.engine.abort(self.submitted[prompt].id, Some(sample));
            self.end(index, FinishReason::Stop, Some(StopReason::Text(stop)));
        }
        Ok(())
    }

    fn finished(&mut self, index: usize, reason: FinishReason) -> Result<(), ApiError> {
        let Some(running) = self.running[index].as_mut() else { return Ok(()) };
        let last = running.last;
        let (piece, stop) = running.text.finish()?;
        self.piece(index, piece);
        match stop {
            Some(stop) => self.end(index, FinishReason::Stop, Some(StopReason::Text(stop))),
            None => {
                let by_token =
                    last.filter(|id| reason == FinishReason::Stop && !self.eos.contains(id));
                self.end(index, reason, by_token.map(StopReason::Token));
            }
        }
        Ok(())
    }

    fn piece(&mut self, index: usize, piece: Piece) {
        if !piece.is_empty() {
            self.ready.push_back(Update::Piece { index, piece });
        }
    }

    fn end(&mut self, index: usize, reason: FinishReason, stop_reason: Option<StopReason>) {
        let Some(running) = self.running[index].take() else { return };
        running.clock.finish();
        self.submitted[index / self.samples_per_prompt].open -= 1;
        let Running { weight_versions, tokens, .. } = running;
        let finish = Finish { reason, stop_reason, weight_versions, tokens };
        self.ready.push_back(Update::Finished { index, finish });
        self.open -= 1;
        if self.open == 0 {
            self.clock.finish();
        }
    }

    fn abort_all(&mut self) {
        self.open = 0;
        for request in &mut self.submitted {
            if std::mem::take(&mut request.open) > 0 {
                self.engine.abort(request.id, None);
            }
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.abort_all();
    }
}

/// The end-of-sequence tokens, unless they are ignored.
fn eos_that_end(job: &Job, eos: &[u32]) -> Vec<u32> {
    let ignored = job.requests.first().is_some_and(|request| request.params.ignore_eos);
    if ignored { Vec::new() } else { eos.to_vec() }
}
