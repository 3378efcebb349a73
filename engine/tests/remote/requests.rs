//! Requests: routing, retries, aborts, deadlines.

use crate::{
    fake::{Fake, Script},
    support::{Diary, answers, expected, ids, options, pool, request, start, until},
};
use onpolicy_engine::{collect::CollectError, remote::RemoteOptions};
use onpolicy_plugin_api::{Engine, EngineError, Event, FinishReason, Grammar, LogprobsMode};
use std::{
    sync::atomic::Ordering::SeqCst,
    time::{Duration, Instant},
};

fn slow(milliseconds: u64) -> Script {
    Script { pause: Duration::from_millis(milliseconds), ..Script::default() }
}

#[test]
fn both_dialects_are_found_out_and_answer_alike() {
    for fake in [Fake::vllm(Script::default()), Fake::sglang(Script::default())] {
        let engine = pool(&[&fake]);
        let info = engine.info();
        assert_eq!((info.name.as_str(), info.max_model_len), ("fake/model", 64));
        let groups = answers(&engine, vec![request(20, 3), request(30, 1)]).expect("answers");
        assert_eq!(ids(&groups[0]), expected(20, 3));
        assert_eq!(ids(&groups[1]), expected(30, 1));
        let token = &groups[0].samples[1].tokens[1];
        assert_eq!(token.stats.logprob, -22.0 / 64.0);
        assert!(token.stats.entropy.is_nan() && token.stats.baseline.is_nan());
        assert_eq!(groups[0].samples[1].finish, FinishReason::Stop);
    }
}

#[test]
fn statistics_of_our_own_server_are_used() {
    let fake = Fake::vllm(Script { policy: true, version: "9".into(), ..Script::default() });
    let engine = pool(&[&fake]);
    assert_eq!(engine.weight_version(), 9);
    let groups = answers(&engine, vec![request(1, 1)]).expect("answers");
    let token = &groups[0].samples[0].tokens[0];
    assert_eq!((token.stats.entropy, token.stats.baseline), (0.5, 0.25));
    assert_eq!(token.weight_version, 9);
}

#[test]
fn requests_go_where_least_is_under_way() {
    let fakes = [Fake::vllm(slow(200)), Fake::vllm(slow(200))];
    let engine = pool(&[&fakes[0], &fakes[1]]);
    let requests = (0..8).map(|number| request(number, 2)).collect();
    let groups = answers(&engine, requests).expect("answers");
    assert_eq!(ids(&groups[7]), expected(7, 2));
    for fake in &fakes {
        assert_eq!(fake.shared.most_running.load(SeqCst), 4);
    }
}

#[test]
fn a_server_that_dies_mid_request_costs_only_a_retry() {
    let (mut dying, alive) = (Fake::vllm(slow(60_000)), Fake::vllm(Script::default()));
    let engine = pool(&[&dying, &alive]);
    let diaries: Vec<Diary> = (0..6).map(|_| Diary::default()).collect();
    for (number, diary) in diaries.iter().enumerate() {
        let request = request(number as u32, 2);
        engine.submit(request, Box::new(diary.clone())).expect("it is taken");
    }
    until(|| dying.shared.running.load(SeqCst) > 0);
    dying.kill();
    let ended = |diary: &Diary| {
        let events = diary.all();
        events.iter().filter(|event| matches!(event, Event::Finished { .. })).count()
    };
    until(|| diaries.iter().all(|diary| ended(diary) == 2));
    std::thread::sleep(Duration::from_millis(100));
    for (number, diary) in diaries.iter().enumerate() {
        // Two samples of one and of two tokens, and both ends: nothing twice.
        let events = diary.all();
        assert_eq!(events.len(), 5, "{events:?}");
        let tokens = events.iter().filter_map(|event| match event {
            Event::Token { token, .. } => Some(token.id),
            _ => None,
        });
        assert_eq!(tokens.collect::<Vec<_>>(), expected(number as u32, 2).concat());
    }
    until(|| engine.serving() == 1);
}

#[test]
fn a_slow_server_runs_into_the_limit_of_a_try() {
    let (lame, quick) = (Fake::vllm(slow(60_000)), Fake::vllm(Script::default()));
    let engine =
        start(&[&lame, &quick], RemoteOptions { timeout_seconds: 0.2, ..options() }).expect("both");
    let started = Instant::now();
    let groups = answers(&engine, vec![request(1, 1), request(2, 1)]).expect("answers");
    assert_eq!((ids(&groups[0]), ids(&groups[1])), (expected(1, 1), expected(2, 1)));
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    // The server was told that nobody waits any more.
    until(|| lame.shared.running.load(SeqCst) == 0);
    assert_eq!(lame.shared.finished.load(SeqCst), 0);
}

#[test]
fn failures_end_after_the_tries_and_refusals_at_once() {
    let fake = Fake::vllm(Script { fails: Some(500), ..Script::default() });
    let options = RemoteOptions { retries: 2, max_failures: 100, ..options() };
    let engine = start(&[&fake], options).expect("it answers");
    let error = answers(&engine, vec![request(1, 1)]).unwrap_err().to_string();
    assert!(error.contains("HTTP 500: scripted"), "{error}");
    assert_eq!(fake.script().bodies.len(), 3);
    fake.script().fails = Some(400);
    let error = answers(&engine, vec![request(1, 1)]).unwrap_err();
    let CollectError::Engine(EngineError::Invalid { field, .. }) = &error else {
        panic!("{error:?}")
    };
    assert_eq!((field.as_str(), fake.script().bodies.len()), ("temperature", 4));
}

#[test]
fn a_busy_server_is_asked_again_later() {
    let fake = Fake::vllm(Script { fails: Some(429), ..Script::default() });
    let engine = pool(&[&fake]);
    let diary = Diary::default();
    engine.submit(request(4, 1), Box::new(diary.clone())).expect("it is taken");
    until(|| fake.script().bodies.len() >= 2);
    fake.script().fails = None;
    until(|| diary.all().len() == 2);
    assert_eq!(engine.serving(), 1);
}

#[test]
fn without_a_server_a_request_ends_at_its_deadline() {
    let mut fake = Fake::vllm(Script::default());
    let options = RemoteOptions { deadline_seconds: 0.5, retries: 1000, ..options() };
    let engine = start(&[&fake], options).expect("it answers");
    fake.kill();
    let started = Instant::now();
    let error = answers(&engine, vec![request(1, 1)]).unwrap_err().to_string();
    assert!(error.contains("no server answered within 0.5 s"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_sick_server_is_taken_out_and_comes_back() {
    let (sick, well) = (Fake::vllm(Script::default()), Fake::vllm(Script::default()));
    let engine = pool(&[&sick, &well]);
    assert_eq!(engine.serving(), 2);
    sick.script().sick = true;
    until(|| engine.serving() == 1);
    answers(&engine, (0..4).map(|number| request(number, 1)).collect()).expect("answers");
    assert!(sick.script().bodies.is_empty());
    sick.script().sick = false;
    until(|| engine.serving() == 2);
}

#[test]
fn aborts_cancel_what_runs() {
    let fake = Fake::vllm(slow(60_000));
    let engine = pool(&[&fake]);
    let (whole, part, left) = (Diary::default(), Diary::default(), Diary::default());
    let first = engine.submit(request(1, 2), Box::new(whole.clone())).expect("taken");
    let second = engine.submit(request(2, 2), Box::new(part.clone())).expect("taken");
    engine.submit(request(3, 1), Box::new(left.clone())).expect("taken");
    until(|| fake.shared.running.load(SeqCst) == 3);
    engine.abort(first, None);
    engine.abort(second, Some(1));
    left.closed.store(true, SeqCst);
    until(|| fake.shared.running.load(SeqCst) == 1);
    let end = |index| Event::Finished { index, reason: FinishReason::Abort };
    assert_eq!(whole.all(), [end(0), end(1)]);
    assert_eq!(part.all(), [end(1)]);
    engine.abort(second, Some(0));
    until(|| fake.shared.running.load(SeqCst) == 0);
    assert_eq!(part.all(), [end(1), end(0)]);
    assert_eq!(left.all(), []);
}

#[test]
fn samples_that_a_server_aborts_are_drawn_anew() {
    let fake = Fake::sglang(Script { aborts: 2, ..Script::default() });
    let engine = pool(&[&fake]);
    let groups = answers(&engine, vec![request(5, 2)]).expect("answers");
    assert_eq!(ids(&groups[0]), expected(5, 2));
    assert_eq!(fake.script().bodies.len(), 3);
}

#[test]
fn what_cannot_be_asked_is_refused_at_once() {
    let fake = Fake::sglang(Script::default());
    let engine = pool(&[&fake]);
    let refused = |change: fn(&mut onpolicy_plugin_api::Request)| {
        let mut request = request(1, 1);
        change(&mut request);
        engine.submit(request, Box::new(Diary::default())).unwrap_err()
    };
    let unsupported = |error: EngineError, what: &str| {
        assert!(matches!(&error, EngineError::Unsupported(text) if text.contains(what)), "{error}");
    };
    unsupported(refused(|r| r.params.logprobs_mode = LogprobsMode::Raw), "raw");
    unsupported(refused(|r| r.params.bad_words = vec![vec![1]]), "bad_words");
    unsupported(refused(|r| r.params.allowed_token_ids = Some(vec![1])), "allowed_token_ids");
    unsupported(refused(|r| r.params.grammar = Some(Grammar::Lark("x".into()))), "Lark");
    let invalid = |error: EngineError, name: &str| {
        assert!(matches!(&error, EngineError::Invalid { field, .. } if field == name), "{error}");
    };
    invalid(refused(|r| r.prompt = vec![1000]), "prompt");
    invalid(refused(|r| r.prompt.clear()), "prompt");
    invalid(refused(|r| r.params.n = 9), "n");
    invalid(refused(|r| r.params.max_tokens = 63), "max_tokens");
    assert!(fake.script().bodies.is_empty());
}

#[test]
fn no_more_requests_than_there_is_room_for() {
    let fake = Fake::vllm(slow(60_000));
    let engine = pool(&[&fake]);
    let take = || engine.submit(request(1, 1), Box::new(Diary::default()));
    for _ in 0..32 {
        take().expect("there is room");
    }
    assert_eq!(take().unwrap_err(), EngineError::Overloaded { waiting: 32 });
    engine.abort_all().expect("they end");
    take().expect("there is room again");
}

#[test]
fn the_end_of_the_engine_ends_its_requests() {
    let fake = Fake::vllm(slow(60_000));
    let engine = pool(&[&fake]);
    let diary = Diary::default();
    engine.submit(request(1, 2), Box::new(diary.clone())).expect("taken");
    drop(engine);
    assert_eq!(diary.all(), [Event::Failed { error: EngineError::Stopped }]);
    until(|| fake.shared.running.load(SeqCst) == 0);
}

#[test]
fn nobody_there() {
    let mut fake = Fake::vllm(Script::default());
    fake.kill();
    let error = start(&[&fake], options()).err().expect("nobody answers").to_string();
    assert!(error.contains("no server answers") && error.contains(&fake.url), "{error}");
}
