//! Pauses: what runs is kept, waited for or ended; nothing is lost.

use crate::common::tiny;
use crate::support::{Running, greedy, ids, request, start, start_with, stats, until};
use onpolicy_engine::engine::EngineConfig;
use onpolicy_plugin_api::{Engine, EngineError, FinishReason, PauseMode};
use std::{thread, time::Duration};

const LENGTH: FinishReason = FinishReason::Length;
const ABORT: FinishReason = FinishReason::Abort;

#[test]
fn what_is_kept_goes_on_at_the_same_token() {
    for clear_cache in [false, true] {
        let engine = start(&tiny("qwen3"));
        let (want, other) = (greedy(&engine, 1, 200), greedy(&engine, 2, 20));
        let mut running = Running::submit(&engine, request(1, 1, 200));
        for read in [1, 40, 90] {
            running.read(read);
            engine.pause(PauseMode::Keep, clear_cache).unwrap();
            assert!(engine.is_paused());
            let before = stats(&engine);
            assert_eq!((before.running, before.blocks_used > 2), (1, true), "{before:?}");
            let waiting = Running::submit(&engine, request(2, 1, 20));
            thread::sleep(Duration::from_millis(60));
            let after = stats(&engine);
            assert_eq!((after.steps, after.running, after.waiting), (before.steps, 1, 1));
            engine.resume().unwrap();
            assert!(!engine.is_paused());
            assert_eq!(ids(&waiting.finish().0), other);
        }
        let (tokens, ends) = running.finish();
        assert_eq!((ids(&tokens), ends), (want, vec![LENGTH]));
        assert_eq!(stats(&engine).blocks_used, 0);
    }
}

#[test]
fn a_pause_that_waits_ends_what_runs_and_begins_nothing() {
    let engine = start(&tiny("llama-tied"));
    let want = greedy(&engine, 3, 60);
    let mut running = Running::submit(&engine, request(1, 4, 150));
    running.read(8);
    let pausing = thread::spawn({
        let engine = engine.clone();
        move || engine.pause(PauseMode::Wait, true)
    });
    until("it pauses", || engine.is_paused());
    let mut late = Running::submit(&engine, request(3, 1, 60));
    assert_eq!(pausing.join().unwrap(), Ok(()));
    let paused = stats(&engine);
    assert_eq!((paused.running, paused.blocks_used, paused.waiting), (0, 0, 1));
    assert_eq!(running.finish().1, [LENGTH; 4]);
    thread::sleep(Duration::from_millis(40));
    late.drain();
    assert_eq!((late.tokens.len(), stats(&engine).steps), (0, paused.steps));
    // Nothing runs any more, so the next pause of this kind is there at once.
    engine.pause(PauseMode::Wait, false).unwrap();
    engine.resume().unwrap();
    assert_eq!(ids(&late.finish().0), want);
}

#[test]
fn a_pause_that_aborts_ends_what_runs_and_what_waits() {
    let engine = start(&tiny("llama-tied"));
    let want = greedy(&engine, 3, 30);
    let mut running = Running::submit(&engine, request(1, 20, 200));
    running.read(40);
    let waiting = Running::submit(&engine, request(2, 20, 200));
    engine.pause(PauseMode::Abort, true).unwrap();
    assert_eq!(running.finish().1, [ABORT; 20]);
    assert_eq!(waiting.finish(), (vec![], vec![ABORT; 20]));
    let late = Running::submit(&engine, request(3, 1, 30));
    let paused = stats(&engine);
    assert_eq!((paused.running, paused.blocks_used), (0, 0));
    engine.resume().unwrap();
    assert_eq!(ids(&late.finish().0), want);
    // Without a pause before it, this does nothing.
    engine.resume().unwrap();
    assert!(!engine.is_paused());
}

#[test]
fn the_last_pause_counts() {
    let engine = start(&tiny("llama-tied"));
    let mut running = Running::submit(&engine, request(1, 1, 200));
    running.read(3);
    let wait = || {
        let pausing = engine.clone();
        thread::spawn(move || pausing.pause(PauseMode::Wait, false))
    };
    engine.pause(PauseMode::Keep, false).unwrap();
    let first = wait();
    let before = stats(&engine).steps;
    until("what was kept goes on to its end", || stats(&engine).steps > before);
    engine.pause(PauseMode::Keep, false).unwrap();
    let refused = first.join().unwrap();
    assert!(matches!(&refused, Err(EngineError::Unavailable(why)) if why.contains("another")));
    let second = wait();
    let before = stats(&engine).steps;
    until("it waits", || stats(&engine).steps > before);
    engine.resume().unwrap();
    let refused = second.join().unwrap();
    assert!(matches!(&refused, Err(EngineError::Unavailable(why)) if why.contains("resumed")));
    let third = wait();
    until("it waits", || engine.is_paused());
    engine.pause(PauseMode::Abort, false).unwrap();
    assert_eq!(third.join().unwrap(), Ok(()), "nothing runs any more");
    assert_eq!(running.finish().1, [ABORT]);
    assert_eq!(stats(&engine).blocks_used, 0);
}

#[test]
fn whoever_leaves_during_a_pause_is_forgotten() {
    let engine = start(&tiny("llama-tied"));
    let mut running = Running::submit(&engine, request(1, 2, 200));
    running.read(4);
    engine.pause(PauseMode::Keep, false).unwrap();
    let waiting = Running::submit(&engine, request(2, 1, 20));
    until("it waits", || stats(&engine).waiting == 1);
    waiting.leave();
    until("what waits is dropped", || stats(&engine).waiting == 0);
    assert!(stats(&engine).blocks_used > 0);
    running.leave();
    until("what is kept is dropped", || stats(&engine).blocks_used == 0);
    engine.resume().unwrap();
    assert_eq!(greedy(&engine, 2, 5).len(), 5);
}

#[test]
fn what_waits_during_a_pause_is_bounded() {
    let limits = EngineConfig { max_waiting: 2, ..EngineConfig::default() };
    let engine = start_with(&tiny("llama-tied"), limits);
    engine.pause(PauseMode::Keep, false).unwrap();
    let taken = [1, 2].map(|seed| Running::submit(&engine, request(seed, 1, 5)));
    assert_eq!(crate::support::refusal(&engine), EngineError::Overloaded { waiting: 2 });
    engine.resume().unwrap();
    for request in taken {
        assert_eq!(request.finish().1, [LENGTH]);
    }
}

#[test]
fn an_engine_stops_during_a_pause() {
    let engine = start(&tiny("llama-tied"));
    let mut running = Running::submit(&engine, request(1, 1, 200));
    running.read(1);
    engine.pause(PauseMode::Keep, false).unwrap();
    let pausing = thread::spawn({
        let engine = engine.clone();
        move || engine.pause(PauseMode::Wait, false)
    });
    thread::sleep(Duration::from_millis(5));
    engine.shutdown();
    let waited = pausing.join().unwrap();
    assert!(matches!(waited, Ok(()) | Err(EngineError::Stopped)), "{waited:?}");
    assert_eq!(engine.pause(PauseMode::Keep, false), Err(EngineError::Stopped));
    assert_eq!(engine.resume(), Err(EngineError::Stopped));
}

#[test]
fn all_requests_are_aborted_without_a_pause() {
    let engine = start(&tiny("llama-tied"));
    let mut requests = [1, 2, 3].map(|seed| Running::submit(&engine, request(seed, 16, 200)));
    requests[0].read(20);
    engine.abort_all().unwrap();
    for request in requests {
        assert_eq!(request.finish().1, [ABORT; 16]);
    }
    assert_eq!((stats(&engine).blocks_used, stats(&engine).waiting), (0, 0));
    assert_eq!(greedy(&engine, 1, 5).len(), 5);
}

#[test]
fn a_reset_prefix_cache_is_not_hit() {
    let engine = start(&tiny("llama-tied"));
    let want = greedy(&engine, 1, 10);
    let hits = || stats(&engine).prefix_hits;
    let before = hits();
    assert_eq!(greedy(&engine, 1, 10), want);
    assert_eq!(hits() - before, 32, "two blocks of the prompt's 40 tokens are found");
    engine.reset_prefix_cache().unwrap();
    let before = hits();
    assert_eq!(greedy(&engine, 1, 10), want);
    assert_eq!(hits(), before);
    // Those of a running request are forgotten as well, and it keeps what it has.
    let mut running = Running::submit(&engine, request(1, 1, 200));
    running.read(20);
    engine.reset_prefix_cache().unwrap();
    let before = hits();
    assert_eq!(greedy(&engine, 1, 10), want);
    assert_eq!(hits(), before);
    let (tokens, _) = running.finish();
    assert_eq!(ids(&tokens), greedy(&engine, 1, 200));
    assert!(hits() > before, "the cache is used again");
}
