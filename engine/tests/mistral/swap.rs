//! New weights while requests run.

use crate::{
    common::{self, smollm2},
    support::{ask, ask_all, greedy, ids, serve, tiny, write},
};
use onpolicy_engine::mistral::{MistralEngine, Options};
use onpolicy_plugin_api::{Engine, EngineError, Request, SamplingParams, WeightUpdate};
use std::{
    path::Path,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::Instant,
};

/// Clients that ask while the weights change.
const CLIENTS: usize = 4;
/// Changes of the weights.
const SWAPS: u64 = 6;
/// The same of the real model.
const REAL_SWAPS: u64 = 4;

fn update(engine: &MistralEngine, dir: &Path, version: Option<u64>) -> Result<u64, EngineError> {
    engine.update_weights(WeightUpdate::Directory(dir.to_path_buf()), version)
}

/// What a client asks for the `i`-th time.
fn request(i: usize) -> Request {
    let params = SamplingParams { n: 1 + i % 3, ..greedy(8 + i % 40) };
    Request::new(vec![5 + (i % 20) as u32, 6, 7], params)
}

#[test]
fn requests_that_run_across_a_swap_are_of_one_version_and_right() {
    let checkpoint = common::tiny("llama-tied");
    let dirs: Vec<_> = (0..2).map(|_| tempfile::tempdir().expect("a directory")).collect();
    write(&checkpoint, dirs[0].path(), 1.0);
    write(&checkpoint, dirs[1].path(), 1.5);
    let alone: Vec<_> = dirs.iter().map(|dir| serve(dir.path(), Options::default())).collect();
    let engine = serve(dirs[0].path(), Options::default());
    let (done, asked) = (AtomicBool::new(false), AtomicUsize::new(0));
    let answers = std::thread::scope(|scope| {
        let client = || {
            let mut answers = Vec::new();
            while !done.load(Ordering::Relaxed) {
                let i = asked.fetch_add(1, Ordering::Relaxed);
                answers.push((i, ask_all(&engine, vec![request(i)]).remove(0)));
            }
            answers
        };
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
        for version in 1..=SWAPS {
            let seen = asked.load(Ordering::Relaxed);
            let failed = || clients.iter().any(|client| client.is_finished());
            while asked.load(Ordering::Relaxed) < seen + 2 * CLIENTS && !failed() {
                std::thread::yield_now();
            }
            let dir = dirs[version as usize % 2].path();
            assert_eq!(update(&engine, dir, None), Ok(version));
        }
        done.store(true, Ordering::Relaxed);
        clients
            .into_iter()
            .flat_map(|client| client.join().expect("no failure"))
            .collect::<Vec<_>>()
    });
    assert_eq!(engine.weight_version(), SWAPS);
    let mut seen = vec![0; SWAPS as usize + 1];
    for (i, samples) in &answers {
        let version = samples[0].tokens[0].weight_version;
        seen[version as usize] += 1;
        let one = samples.iter().flat_map(|s| &s.tokens).all(|t| t.weight_version == version);
        assert!(one, "request {i} mixes versions");
        let want = ask_all(&alone[version as usize % 2], vec![request(*i)]).remove(0);
        let all = |samples: &[onpolicy_engine::collect::Sample]| {
            samples.iter().map(ids).collect::<Vec<_>>()
        };
        assert_eq!(all(samples), all(&want), "request {i} of version {version}");
    }
    println!("{} requests, by version {seen:?}", answers.len());
    assert!(seen[..SWAPS as usize].iter().all(|&count| count > 0), "{seen:?}");
}

#[test]
fn versions_are_what_the_caller_says() {
    let checkpoint = common::tiny("qwen2");
    let dir = tempfile::tempdir().expect("a directory");
    write(&checkpoint, dir.path(), 0.5);
    let engine = tiny("qwen2");
    let before = ask(&engine, &[5, 6, 7], greedy(8)).remove(0);
    assert_eq!(update(&engine, dir.path(), Some(41)), Ok(41));
    let after = ask(&engine, &[5, 6, 7], greedy(8)).remove(0);
    assert_eq!(after.tokens[0].weight_version, 41);
    assert_ne!(
        after.tokens[0].stats.logprob, before.tokens[0].stats.logprob,
        "half the weights make another distribution"
    );
    assert_eq!(update(&engine, dir.path(), None), Ok(42));
    engine.set_weight_version(7).expect("named");
    assert_eq!(ask(&engine, &[5, 6, 7], greedy(1))[0].tokens[0].weight_version, 7);
}

/// Kilobytes of this process in memory, what it reads of files left out.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux says");
    let line = status.lines().find(|line| line.starts_with("RssAnon")).expect("a line");
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
}

#[test]
fn the_real_model_is_swapped_from_memory() {
    let checkpoint = smollm2();
    let memory = Path::new("/dev/shm");
    let base = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
    let dir = tempfile::tempdir_in(base).expect("a directory");
    let started = Instant::now();
    write(&checkpoint, dir.path(), 1.0);
    let written = started.elapsed();
    drop(checkpoint);
    let engine = serve(dir.path(), Options::default());
    let before = ask(&engine, &[504, 338, 260], greedy(8)).remove(0);
    let (one, done) = (resident(), AtomicBool::new(false));
    let (mut swaps, mut after, mut peak) = (Vec::new(), Vec::new(), 0);
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut peak = 0;
            while !done.load(Ordering::Relaxed) {
                peak = peak.max(resident());
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            peak
        });
        for version in 1..=REAL_SWAPS {
            let started = Instant::now();
            assert_eq!(update(&engine, dir.path(), None), Ok(version));
            swaps.push(started.elapsed());
            // The one that was replaced goes when mistral.rs has taken its last step.
            std::thread::sleep(std::time::Duration::from_millis(500));
            after.push(resident());
        }
        done.store(true, Ordering::Relaxed);
        peak = watch.join().expect("it watches");
    });
    println!(
        "written in {written:?}, swapped in {swaps:?}; {} MiB with one instance, {} MiB at the peak, \
         {:?} MiB after each swap",
        one >> 10,
        peak >> 10,
        after.iter().map(|kib| kib >> 10).collect::<Vec<_>>()
    );
    let answer = ask(&engine, &[504, 338, 260], greedy(8)).remove(0);
    assert_eq!(ids(&answer), ids(&before));
    assert_eq!(answer.tokens[0].weight_version, REAL_SWAPS);
    // None of the replaced instances is left: each has 513 MiB of weights.
    let (first, last) = (after[0], after[after.len() - 1]);
    assert!(last < first + (256 << 10), "{} MiB more", (last - first) >> 10);
}
