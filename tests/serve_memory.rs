//! A server holds its weights once, its KV pool, and 300 MB at the most.

mod common;

use serde_json::{Value, json};

/// SmolLM2-135M in f32.
const WEIGHTS: u64 = 134_515_008 * 4;
/// The KV pool of the test.
const POOL_MIB: u64 = 192;

/// Most bytes that a process has held.
fn peak(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().expect("a number");
    kib * 1024
}

async fn complete(url: &str, body: Value) {
    let answer = reqwest::Client::new().post(format!("{url}/v1/completions")).json(&body).send();
    let answer = answer.await.expect("an answer");
    assert!(answer.status().is_success(), "{}", answer.text().await.unwrap_or_default());
}

#[test]
#[cfg(target_os = "linux")]
fn peak_is_weights_pool_and_300_mb() {
    let pool = format!("engine.kv_memory_mb={POOL_MIB}");
    let served = common::serve(&common::smollm2(), &["--set", &pool]);
    let loaded = peak(served.pid());
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        // Long prompts, whose rows are the most that a step computes; then 64 samples at once, which
        // fill the pool, with log-probs.
        let long: Vec<u32> = (0..3000).map(|i| 100 + i % 5000).collect();
        complete(&served.url, json!({"prompt": long, "max_tokens": 2})).await;
        let groups: Vec<Vec<u32>> =
            (0..8).map(|g| (0..60).map(|i| 200 + g * 61 + i).collect()).collect();
        let body = json!({
            "prompt": groups, "n": 8, "max_tokens": 40, "logprobs": 1, "ignore_eos": true
        });
        complete(&served.url, body).await;
    });
    let (peak, bound) = (peak(served.pid()), WEIGHTS + (POOL_MIB << 20) + 300_000_000);
    let mb = |bytes: u64| bytes / 1_000_000;
    println!("{} MB after loading, {} MB at the most, of {}", mb(loaded), mb(peak), mb(bound));
    assert!(peak <= bound, "{} MB, more than {}", mb(peak), mb(bound));
}
