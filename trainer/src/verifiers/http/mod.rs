//! An external verifier over HTTP.
//!
//! A batch is posted as `{"samples": [...]}`, where a sample is
//! `{"prompt": [messages], "completion": "...", "answer": "...", "truncated": false}`, and
//! answered by `{"rewards": [1.0, null, ...]}`: one finite number or null per sample, in order.
//! Null says that this sample cannot be judged.
//!
//! Whatever goes wrong ends in [`Score::Failed`] for the samples concerned, at the latest when the
//! deadline of the call has passed.

mod client;

use super::failed;
use client::Client;
use onpolicy_plugin_api::{Attempt, Message, Options, Score, Verifier};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};
use tokio::{runtime::Runtime, sync::Semaphore};

/// How long after the deadline a call waits for its own tasks to report.
const GRACE: Duration = Duration::from_secs(1);

/// The options of the verifier `http`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct HttpOptions {
    /// Where to post.
    url: String,
    /// Time limit of one try.
    #[serde(default = "defaults::timeout_seconds")]
    timeout_seconds: f64,
    /// Time limit of a whole call, with all tries and all its batches.
    #[serde(default = "defaults::deadline_seconds")]
    deadline_seconds: f64,
    /// Further tries after one that failed to connect, ran out of time, or was answered with
    /// 408, 429 or 5xx.
    #[serde(default = "defaults::retries")]
    retries: u32,
    /// Pause before the first further try; it doubles with each.
    #[serde(default = "defaults::backoff_seconds")]
    backoff_seconds: f64,
    /// Most samples of one post.
    #[serde(default = "defaults::batch_size")]
    batch_size: usize,
    /// Most posts under way at once.
    #[serde(default = "defaults::concurrency")]
    concurrency: usize,
    /// Headers of every post, such as `Authorization`.
    #[serde(default)]
    headers: BTreeMap<String, String>,
}

mod defaults {
    pub(super) fn timeout_seconds() -> f64 {
        30.0
    }
    pub(super) fn deadline_seconds() -> f64 {
        120.0
    }
    pub(super) fn retries() -> u32 {
        3
    }
    pub(super) fn backoff_seconds() -> f64 {
        0.25
    }
    pub(super) fn batch_size() -> usize {
        64
    }
    pub(super) fn concurrency() -> usize {
        4
    }
}

impl HttpOptions {
    fn validate(&self) -> Result<(), String> {
        let seconds = [
            ("timeout_seconds", self.timeout_seconds, 0.001),
            ("deadline_seconds", self.deadline_seconds, 0.001),
            ("backoff_seconds", self.backoff_seconds, 0.0),
        ];
        for (name, value, least) in seconds {
            if !(least..=86_400.0).contains(&value) {
                return Err(format!("{name} = {value} must be between {least} and 86400"));
            }
        }
        let counts = [
            ("retries", self.retries as usize, 0, 100),
            ("batch_size", self.batch_size, 1, 65_536),
            ("concurrency", self.concurrency, 1, 1024),
        ];
        for (name, value, least, most) in counts {
            if !(least..=most).contains(&value) {
                return Err(format!("{name} = {value} must be between {least} and {most}"));
            }
        }
        Ok(())
    }
}

/// One sample as it is posted.
#[derive(Serialize)]
struct Sample<'a> {
    prompt: &'a [Message],
    completion: &'a str,
    answer: &'a str,
    truncated: bool,
}

/// The verifier `http`. It has a thread of its own for the network, so `verify` may be called
/// from anywhere, an async runtime's worker included (which it blocks).
pub struct Http {
    client: Arc<Client>,
    options: HttpOptions,
    /// `None` only while it is being dropped.
    runtime: Option<Runtime>,
}

impl Http {
    /// Reads the options; nothing is connected yet.
    ///
    /// # Errors
    /// An unknown key, a wrong type, a value out of range, a URL that is not http or https, or a
    /// header that HTTP does not allow.
    pub fn from_options(options: &Options) -> Result<Self, String> {
        let options: HttpOptions = options.parse()?;
        options.validate()?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("http-verifier")
            .enable_all()
            .build()
            .map_err(|e| format!("cannot start the network thread: {e}"))?;
        let client = Arc::new(Client::new(&options)?);
        Ok(Self { client, options, runtime: Some(runtime) })
    }

    /// Starts one task per batch; each reports its number and its scores.
    fn post(
        &self,
        runtime: &Runtime,
        attempts: &[Attempt<'_>],
        deadline: Instant,
    ) -> mpsc::Receiver<(usize, Vec<Score>)> {
        let (report, reports) = mpsc::channel();
        let slots = Arc::new(Semaphore::new(self.options.concurrency));
        for (number, batch) in attempts.chunks(self.options.batch_size).enumerate() {
            let (client, slots) = (Arc::clone(&self.client), Arc::clone(&slots));
            let (report, body, size) = (report.clone(), body(batch), batch.len());
            runtime.spawn(async move {
                let _slot = slots.acquire().await;
                let scores = match client.rewards(body, size, deadline).await {
                    Ok(rewards) => rewards.into_iter().map(score).collect(),
                    Err(reason) => vec![failed(reason); size],
                };
                // Nobody listens once the call is over.
                let _ = report.send((number, scores));
            });
        }
        reports
    }
}

impl Verifier for Http {
    fn verify(&self, attempts: &[Attempt<'_>]) -> Vec<Score> {
        let lost = || failed("the external verifier gave no verdict before the deadline");
        let mut scores: Vec<Score> = attempts.iter().map(|_| lost()).collect();
        let Some(runtime) = &self.runtime else {
            return scores;
        };
        let deadline = Instant::now() + Duration::from_secs_f64(self.options.deadline_seconds);
        let reports = self.post(runtime, attempts, deadline);
        let left = || (deadline + GRACE).saturating_duration_since(Instant::now());
        while let Ok((number, batch)) = reports.recv_timeout(left()) {
            let first = number * self.options.batch_size;
            scores.splice(first..first + batch.len(), batch);
        }
        scores
    }
}

impl Drop for Http {
    /// Waiting for the thread is not allowed in async code; let it go instead.
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn body(batch: &[Attempt<'_>]) -> String {
    let sample = |attempt: &Attempt<'_>| {
        serde_json::json!(Sample {
            prompt: &attempt.problem.messages,
            completion: attempt.completion,
            answer: &attempt.problem.answer,
            truncated: attempt.truncated,
        })
    };
    let samples: Vec<serde_json::Value> = batch.iter().map(sample).collect();
    serde_json::json!({ "samples": samples }).to_string()
}

fn score(reward: Option<f64>) -> Score {
    match reward.map(|reward| reward as f32) {
        Some(reward) if reward.is_finite() => Score::Reward(reward),
        Some(reward) => failed(format!("the external verifier gave the reward {reward}")),
        None => failed("the external verifier could not judge this sample"),
    }
}
