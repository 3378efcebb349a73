//! Sleep: requests are refused, memory goes, and after waking up everything is as before.

use crate::common::tiny;
use crate::directories::saved;
use crate::support::{Running, greedy, logprobs, refusal, request, start, start_with, stats};
use onpolicy_engine::{
    engine::{EngineConfig, EngineHandle},
    weights::ServeDtype,
};
use onpolicy_plugin_api::{
    Engine, EngineError, FinishReason, Memory, PauseMode, Sleep, WeightUpdate,
};
use tch::Kind;

fn unavailable(error: &EngineError, word: &str) {
    assert!(matches!(error, EngineError::Unavailable(why) if why.contains(word)), "{error}");
}

fn load(engine: &EngineHandle, dir: &tempfile::TempDir) -> Result<u64, EngineError> {
    engine.update_weights(WeightUpdate::Directory(dir.path().into()), None)
}

#[test]
fn an_engine_without_pages_answers_the_same_after_it() {
    let engine = start(&tiny("qwen3"));
    let (want, exact) = (greedy(&engine, 1, 60), logprobs(&engine, 2));
    let hits = stats(&engine).prefix_hits;
    let mut running = Running::submit(&engine, request(1, 3, 200));
    running.read(9);
    engine.sleep(Sleep::KvCache).unwrap();
    assert!(engine.is_sleeping() && !engine.is_paused());
    assert_eq!(running.finish().1, [FinishReason::Abort; 3]);
    assert_eq!(stats(&engine).blocks_used, 0);
    unavailable(&refusal(&engine), "wake it up");
    engine.wake_up(&[Memory::Weights]).unwrap();
    assert!(engine.is_sleeping(), "the pages are missing");
    engine.wake_up(&[Memory::KvCache]).unwrap();
    assert!(!engine.is_sleeping());
    let before = stats(&engine).prefix_hits;
    assert!(before >= hits);
    assert_eq!((greedy(&engine, 1, 60), logprobs(&engine, 2)), (want, exact));
    assert_eq!(stats(&engine).prefix_hits, before, "KV that is gone is not found");
}

#[test]
fn an_engine_without_weights_serves_once_all_are_loaded() {
    let checkpoint = tiny("llama-tied");
    let dir = saved(&checkpoint, Kind::Float);
    for serve_dtype in [ServeDtype::F32, ServeDtype::F16, ServeDtype::Int8] {
        let config = EngineConfig { serve_dtype, ..EngineConfig::default() };
        // Its own tensors: others must not lose theirs.
        let engine = start_with(&tiny("llama-tied"), config);
        let (want, exact) = (greedy(&engine, 1, 60), logprobs(&engine, 2));
        let checksums = engine.checksums().unwrap();
        engine.sleep(Sleep::Weights).unwrap();
        unavailable(&refusal(&engine), "wake it up");
        unavailable(&engine.checksums().unwrap_err(), "given back");
        unavailable(&load(&engine, &dir).unwrap_err(), "given back");
        engine.wake_up(&[Memory::KvCache]).unwrap();
        assert!(engine.is_sleeping());
        engine.wake_up(&[Memory::Weights]).unwrap();
        assert!(!engine.is_sleeping());
        unavailable(&refusal(&engine), "no weights");
        unavailable(&engine.update(|| Ok(())).unwrap_err(), "no weights");
        assert_ne!(engine.checksums().unwrap(), checksums, "{serve_dtype}");
        assert_eq!(load(&engine, &dir), Ok(1));
        assert_eq!(engine.checksums().unwrap(), checksums);
        assert_eq!((greedy(&engine, 1, 60), logprobs(&engine, 2)), (want, exact));
    }
}

#[test]
fn weights_are_loaded_before_the_pages_come_back() {
    let checkpoint = tiny("llama-tied");
    let dir = saved(&checkpoint, Kind::BFloat16);
    let engine = start(&tiny("llama-tied"));
    engine.sleep(Sleep::Weights).unwrap();
    engine.wake_up(&[Memory::Weights]).unwrap();
    assert_eq!(load(&engine, &dir), Ok(1));
    unavailable(&refusal(&engine), "wake it up");
    engine.wake_up(&[Memory::KvCache]).unwrap();
    assert_eq!(greedy(&engine, 1, 10).len(), 10);
}

#[test]
fn a_light_sleep_takes_nothing_and_a_deeper_one_adds_to_it() {
    let engine = start(&tiny("llama-tied"));
    let want = greedy(&engine, 1, 20);
    engine.sleep(Sleep::Paused).unwrap();
    unavailable(&refusal(&engine), "wake it up");
    engine.wake_up(&[]).unwrap();
    assert!(!engine.is_sleeping());
    let hits = stats(&engine).prefix_hits;
    assert_eq!(greedy(&engine, 1, 20), want);
    assert_eq!(stats(&engine).prefix_hits - hits, 32, "the pages stayed");
    engine.sleep(Sleep::Paused).unwrap();
    engine.sleep(Sleep::KvCache).unwrap();
    engine.sleep(Sleep::Paused).unwrap();
    engine.wake_up(&[]).unwrap();
    assert!(engine.is_sleeping(), "the pages are missing");
    engine.wake_up(&[Memory::KvCache, Memory::Weights]).unwrap();
    engine.wake_up(&[Memory::KvCache]).unwrap();
    assert_eq!(greedy(&engine, 1, 20), want);
}

#[test]
fn a_pause_outlasts_sleep() {
    let engine = start(&tiny("llama-tied"));
    let want = greedy(&engine, 1, 20);
    let mut kept = Running::submit(&engine, request(2, 1, 200));
    kept.read(2);
    engine.pause(PauseMode::Keep, false).unwrap();
    engine.sleep(Sleep::KvCache).unwrap();
    assert_eq!(kept.finish().1, [FinishReason::Abort]);
    engine.wake_up(&[Memory::KvCache]).unwrap();
    assert!(engine.is_paused() && !engine.is_sleeping());
    let waiting = Running::submit(&engine, request(1, 1, 20));
    let steps = stats(&engine).steps;
    std::thread::sleep(std::time::Duration::from_millis(40));
    assert_eq!((stats(&engine).steps, stats(&engine).waiting), (steps, 1));
    engine.sleep(Sleep::Paused).unwrap();
    assert_eq!(waiting.finish().1, [FinishReason::Abort]);
    engine.resume().unwrap();
    unavailable(&refusal(&engine), "wake it up");
    engine.wake_up(&[]).unwrap();
    assert_eq!(greedy(&engine, 1, 20), want);
}

#[test]
fn a_trainers_weights_are_not_given_back() {
    let engine = start(&tiny("llama-tied"));
    let want = (greedy(&engine, 1, 20), engine.checksums().unwrap());
    engine.train_weights();
    for refused in [engine.sleep(Sleep::Weights), engine.reset_weights()] {
        assert!(matches!(&refused, Err(EngineError::Unsupported(_))), "{refused:?}");
        assert!(!engine.is_sleeping());
    }
    engine.sleep(Sleep::KvCache).unwrap();
    engine.update(|| Ok(())).unwrap();
    engine.wake_up(&[Memory::KvCache]).unwrap();
    assert_eq!((greedy(&engine, 1, 20), engine.checksums().unwrap()), want);
}
