//! What a request asks for, it gets.

use crate::support::{ask, ask_all, greedy, ids, serve, tiny, tiny_dir};
use onpolicy_engine::mistral::{MistralEngine, Options};
use onpolicy_plugin_api::{
    Engine, EngineError, Event, FinishReason, PauseMode, Request, SamplingParams, Sink,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    time::Duration,
};

const LIMIT: Duration = Duration::from_secs(60);

/// Passes events on, and can stop to listen.
struct Tap {
    events: Sender<Event>,
    closed: Arc<AtomicBool>,
}

impl Sink for Tap {
    fn send(&mut self, event: Event) -> bool {
        !self.is_closed() && self.events.send(event).is_ok()
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }
}

fn tap() -> (Box<dyn Sink>, Receiver<Event>, Arc<AtomicBool>) {
    let (events, inbox) = channel();
    let closed = Arc::new(AtomicBool::new(false));
    (Box::new(Tap { events, closed: closed.clone() }), inbox, closed)
}

fn request(params: SamplingParams) -> Request {
    Request::new(vec![5, 6, 7], params)
}

/// The next token's sample.
fn token(inbox: &Receiver<Event>) -> usize {
    match inbox.recv_timeout(LIMIT).expect("an event in time") {
        Event::Token { index, .. } => index,
        other => panic!("{other:?} instead of a token"),
    }
}

/// Waits for the end of one sample.
fn finished(inbox: &Receiver<Event>) -> (usize, FinishReason) {
    loop {
        match inbox.recv_timeout(LIMIT).expect("an event in time") {
            Event::Token { .. } => {}
            Event::Finished { index, reason } => return (index, reason),
            other => panic!("{other:?}"),
        }
    }
}

fn answers(engine: &MistralEngine) {
    assert_eq!(ask(engine, &[5, 6, 7], greedy(4))[0].tokens.len(), 4);
}

#[test]
fn n_samples_of_one_seed_are_always_the_same() {
    let engine = tiny("qwen2");
    let params = |seed| SamplingParams {
        n: 8,
        seed: Some(seed),
        max_tokens: 12,
        ignore_eos: true,
        ..SamplingParams::default()
    };
    let all = |seed| ask(&engine, &[9, 8, 7], params(seed)).iter().map(ids).collect::<Vec<_>>();
    let first = all(1);
    assert_eq!(first.len(), 8);
    assert!(first.iter().all(|ids| ids.len() == 12));
    assert!((1..8).all(|i| first[i] != first[0]), "samples differ");
    assert_eq!(all(1), first);
    assert_ne!(all(2), first);
    let unseeded = || ask(&engine, &[9, 8, 7], SamplingParams { seed: None, ..params(0) });
    assert_ne!(ids(&unseeded()[0]), ids(&unseeded()[0]));
}

#[test]
fn prompts_of_many_lengths_do_not_touch_each_other() {
    let engine = tiny("llama-tied");
    let prompt = |i: usize| (0..=i * 3).map(|t| (t * 7 % 150 + 3) as u32).collect::<Vec<_>>();
    let alone: Vec<Vec<u32>> =
        (0..6).map(|i| ids(&ask(&engine, &prompt(i), greedy(16))[0])).collect();
    let requests = (0..6).map(|i| Request::new(prompt(i), greedy(16))).collect();
    let together: Vec<Vec<u32>> =
        ask_all(&engine, requests).iter().map(|samples| ids(&samples[0])).collect();
    assert_eq!(together, alone);
}

#[test]
fn samples_end_where_they_should() {
    let engine = tiny("llama-tied");
    let whole = ask(&engine, &[5, 6, 7], greedy(20)).remove(0);
    assert_eq!(whole.finish, FinishReason::Length);
    let all = ids(&whole);
    assert_eq!(all.len(), 20);
    for n in [1, 2, 7] {
        let sample = ask(&engine, &[5, 6, 7], greedy(n)).remove(0);
        assert_eq!((ids(&sample), sample.finish), (all[..n].to_vec(), FinishReason::Length));
    }
    let stop = all[9];
    let first = all.iter().position(|&id| id == stop).expect("it is there");
    let stopped = SamplingParams { stop_token_ids: vec![stop], ..greedy(20) };
    let sample = ask(&engine, &[5, 6, 7], stopped.clone()).remove(0);
    assert_eq!((ids(&sample), sample.finish), (all[..=first].to_vec(), FinishReason::Stop));
    let later = ask(&engine, &[5, 6, 7], SamplingParams { min_tokens: 15, ..stopped }).remove(0);
    assert!(ids(&later)[..14].iter().all(|&id| id != stop), "none before min_tokens");
    let longest = ask(&engine, &[5, 6, 7], greedy(100_000)).remove(0);
    assert_eq!((longest.tokens.len(), longest.finish), (256 - 3, FinishReason::Length));
    answers(&engine);
}

#[test]
fn the_likeliest_tokens_are_listed() {
    let engine = tiny("qwen3");
    let params = SamplingParams { top_logprobs: 5, ..greedy(6) };
    for token in &ask(&engine, &[5, 6, 7], params)[0].tokens {
        assert_eq!(token.top.len(), 5);
        assert_eq!(token.top[0], (token.id, token.stats.logprob));
        assert!(token.top.windows(2).all(|pair| pair[0].1 >= pair[1].1));
        assert_eq!(token.weight_version, 0);
    }
}

#[test]
fn aborted_and_abandoned_samples_make_room() {
    let engine = tiny("llama-tied");
    let (sink, inbox, _) = tap();
    let two = SamplingParams { n: 2, ..greedy(250) };
    let id = engine.submit(request(two.clone()), sink).expect("taken");
    let (sink, waiting, _) = tap();
    let second = engine.submit(request(two.clone()), sink).expect("taken");
    token(&inbox);
    engine.abort(second, Some(1));
    assert_eq!(finished(&waiting), (1, FinishReason::Abort));
    engine.abort(id, Some(0));
    assert_eq!(finished(&inbox), (0, FinishReason::Abort));
    assert_eq!(token(&inbox), 1, "its place was taken by the next");
    engine.abort(id, None);
    assert_eq!(finished(&inbox), (1, FinishReason::Abort));
    assert_eq!(token(&waiting), 0, "and by the next");
    engine.abort(id, None);
    engine.abort(second, None);
    assert_eq!(finished(&waiting), (0, FinishReason::Abort));
    assert!(inbox.try_recv().is_err() && waiting.try_recv().is_err(), "each ends once");
    let (sink, inbox, closed) = tap();
    engine.submit(request(two), sink).expect("taken");
    token(&inbox);
    closed.store(true, Ordering::Relaxed);
    answers(&engine);
}

#[test]
fn requests_of_lower_priority_numbers_begin_first() {
    let engine = tiny("llama-tied");
    let (sink, running, _) = tap();
    engine.submit(request(greedy(60)), sink).expect("taken");
    token(&running);
    let (events, inbox) = channel();
    for (number, priority) in [(0, 5), (1, -1), (2, 5), (3, 0)] {
        struct First(Sender<u32>, u32);
        impl Sink for First {
            fn send(&mut self, event: Event) -> bool {
                matches!(event, Event::Token { .. }) && self.0.send(self.1).is_ok()
            }
            fn is_closed(&self) -> bool {
                false
            }
        }
        let request = Request { priority, ..request(greedy(1)) };
        engine.submit(request, Box::new(First(events.clone(), number))).expect("taken");
    }
    let order: Vec<u32> = (0..4).map(|_| inbox.recv_timeout(LIMIT).expect("in time")).collect();
    assert_eq!(order, [1, 3, 0, 2]);
}

#[test]
fn a_full_queue_refuses() {
    let options = Options { max_waiting: 1, ..Options::default() };
    let engine = serve(&tiny_dir("llama-tied"), options);
    let (first, inbox, _) = tap();
    let id = engine.submit(request(greedy(250)), first).expect("runs");
    token(&inbox);
    let (second, _inbox, closed) = tap();
    engine.submit(request(greedy(4)), second).expect("waits");
    let (third, ..) = tap();
    let refused = engine.submit(request(greedy(4)), third);
    assert_eq!(refused, Err(EngineError::Overloaded { waiting: 1 }));
    closed.store(true, Ordering::Relaxed);
    let (fourth, ..) = tap();
    engine.submit(request(greedy(4)), fourth).expect("the one before has gone");
    engine.abort(id, None);
}

#[test]
fn a_paused_engine_begins_nothing() {
    let engine = tiny("llama-tied");
    let (sink, running, _) = tap();
    engine.submit(request(greedy(30)), sink).expect("taken");
    engine.pause(PauseMode::Wait, false).expect("paused");
    assert_eq!(finished(&running), (0, FinishReason::Length));
    let (sink, inbox, _) = tap();
    engine.submit(request(greedy(3)), sink).expect("taken");
    assert!(engine.is_paused());
    assert!(inbox.recv_timeout(Duration::from_millis(200)).is_err(), "nothing begins");
    engine.resume().expect("resumed");
    assert_eq!(finished(&inbox), (0, FinishReason::Length));
    let (sink, running, _) = tap();
    engine.submit(request(greedy(250)), sink).expect("taken");
    token(&running);
    engine.pause(PauseMode::Abort, true).expect("paused");
    assert_eq!(finished(&running), (0, FinishReason::Abort));
    engine.resume().expect("resumed");
    answers(&engine);
    let kept = engine.pause(PauseMode::Keep, false).expect_err("refused");
    assert!(kept.to_string().contains("pause with 'wait' or 'abort'"), "{kept}");
    assert!(!engine.is_paused());
}

#[test]
fn a_dropped_engine_fails_what_runs_and_waits() {
    let engine = tiny("llama-tied");
    let (first, running, _) = tap();
    let (second, waiting, _) = tap();
    engine.submit(request(greedy(250)), first).expect("taken");
    engine.submit(request(greedy(250)), second).expect("taken");
    token(&running);
    drop(engine);
    for inbox in [running, waiting] {
        let end = inbox.iter().find(|event| !matches!(event, Event::Token { .. }));
        assert_eq!(end, Some(Event::Failed { error: EngineError::Stopped }));
    }
}
