//! The external verifier, against servers that behave in every way.

use axum::{Json, Router, http::StatusCode, response::IntoResponse, routing::post};
use onpolicy_plugin_api::{Attempt, Message, Options, Plugins, Problem, Role, Score, Verifier};
use onpolicy_trainer::builtins;
use serde_json::{Value, json};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// A server on a free port; it goes away with its runtime.
struct Server {
    url: String,
    _runtime: tokio::runtime::Runtime,
}

impl Server {
    fn start(app: Router) -> Self {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}/judge", listener.local_addr().unwrap());
        runtime.spawn(async move { axum::serve(listener, app).await });
        Self { url, _runtime: runtime }
    }

    /// A server that answers every post by `answer`, which is told how often it was asked before.
    fn answering<F, R>(answer: F) -> Self
    where
        F: Fn(usize, Value) -> R + Clone + Send + Sync + 'static,
        R: IntoResponse + 'static,
    {
        let asked = Arc::new(AtomicUsize::new(0));
        let handler = move |Json(body): Json<Value>| {
            let before = asked.fetch_add(1, Ordering::SeqCst);
            let response = answer(before, body).into_response();
            async move { response }
        };
        Self::start(Router::new().route("/judge", post(handler)))
    }

    fn verifier(&self, mut options: Value) -> Box<dyn Verifier> {
        options["url"] = self.url.clone().into();
        make(options).unwrap()
    }
}

fn make(mut options: Value) -> Result<Box<dyn Verifier>, String> {
    let options = options.as_object_mut().unwrap();
    options.entry("backoff_seconds").or_insert(0.01.into());
    let plugins = builtins::register(Plugins::default(), 0);
    plugins.make_verifier("http", &Options(options.clone())).map_err(|e| e.to_string())
}

fn problem() -> Problem {
    let system = Message { role: Role::System, content: "Be brief.".into() };
    Problem { messages: vec![system, Message::user("What is 3+5?")], answer: "8".into() }
}

/// Judges one attempt per completion.
fn judge(verifier: &dyn Verifier, completions: &[&str]) -> Vec<Score> {
    let problem = problem();
    let attempts: Vec<Attempt<'_>> = completions
        .iter()
        .map(|completion| Attempt {
            problem: &problem,
            completion,
            truncated: *completion == "cut",
        })
        .collect();
    verifier.verify(&attempts)
}

/// The reason for which all of the scores failed.
fn reason(scores: &[Score]) -> String {
    let reasons: Vec<&str> = scores
        .iter()
        .map(|score| match score {
            Score::Failed(error) => error.0.as_str(),
            Score::Reward(reward) => panic!("judged: {reward}"),
        })
        .collect();
    assert!(reasons.windows(2).all(|pair| pair[0] == pair[1]), "{reasons:?}");
    reasons[0].to_owned()
}

/// Rewards a completion that equals its answer.
fn honest(_: usize, body: Value) -> Json<Value> {
    let right = |sample: &Value| f64::from(u8::from(sample["completion"] == sample["answer"]));
    let samples = body["samples"].as_array().unwrap();
    Json(json!({ "rewards": samples.iter().map(right).collect::<Vec<f64>>() }))
}

#[test]
fn right_answers_and_the_body_that_is_posted() {
    let seen = Arc::new(Mutex::new(Value::Null));
    let record = Arc::clone(&seen);
    let server = Server::answering(move |asked, body| {
        *record.lock().unwrap() = body.clone();
        honest(asked, body)
    });
    let verifier = server.verifier(json!({}));
    let scores = judge(&*verifier, &["8", "cut"]);
    assert_eq!(scores, [Score::Reward(1.0), Score::Reward(0.0)]);
    let prompt = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 3+5?"},
    ]);
    let expected = json!({"samples": [
        {"prompt": prompt, "completion": "8", "answer": "8", "truncated": false},
        {"prompt": prompt, "completion": "cut", "answer": "8", "truncated": true},
    ]});
    assert_eq!(*seen.lock().unwrap(), expected);
    assert!(judge(&*verifier, &[]).is_empty());
}

#[test]
fn batches_are_put_together_in_order() {
    let server = Server::answering(|asked, body| {
        let size = body["samples"].as_array().unwrap().len();
        assert!(size <= 3);
        std::thread::sleep(Duration::from_millis(if asked == 0 { 50 } else { 0 }));
        honest(asked, body)
    });
    let verifier = server.verifier(json!({"batch_size": 3, "concurrency": 2}));
    let completions: Vec<&str> = (0..10).map(|i| if i % 3 == 0 { "8" } else { "9" }).collect();
    let expected: Vec<Score> =
        (0..10).map(|i| Score::Reward(if i % 3 == 0 { 1.0 } else { 0.0 })).collect();
    assert_eq!(judge(&*verifier, &completions), expected);
}

#[test]
fn null_fails_its_own_sample_only() {
    let server = Server::answering(|_, _| Json(json!({"rewards": [0.25, null, 1e300]})));
    let scores = judge(&*server.verifier(json!({})), &["a", "b", "c"]);
    assert_eq!(scores[0], Score::Reward(0.25));
    assert!(reason(&scores[1..2]).contains("could not judge"));
    assert!(reason(&scores[2..]).contains("reward inf"));
}

#[test]
fn a_failure_that_passes_is_tried_again() {
    let server = Server::answering(|asked, body| match asked {
        0 => (StatusCode::INTERNAL_SERVER_ERROR, "starting").into_response(),
        1 => StatusCode::TOO_MANY_REQUESTS.into_response(),
        _ => honest(asked, body).into_response(),
    });
    let scores = judge(&*server.verifier(json!({"retries": 2})), &["8"]);
    assert_eq!(scores, [Score::Reward(1.0)]);
}

#[test]
fn a_failure_that_stays_ends_after_the_tries() {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let server = Server::answering(move |_, _| {
        count.fetch_add(1, Ordering::SeqCst);
        (StatusCode::BAD_GATEWAY, "down")
    });
    let text = reason(&judge(&*server.verifier(json!({"retries": 2})), &["8", "9"]));
    assert!(text.contains("/judge: HTTP 502: down (3 tries)"), "{text}");
    assert_eq!(asked.load(Ordering::SeqCst), 3);
}

#[test]
fn a_refusal_is_not_tried_again() {
    let server = Server::answering(|_, _| (StatusCode::UNAUTHORIZED, "who are you"));
    let text = reason(&judge(&*server.verifier(json!({})), &["8"]));
    assert!(text.contains("HTTP 401: who are you (1 try)"), "{text}");
}

#[test]
fn wrong_answers_of_the_server_fail() {
    let cases: [(&'static str, &str); 5] = [
        ("{\"rewards\": [1.0]}", "1 rewards for 2 samples"),
        ("{\"rewards\": [1, 1, 1]}", "3 rewards for 2 samples"),
        ("{\"scores\": [1, 1]}", "missing field `rewards`"),
        ("<html>\u{e9}", "unexpected answer"),
        ("{\"rewards\": [\"1\", 2]}", "unexpected answer"),
    ];
    for (answer, expected) in cases {
        let server = Server::answering(move |_, _| answer);
        let text = reason(&judge(&*server.verifier(json!({})), &["8", "9"]));
        assert!(text.contains(expected), "{text}");
    }
}

/// A server that takes connections and says nothing.
fn silent() -> (std::net::TcpListener, String) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    (listener, url)
}

#[test]
fn a_server_that_hangs_runs_into_the_time_limit_of_a_try() {
    let (_listener, url) = silent();
    let options = json!({"url": url, "timeout_seconds": 0.1, "retries": 1});
    let start = Instant::now();
    let text = reason(&judge(&*make(options).unwrap(), &["8"]));
    assert!(text.contains("no answer within 0.1 s (2 tries)"), "{text}");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[test]
fn the_deadline_holds_over_all_tries_and_batches() {
    let (_listener, url) = silent();
    let options = json!({
        "url": url, "timeout_seconds": 60, "deadline_seconds": 0.3, "retries": 100,
        "batch_size": 1, "concurrency": 1,
    });
    let start = Instant::now();
    let scores = judge(&*make(options).unwrap(), &["8"; 20]);
    assert_eq!(scores.len(), 20);
    assert!(scores.iter().all(|score| matches!(score, Score::Failed(_))));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[test]
fn nobody_there() {
    let (listener, url) = silent();
    drop(listener);
    let text = reason(&judge(&*make(json!({"url": url, "retries": 1})).unwrap(), &["8"]));
    assert!(text.contains("(2 tries)"), "{text}");
}

#[test]
fn it_may_be_called_and_dropped_inside_an_async_runtime() {
    let server = Server::answering(honest);
    let url = server.url.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let scores = runtime.block_on(async move {
        let verifier = make(json!({"url": url})).unwrap();
        judge(&*verifier, &["8"])
    });
    assert_eq!(scores, [Score::Reward(1.0)]);
}

#[test]
fn headers_are_sent() {
    let app = Router::new().route(
        "/judge",
        post(|headers: axum::http::HeaderMap| async move {
            let given = headers.get("authorization").is_some_and(|v| v == "Bearer k");
            let json = headers.get("content-type").is_some_and(|v| v == "application/json");
            Json(json!({"rewards": [u8::from(given && json)]}))
        }),
    );
    let server = Server::start(app);
    let options = json!({"headers": {"Authorization": "Bearer k"}});
    assert_eq!(judge(&*server.verifier(options), &["8"]), [Score::Reward(1.0)]);
}

#[test]
fn options_are_checked() {
    let refusal = |options: Value| make(options).err().expect("it should be refused");
    assert!(refusal(json!({})).contains("missing field `url`"));
    assert!(refusal(json!({"url": "nowhere"})).contains("url = 'nowhere'"));
    assert!(refusal(json!({"url": "ftp://h/"})).contains("must begin with http"));
    assert!(refusal(json!({"url": "http://h", "retry": 1})).contains("unknown field `retry`"));
    let url = "http://h";
    assert!(refusal(json!({"url": url, "batch_size": 0})).contains("batch_size = 0"));
    assert!(refusal(json!({"url": url, "timeout_seconds": 0})).contains("timeout_seconds = 0"));
    assert!(
        refusal(json!({"url": url, "headers": {"a b": "c"}})).contains("'a b' names no header")
    );
    assert!(refusal(json!({"url": url, "headers": {"a": "c\n"}})).contains("header 'a'"));
}
