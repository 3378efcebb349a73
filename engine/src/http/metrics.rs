//! What the server counts and times, and the route that shows it. The engine's own counters are
//! recorded by the engine.

use super::Shared;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
pub use metrics_exporter_prometheus::PrometheusHandle;
use metrics_exporter_prometheus::{BuildError, PrometheusBuilder};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Requests answered, by `route` and `status`.
pub const REQUESTS: &str = "onpolicy_http_requests_total";
/// Seconds until a response began, by `route`.
pub const RESPONSE_SECONDS: &str = "onpolicy_http_response_seconds";
/// Generating requests that are not over.
pub const IN_FLIGHT: &str = "onpolicy_http_generations_in_flight";
/// Seconds until the first token of a request, by `route`.
pub const FIRST_TOKEN_SECONDS: &str = "onpolicy_time_to_first_token_seconds";
/// Seconds per token of a sample after its first, by `route`.
pub const TOKEN_SECONDS: &str = "onpolicy_time_per_output_token_seconds";
/// Seconds until all samples of a request were finished, by `route`.
pub const REQUEST_SECONDS: &str = "onpolicy_request_seconds";

/// Upper bounds of the histograms' buckets, in seconds.
const BUCKETS: [f64; 18] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0, 120.0, 300.0,
];
/// How often recorded times are folded into their histograms when nobody scrapes.
const UPKEEP: Duration = Duration::from_secs(5);

/// Makes the process's recorder, with buckets for every name that ends in `_seconds`.
///
/// # Errors
/// The process has a recorder already.
pub fn install() -> Result<PrometheusHandle, BuildError> {
    use metrics_exporter_prometheus::Matcher;
    let builder = PrometheusBuilder::new();
    let seconds = Matcher::Suffix("_seconds".into());
    let handle = builder.set_buckets_for_metric(seconds, &BUCKETS)?.install_recorder()?;
    describe();
    Ok(handle)
}

fn describe() {
    describe_counter!(REQUESTS, "Requests answered, by route and status.");
    describe_gauge!(IN_FLIGHT, "Generating requests that are not over.");
    describe_histogram!(RESPONSE_SECONDS, "Seconds until a response began.");
    describe_histogram!(FIRST_TOKEN_SECONDS, "Seconds until a request's first token.");
    describe_histogram!(TOKEN_SECONDS, "Seconds per token of a sample after its first.");
    describe_histogram!(REQUEST_SECONDS, "Seconds until all samples were finished.");
}

/// The recorder's handle, kept in order.
pub(super) struct Recorder {
    handle: PrometheusHandle,
    last_upkeep: Mutex<Instant>,
}

impl Recorder {
    pub(super) fn new(handle: PrometheusHandle) -> Self {
        Self { handle, last_upkeep: Mutex::new(Instant::now()) }
    }

    /// Without this, recorded times pile up between scrapes.
    fn keep_up(&self) {
        let Ok(mut last) = self.last_upkeep.try_lock() else { return };
        if last.elapsed() >= UPKEEP {
            *last = Instant::now();
            self.handle.run_upkeep();
        }
    }
}

/// `GET /metrics`.
#[utoipa::path(
    get, path = "/metrics", operation_id = "metrics", tag = "server",
    responses(
        (status = 200, description = "Prometheus text", body = String, content_type = "text/plain"),
        super::openapi::errors::Plain,
    ),
)]
pub async fn show(State(state): Shared) -> Response {
    const TEXT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, TEXT)], state.recorder.handle.render()).into_response()
}

/// Counts and times every request. Paths that match no route share one label.
pub async fn track(State(state): Shared, request: Request, next: Next) -> Response {
    let start = Instant::now();
    let path = request.extensions().get::<MatchedPath>();
    let route = path.map_or_else(|| "unmatched".to_string(), |p| p.as_str().to_string());
    let response = next.run(request).await;
    let status = response.status().as_u16().to_string();
    counter!(REQUESTS, "route" => route.clone(), "status" => status).increment(1);
    histogram!(RESPONSE_SECONDS, "route" => route).record(start.elapsed());
    state.recorder.keep_up();
    response
}

/// Times one generating request, and counts it as long as it lives.
pub struct RequestClock {
    /// The route's path.
    pub route: &'static str,
    start: Instant,
    has_token: bool,
}

impl RequestClock {
    /// Starts to count.
    pub fn start(route: &'static str) -> Self {
        gauge!(IN_FLIGHT).increment(1);
        Self { route, start: Instant::now(), has_token: false }
    }

    /// Notes a token.
    pub fn token(&mut self) {
        if !std::mem::replace(&mut self.has_token, true) {
            histogram!(FIRST_TOKEN_SECONDS, "route" => self.route).record(self.start.elapsed());
        }
    }

    /// Notes that all samples are finished.
    pub fn finish(&self) {
        histogram!(REQUEST_SECONDS, "route" => self.route).record(self.start.elapsed());
    }
}

impl Drop for RequestClock {
    fn drop(&mut self) {
        gauge!(IN_FLIGHT).decrement(1);
    }
}

/// Times the tokens of one sample.
pub struct SampleClock {
    route: &'static str,
    first: Option<Instant>,
    last: Option<Instant>,
    gaps: u32,
}

impl SampleClock {
    /// A sample without tokens.
    pub fn new(route: &'static str) -> Self {
        Self { route, first: None, last: None, gaps: 0 }
    }

    /// Notes a token.
    pub fn token(&mut self) {
        let now = Instant::now();
        match self.first {
            None => self.first = Some(now),
            Some(_) => self.gaps += 1,
        }
        self.last = Some(now);
    }

    /// Notes the end of the sample.
    pub fn finish(&self) {
        if let (Some(first), Some(last), 1..) = (self.first, self.last, self.gaps) {
            let each = (last - first) / self.gaps;
            histogram!(TOKEN_SECONDS, "route" => self.route).record(each);
        }
    }
}
