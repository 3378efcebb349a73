//! The native engine from the outside: what it promises whatever else goes on.

mod common;
#[path = "engine/updates.rs"]
mod updates;

use common::{assert_close, engine, floats, golden, ids, json, tiny, tiny_in};
use onpolicy_engine::{
    collect::{CollectError, Sample, Samples, collect, submit},
    engine::{EngineConfig, EngineHandle, OnUpdate},
};
use onpolicy_plugin_api::{
    Engine, EngineError, Event, FinishReason, Grammar, PauseMode, Request, SamplingParams, Sink,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};
use tch::{Kind, Tensor};

const ROOMY: usize = 8 << 20;

fn config(kv_memory: usize) -> EngineConfig {
    EngineConfig { kv_memory, max_num_seqs: 32, ..EngineConfig::default() }
}

/// A native engine, and two that compute by libtorch's operations: one takes a step after the other, one
/// plans and delivers while a step is computed.
fn engines(name: &str, config: EngineConfig) -> [EngineHandle; 3] {
    let wide = tiny_in(name, Kind::Double);
    let by_libtorch = |ahead| EngineConfig { async_scheduling: Some(ahead), ..config };
    let [each, ahead] = [false, true].map(|ahead| engine(&wide, by_libtorch(ahead)));
    [engine(&tiny(name), config), each, ahead]
}

fn prompt(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| 3 + (seed * 31 + i * 7) % 150).collect()
}

fn request(seed: u32, len: usize, params: SamplingParams) -> Request {
    Request::new(prompt(seed, len), params)
}

fn sampled(n: usize, max_tokens: usize, seed: u64) -> SamplingParams {
    SamplingParams {
        n,
        max_tokens,
        seed: Some(seed),
        ignore_eos: true,
        ..SamplingParams::default()
    }
}

fn run(engine: &EngineHandle, requests: Vec<Request>) -> Vec<Samples> {
    let deadline = Instant::now() + Duration::from_secs(60);
    collect(engine, requests, deadline, &mut || {}).expect("the engine answers")
}

fn tokens(sample: &Sample) -> Vec<u32> {
    sample.tokens.iter().map(|token| token.id).collect()
}

fn all_tokens(groups: &[Samples]) -> Vec<Vec<u32>> {
    groups.iter().flat_map(|group| group.samples.iter().map(tokens)).collect()
}

fn blocks_used(engine: &EngineHandle) -> usize {
    engine.stats().expect("the engine runs").blocks_used
}

#[test]
fn a_seeded_request_does_not_depend_on_its_batch() {
    let checkpoint = tiny("qwen3");
    let engine = engine(&checkpoint, config(ROOMY));
    let seeded = request(1, 21, sampled(3, 40, 7));
    let alone = all_tokens(&run(&engine, vec![seeded.clone()]));
    assert_ne!(alone[0], alone[1], "every sample has a stream of its own");
    let others = (0..6).map(|i| request(i + 2, 5 + 9 * i as usize, sampled(2, 30, u64::from(i))));
    let mut crowd: Vec<Request> = others.collect();
    crowd.insert(3, seeded);
    assert_eq!(all_tokens(&run(&engine, crowd)[3..4]), alone);
}

#[test]
fn a_full_pool_preempts_and_changes_no_token() {
    let checkpoint = tiny("llama-tied");
    let requests: Vec<Request> =
        (0..12).map(|i| request(i, 20 + i as usize, sampled(2, 60, u64::from(i)))).collect();
    let roomy = engine(&checkpoint, config(ROOMY));
    let want = all_tokens(&run(&roomy, requests.clone()));
    // 24 samples grow to 92 tokens or so, 6 blocks each; the pool has 40.
    let block = onpolicy_engine::kv_cache::KvCache::block_bytes(&checkpoint.config);
    let tight = engine(&checkpoint, config(40 * block));
    let got = all_tokens(&run(&tight, requests));
    assert!(tight.stats().expect("it runs").preemptions > 0, "the pool was never full");
    assert_eq!(got, want);
    assert_eq!((blocks_used(&tight), blocks_used(&roomy)), (0, 0));
}

#[test]
fn prompt_logprobs_meet_the_reference_at_every_chunk_size() {
    let checkpoint = tiny("llama3-rope");
    let reference = json(&golden("tiny/llama3-rope/reference.json"));
    for max_batched_tokens in [1, 3, 7, 16, 39, 256] {
        let limits = EngineConfig { max_num_seqs: 1, max_batched_tokens, ..config(ROOMY) };
        let engine = engine(&checkpoint, limits);
        for row in [0, 1, 0] {
            let params =
                SamplingParams { prompt_logprobs: Some(0), max_tokens: 1, ..sampled(1, 1, 0) };
            let prompt = ids(&reference["input_ids"][row]);
            let answer = run(&engine, vec![Request::new(prompt, params)]).remove(0);
            let want = floats(&reference["next_token_logprobs"][row]);
            assert_close(&answer.prompt_logprobs, &want, 2e-4, "prompt log-prob");
        }
    }
}

#[test]
fn a_group_shares_its_prompt() {
    let checkpoint = tiny("llama-tied");
    // A guess that comes true saves a step.
    let each = EngineConfig { num_speculative_tokens: Some(0), ..config(ROOMY) };
    let engine = engine(&checkpoint, each);
    let greedy = SamplingParams { temperature: 0.0, ..sampled(8, 20, 0) };
    let before = engine.stats().expect("it runs").steps;
    let answer = run(&engine, vec![request(1, 100, greedy.clone())]).remove(0);
    let steps = engine.stats().expect("it runs").steps - before;
    assert_eq!(steps, 20, "the prompt is computed once, and its row gives all first tokens");
    let alone = SamplingParams { n: 1, ..greedy };
    let alone = tokens(&run(&engine, vec![request(1, 100, alone)])[0].samples[0]);
    assert!(answer.samples.iter().all(|sample| tokens(sample) == alone));
}

#[test]
fn stop_tokens_end_a_sample_but_not_before_min_tokens() {
    let checkpoint = tiny("qwen2");
    let engine = engine(&checkpoint, config(ROOMY));
    let free = run(&engine, vec![request(4, 12, sampled(1, 30, 5))]).remove(0);
    let free = tokens(&free.samples[0]);
    let stop = free[6];
    let first = free.iter().position(|&id| id == stop).expect("it is there");
    let params = SamplingParams { stop_token_ids: vec![stop], ..sampled(1, 30, 5) };
    let stopped = run(&engine, vec![request(4, 12, params.clone())]).remove(0);
    assert_eq!(tokens(&stopped.samples[0]), free[..=first]);
    assert_eq!(stopped.samples[0].finish, FinishReason::Stop);
    let params = SamplingParams { min_tokens: 25, ..params };
    let later = run(&engine, vec![request(4, 12, params)]).remove(0);
    let later = tokens(&later.samples[0]);
    assert!(later.len() >= 25 && !later[..25].contains(&stop), "{later:?}");
}

#[test]
fn refusals_name_the_field_and_start_nothing() {
    let checkpoint = tiny("llama-tied");
    let engine = engine(&checkpoint, config(ROOMY));
    let refused = |request: Request| {
        let deadline = Instant::now() + Duration::from_secs(5);
        match collect(&engine, vec![request], deadline, &mut || {}) {
            Err(CollectError::Engine(EngineError::Invalid { field, .. })) => field,
            other => panic!("{other:?}"),
        }
    };
    let params = sampled(1, 4, 0);
    assert_eq!(refused(request(0, 0, params.clone())), "prompt");
    assert_eq!(refused(request(0, 256, params.clone())), "prompt");
    assert_eq!(refused(Request::new(vec![160], params.clone())), "prompt");
    assert_eq!(refused(request(0, 4, sampled(33, 4, 0))), "n");
    let hot = SamplingParams { temperature: -1.0, ..params.clone() };
    assert_eq!(refused(request(0, 4, hot)), "temperature");
    let stop = SamplingParams { stop_token_ids: vec![999], ..params };
    assert_eq!(refused(request(0, 4, stop)), "stop_token_ids");
    assert_eq!(blocks_used(&engine), 0);
}

struct Listener {
    events: mpsc::Sender<Event>,
    gone: Arc<AtomicBool>,
}

impl Sink for Listener {
    fn send(&mut self, event: Event) -> bool {
        self.events.send(event).is_ok()
    }

    fn is_closed(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }
}

fn listen(engine: &EngineHandle, request: Request) -> (mpsc::Receiver<Event>, Arc<AtomicBool>) {
    let (events, inbox) = mpsc::channel();
    let gone = Arc::new(AtomicBool::new(false));
    let sink = Listener { events, gone: gone.clone() };
    engine.submit(request, Box::new(sink)).expect("the request is taken");
    (inbox, gone)
}

/// The next step or the one after it frees the blocks; the samples would run for 200 more.
fn wait_until_free(engine: &EngineHandle, what: &str) {
    let steps = || engine.stats().expect("it runs").steps;
    let before = steps();
    while blocks_used(engine) > 0 {
        assert!(steps() < before + 100, "{what}");
    }
}

/// What comes of requests that are made one after another.
fn events_of(engine: &EngineHandle, requests: &[SamplingParams]) -> Vec<Vec<Event>> {
    let requests = requests.iter().zip(0..);
    let inboxes: Vec<_> =
        requests.map(|(params, seed)| listen(engine, request(seed, 20, params.clone()))).collect();
    let events = |inbox: &mpsc::Receiver<Event>| -> Vec<Event> {
        let next = || inbox.recv_timeout(Duration::from_secs(20)).ok();
        std::iter::from_fn(next).collect()
    };
    inboxes.iter().map(|(inbox, _)| events(inbox)).collect()
}

fn ends(events: &[Vec<Event>]) -> Vec<usize> {
    let end = |event: &&Event| matches!(event, Event::Finished { .. });
    events.iter().map(|events| events.iter().filter(end).count()).collect()
}

/// Whatever a request asks for, and however it ends, what comes of it is the same.
#[test]
fn steps_that_are_planned_ahead_give_the_same() {
    let [_, each, ahead] = engines("qwen3", config(ROOMY));
    let stops = SamplingParams { stop_token_ids: (0..40).collect(), ..sampled(8, 60, 2) };
    let prompt_logprobs = SamplingParams { prompt_logprobs: Some(0), ..sampled(2, 9, 1) };
    let plain = vec![prompt_logprobs, stops, sampled(1, 1, 4), sampled(3, 50, 5)];
    let got = events_of(&ahead, &plain);
    assert_eq!(got, events_of(&each, &plain));
    assert_eq!(ends(&got), [2, 8, 1, 3]);
    let stats = [&each, &ahead].map(|engine| engine.stats().expect("it runs"));
    assert_eq!(stats[0].steps_ahead, 0);
    assert!(stats[1].steps_ahead > 30, "{:?}", stats[1]);
    // Those that have to know the tokens before, and all logits, beside others.
    let base = || sampled(2, 30, 3);
    let penalties = SamplingParams { frequency_penalty: 1.0, ..base() };
    let bad_words = SamplingParams { bad_words: vec![vec![7], vec![8, 9]], ..base() };
    let top = SamplingParams { top_p: 0.7, top_logprobs: 3, ..base() };
    let grammar = Some(Grammar::Regex("(t[0-9]+ ?)*".into()));
    let grammar = SamplingParams { grammar, ignore_eos: false, ..base() };
    let all = [plain, vec![penalties, bad_words, top, grammar]].concat();
    assert_eq!(events_of(&ahead, &all), events_of(&each, &all));
}

#[test]
fn a_paused_engine_holds_no_token_back() {
    for engine in engines("llama-tied", config(ROOMY)) {
        let (inbox, _gone) = listen(&engine, request(1, 20, sampled(1, 200, 0)));
        let mut version = 0;
        while version < 20 {
            match inbox.recv_timeout(Duration::from_secs(20)) {
                Ok(Event::Token { token, .. }) => assert_eq!(token.weight_version, version),
                _ => break,
            }
            engine.pause(PauseMode::Keep, false).expect("it pauses");
            inbox.try_iter().for_each(drop);
            engine.update(|| Ok(())).expect("it is applied");
            version += 1;
            assert_eq!(inbox.try_iter().count(), 0, "all that was computed came before");
            engine.resume().expect("it goes on");
        }
        assert!(version > 2, "the sample ended after {version} pauses");
    }
}

#[test]
fn whoever_stops_listening_frees_the_blocks() {
    for engine in engines("llama-tied", config(ROOMY)) {
        let long = || request(1, 20, sampled(4, 230, 0));
        let (inbox, gone) = listen(&engine, long());
        let limit = Duration::from_secs(10);
        inbox.recv_timeout(limit).expect("a token");
        assert!(blocks_used(&engine) > 0);
        gone.store(true, Ordering::Relaxed);
        wait_until_free(&engine, "a closed sink ends it");
        let (inbox, _gone) = listen(&engine, long());
        inbox.recv_timeout(limit).expect("a token");
        drop(inbox);
        wait_until_free(&engine, "and so does a dropped one");
    }
}

#[test]
fn every_sample_ends_once_when_some_are_aborted() {
    let engines = engines("llama-tied", config(ROOMY));
    for (engine, running) in engines.iter().flat_map(|engine| [(engine, false), (engine, true)]) {
        let (events, inbox) = mpsc::channel();
        let sink = Listener { events, gone: Arc::default() };
        let id = engine.submit(request(1, 20, sampled(3, 50, 0)), Box::new(sink)).expect("taken");
        if running {
            inbox.recv_timeout(Duration::from_secs(10)).expect("a token");
        }
        engine.abort(id, Some(1));
        let mut ends = Vec::new();
        while let Ok(event) = inbox.recv_timeout(Duration::from_secs(10)) {
            match event {
                Event::Finished { index, reason } => ends.push((index, reason)),
                Event::Token { index, .. } => {
                    assert!(ends.iter().all(|(ended, _)| *ended != index), "after its end");
                }
                other => panic!("{other:?}"),
            }
        }
        ends.sort_by_key(|(index, _)| *index);
        let length = FinishReason::Length;
        assert_eq!(ends, [(0, length), (1, FinishReason::Abort), (2, length)]);
        engine.abort(id, None);
        assert_eq!(blocks_used(engine), 0);
    }
}

#[test]
fn what_nobody_waits_for_is_given_up() {
    let checkpoint = tiny("llama-tied");
    let engine = engine(&checkpoint, config(ROOMY));
    let (began, begun) = mpsc::channel();
    let (leave, left) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        // Holds the engine until the request is in and given up.
        let held = engine.clone();
        scope.spawn(move || {
            held.update(move || {
                began.send(()).map_err(|e| e.to_string())?;
                left.recv().map_err(|e| e.to_string())
            })
        });
        begun.recv().expect("the update runs");
        drop(submit(&engine, vec![request(1, 20, sampled(2, 200, 0))]).expect("taken"));
        leave.send(()).expect("the update waits");
    });
    let deadline = Instant::now() + Duration::from_secs(10);
    while engine.stats().expect("the engine runs").waiting > 0 {
        assert!(Instant::now() < deadline, "it still waits");
    }
    let stats = engine.stats().expect("the engine runs");
    assert_eq!((stats.steps, stats.running, stats.blocks_used), (0, 0, 0));
}

#[test]
fn shutting_down_fails_what_runs_and_what_comes() {
    for engine in engines("llama-tied", config(ROOMY)) {
        let (inbox, _gone) = listen(&engine, request(1, 20, sampled(2, 230, 0)));
        inbox.recv_timeout(Duration::from_secs(10)).expect("a token");
        engine.shutdown();
        let last = inbox.iter().last();
        assert!(
            matches!(last, Some(Event::Failed { error: EngineError::Stopped })),
            "the last event is {last:?}"
        );
        let deadline = Instant::now() + Duration::from_secs(5);
        let late = collect(&engine, vec![request(1, 4, sampled(1, 4, 0))], deadline, &mut || {});
        assert_eq!(late, Err(CollectError::Engine(EngineError::Stopped)));
        assert_eq!(engine.update(|| Ok(())), Err(EngineError::Stopped));
    }
}
