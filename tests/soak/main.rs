//! 2,000 requests of mixed kinds with clients that leave, time limits, aborts, pauses and weight
//! updates among them: every one ends exactly once, the answers are right, and nothing is left.

mod client;
mod ledger;
mod policy;
mod requests;

use client::{Ended, Told, send};
use ledger::{Ledger, Watched};
use onpolicy_engine::http::{
    self, AppState, Limits,
    connections::{ConnectionLimits, serve},
};
use onpolicy_plugin_api::{Engine, PauseMode};
use policy::{Owner, Policy};
use requests::{Client, Dice, ask};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};
use tokio::{net::TcpListener, runtime::Runtime, sync::oneshot};

const REQUESTS: u64 = 2000;
/// Clients at once.
const CLIENTS: usize = 24;
/// Requests after which memory is first looked at.
const WARM: u64 = 500;
/// How much more memory there may be at the end, in MiB: what the test itself keeps of the answers,
/// and what allocators hold back.
const GROWTH_MIB: u64 = 32;
/// How long a request may take for a client that hurries.
const HURRY: Duration = Duration::from_millis(4);

/// What this process holds, in MiB.
fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a size");
    line.trim().trim_end_matches("kB").trim().parse::<u64>().expect("a number") / 1024
}

/// What all clients do together.
struct Soak {
    urls: [String; 2],
    next: AtomicU64,
    done: AtomicU64,
    /// Answers that are checked at the end.
    greedy: Mutex<Vec<Told>>,
    /// How many requests ended how.
    ends: Mutex<BTreeMap<String, u64>>,
    warm_mib: AtomicU64,
}

impl Soak {
    async fn client(&self) {
        let http = reqwest::Client::new();
        loop {
            let number = self.next.fetch_add(1, SeqCst);
            if number >= REQUESTS {
                return;
            }
            self.one(&http, number).await;
            if self.done.fetch_add(1, SeqCst) + 1 == WARM {
                self.warm_mib.store(resident_mib(), SeqCst);
            }
        }
    }

    async fn one(&self, http: &reqwest::Client, number: u64) {
        let ask = ask(number);
        let hurries = ask.client == Client::Hurries;
        let ended = send(http, &self.urls[usize::from(hurries)], &ask).await;
        let how = match ended {
            Ended::Left => "left".to_string(),
            Ended::Refused(status) => {
                let right = match status {
                    400 => ask.invalid,
                    429 => true,
                    504 => hurries,
                    _ => false,
                };
                assert!(right, "{status} for {}", ask.body);
                status.to_string()
            }
            Ended::Answered(samples) => {
                assert!(!ask.invalid, "{}", ask.body);
                if ask.greedy {
                    self.greedy.lock().unwrap().extend(samples);
                }
                "answered".to_string()
            }
        };
        *self.ends.lock().unwrap().entry(how).or_default() += 1;
    }
}

/// What the owner of the engine does meanwhile. Returns how often each thing was done.
fn meddle(owner: &Owner, ledger: &Ledger, stop: &AtomicBool) -> BTreeMap<&'static str, u64> {
    let engine = &owner.engine;
    let mut dice = Dice(42);
    let mut times = BTreeMap::new();
    while !stop.load(SeqCst) {
        std::thread::sleep(Duration::from_millis(5 + dice.below(20)));
        let what = match dice.below(10) {
            0..4 => {
                owner.update();
                "update"
            }
            4 => pause(engine, PauseMode::Keep, &mut dice),
            5 => pause(engine, PauseMode::Wait, &mut dice),
            6 if dice.below(4) == 0 => pause(engine, PauseMode::Abort, &mut dice),
            7 => {
                engine.reset_prefix_cache().expect("reset");
                "reset"
            }
            8 if dice.below(4) == 0 => {
                engine.abort_all().expect("aborted");
                "abort all"
            }
            _ => {
                let Some(id) = ledger.recent(dice.below(CLIENTS as u64) as usize) else { continue };
                engine.abort(id, (dice.below(2) == 0).then_some(0));
                "abort"
            }
        };
        *times.entry(what).or_default() += 1;
    }
    times
}

fn pause(engine: &impl Engine, mode: PauseMode, dice: &mut Dice) -> &'static str {
    engine.pause(mode, dice.below(2) == 0).expect("paused");
    assert!(engine.is_paused());
    std::thread::sleep(Duration::from_millis(dice.below(30)));
    engine.resume().expect("resumed");
    assert!(!engine.is_paused());
    "pause"
}

/// A server on a free port; ends with the sender.
fn listen(
    runtime: &Runtime,
    policy: &Policy,
    engine: Arc<Watched>,
    (limits, metrics): (Limits, http::metrics::PrometheusHandle),
) -> (String, oneshot::Sender<()>) {
    let state = AppState::new(engine, policy.checkpoint.tokenizer.clone(), limits, metrics);
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let (stop, stopped) = oneshot::channel::<()>();
    let until = async {
        let _ = stopped.await;
    };
    runtime.spawn(serve(listener, http::app(state), ConnectionLimits::default(), until));
    (url, stop)
}

fn wait_until_idle(policy: &Policy) {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let stats = policy.engine.stats().expect("the engine runs");
        if (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0) {
            return;
        }
        assert!(Instant::now() < deadline, "something is left: {stats:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn two_thousand_requests_end_once_each_and_leave_nothing() {
    let started = Instant::now();
    let policy = Policy::load();
    let mut oracle = policy.oracle();
    let ledger = Arc::new(Ledger::default());
    let engine = Arc::new(Watched { engine: policy.engine.clone(), ledger: ledger.clone() });
    let metrics = http::metrics::install().expect("the only recorder of this process");
    let runtime = Runtime::new().expect("a runtime");
    let hurried = Limits { request_time: Some(HURRY), ..Limits::default() };
    let patient = (Limits::default(), metrics.clone());
    let (url, _patient) = listen(&runtime, &policy, engine.clone(), patient);
    let (hurried_url, _hurried) = listen(&runtime, &policy, engine, (hurried, metrics));
    let soak = Arc::new(Soak {
        urls: [url, hurried_url],
        next: AtomicU64::new(0),
        done: AtomicU64::new(0),
        greedy: Mutex::default(),
        ends: Mutex::default(),
        warm_mib: AtomicU64::new(0),
    });

    let stop = AtomicBool::new(false);
    let times = std::thread::scope(|scope| {
        let (owner, ledger, stop_meddling) = (policy.owner(), &ledger, &stop);
        let meddling = scope.spawn(move || meddle(&owner, ledger, stop_meddling));
        let clients = (0..CLIENTS).map(|_| {
            let soak = soak.clone();
            runtime.spawn(async move { soak.client().await })
        });
        let clients: Vec<_> = clients.collect();
        let ended = runtime.block_on(async {
            let mut ended = Ok(());
            for client in clients {
                ended = ended.and(client.await);
            }
            ended
        });
        stop.store(true, SeqCst);
        let times = meddling.join().expect("the owner did what it wanted");
        ended.expect("no client was disappointed");
        times
    });
    wait_until_idle(&policy);
    policy.engine.check().expect("the books are right");
    let failures = ledger.check();
    let (warm, end) = (soak.warm_mib.load(SeqCst), resident_mib());
    let seconds = started.elapsed().as_secs_f64();

    let samples = std::mem::take(&mut *soak.greedy.lock().unwrap());
    let mixed = samples.iter().filter(|s| s.versions.first() != s.versions.last()).count();
    for sample in samples.iter().filter(|s| !s.tokens.is_empty()) {
        oracle.check(&sample.prompt, &sample.tokens, &sample.versions);
    }
    let ends = soak.ends.lock().unwrap();
    println!(
        "{seconds:.1} s; {ends:?}; the owner: {times:?}; {} requests at the engine, {failures} \
         failed; {} greedy samples, {mixed} of several versions; {:?}; {warm} MiB after {WARM}, \
         {end} MiB at the end",
        ledger.requests(),
        samples.len(),
        policy.engine.stats().expect("the engine runs"),
    );
    assert_eq!(ends.values().sum::<u64>(), REQUESTS);
    for how in ["answered", "left", "400", "504"] {
        assert!(ends.get(how).is_some_and(|n| *n >= 10), "{how}: {ends:?}");
    }
    assert!(times["update"] >= 10 && times["abort"] >= 5, "{times:?}");
    assert!(samples.len() > 200 && mixed > 10, "{mixed} of {} greedy samples", samples.len());
    assert_eq!(failures, 0, "the engine failed");
    assert!(end <= warm + GROWTH_MIB, "{warm} MiB after {WARM} requests, {end} MiB at the end");
}
