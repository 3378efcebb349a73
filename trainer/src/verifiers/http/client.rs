//! Posts one batch: tries, pauses and limits.

use super::HttpOptions;
use reqwest::{
    Response, StatusCode, Url,
    header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue},
};
use serde::Deserialize;
use std::{
    error::Error,
    time::{Duration, Instant},
};

/// Longest pause between two tries.
const MAX_PAUSE: Duration = Duration::from_secs(10);
/// Longest answer that is read.
const MAX_ANSWER: usize = 16 << 20;
/// How much of an unexpected answer an error quotes, in characters.
const QUOTED: usize = 200;

/// What the verifier answers.
#[derive(Deserialize)]
struct Answer {
    rewards: Vec<Option<f64>>,
}

/// Why a try brought no rewards.
enum Fault {
    /// Another try may succeed.
    Passing(String),
    /// Every try would end like this.
    Lasting(String),
}

/// A connection pool to one verifier.
pub(super) struct Client {
    http: reqwest::Client,
    url: Url,
    timeout: Duration,
    retries: u32,
    backoff: Duration,
}

impl Client {
    pub(super) fn new(options: &HttpOptions) -> Result<Self, String> {
        let url = Url::parse(&options.url).map_err(|e| format!("url = '{}': {e}", options.url))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(format!("url = '{url}' must begin with http:// or https://"));
        }
        let http = reqwest::Client::builder()
            .default_headers(headers(options)?)
            .build()
            .map_err(|e| format!("cannot set up HTTP: {}", chain(&e)))?;
        Ok(Self {
            http,
            url,
            timeout: Duration::from_secs_f64(options.timeout_seconds),
            retries: options.retries,
            backoff: Duration::from_secs_f64(options.backoff_seconds),
        })
    }

    /// Posts `body` until `size` rewards come back, the tries are used up or the deadline has
    /// passed.
    pub(super) async fn rewards(
        &self,
        body: String,
        size: usize,
        deadline: Instant,
    ) -> Result<Vec<Option<f64>>, String> {
        let mut tries = 0;
        loop {
            tries += 1;
            let reason = match self.attempt(&body, size, deadline).await {
                Ok(rewards) => return Ok(rewards),
                Err(Fault::Lasting(reason)) => return Err(self.failure(&reason, tries)),
                Err(Fault::Passing(reason)) => reason,
            };
            let pause = self.pause(tries);
            if tries > self.retries || Instant::now() + pause >= deadline {
                return Err(self.failure(&reason, tries));
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Pause after the given number of tries.
    fn pause(&self, tries: u32) -> Duration {
        self.backoff.saturating_mul(2_u32.saturating_pow(tries - 1)).min(MAX_PAUSE)
    }

    async fn attempt(
        &self,
        body: &str,
        size: usize,
        deadline: Instant,
    ) -> Result<Vec<Option<f64>>, Fault> {
        let limit = self.timeout.min(deadline.saturating_duration_since(Instant::now()));
        let late = |_| Fault::Passing(format!("no answer within {:.1} s", limit.as_secs_f64()));
        tokio::time::timeout(limit, self.post(body, size)).await.map_err(late)?
    }

    async fn post(&self, body: &str, size: usize) -> Result<Vec<Option<f64>>, Fault> {
        let request = self.http.post(self.url.clone()).body(body.to_owned());
        let answer = request.send().await.map_err(|e| Fault::Passing(chain(&e.without_url())))?;
        let status = answer.status();
        let text = read(answer).await?;
        if !status.is_success() {
            let reason = format!("HTTP {}: {}", status.as_u16(), quote(&text));
            return Err(if may_pass(status) {
                Fault::Passing(reason)
            } else {
                Fault::Lasting(reason)
            });
        }
        let answer: Answer = serde_json::from_slice(&text)
            .map_err(|e| Fault::Lasting(format!("unexpected answer ({e}): {}", quote(&text))))?;
        if answer.rewards.len() != size {
            let given = answer.rewards.len();
            return Err(Fault::Lasting(format!("{given} rewards for {size} samples")));
        }
        Ok(answer.rewards)
    }

    fn failure(&self, reason: &str, tries: u32) -> String {
        let host = self.url.host_str().unwrap_or("");
        let port = self.url.port().map(|port| format!(":{port}")).unwrap_or_default();
        let plural = if tries == 1 { "try" } else { "tries" };
        format!("the verifier at {host}{port}{}: {reason} ({tries} {plural})", self.url.path())
    }
}

fn headers(options: &HttpOptions) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    for (name, value) in &options.headers {
        let key = HeaderName::try_from(name).map_err(|_| format!("'{name}' names no header"))?;
        let value = HeaderValue::try_from(value)
            .map_err(|_| format!("the value of header '{name}' is not allowed in HTTP"))?;
        headers.insert(key, value);
    }
    Ok(headers)
}

fn may_pass(status: StatusCode) -> bool {
    status.is_server_error()
        || matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS)
}

async fn read(mut answer: Response) -> Result<Vec<u8>, Fault> {
    let mut text = Vec::new();
    let broken = |e: reqwest::Error| Fault::Passing(chain(&e.without_url()));
    while let Some(piece) = answer.chunk().await.map_err(broken)? {
        text.extend_from_slice(&piece);
        if text.len() > MAX_ANSWER {
            return Err(Fault::Lasting(format!("the answer is longer than {MAX_ANSWER} bytes")));
        }
    }
    Ok(text)
}

fn quote(text: &[u8]) -> String {
    String::from_utf8_lossy(text).chars().take(QUOTED).collect()
}

/// An error and what it came from.
fn chain(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
