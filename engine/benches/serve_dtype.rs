//! Decoding in each type that weights can be served in, in turns: one engine for each over the same
//! weights. `cargo bench -p onpolicy-engine --bench serve_dtype -- MODEL [ROUNDS]`, where MODEL is a
//! directory, a GGUF file or a hub id. Not criterion, which cannot take turns between cases.

use onpolicy_engine::{
    collect::collect,
    engine::{EngineConfig, EngineHandle, Model},
    model::loading::load,
    weights::{ServeDtype, Weights},
};
use onpolicy_plugin_api::{Request, SamplingParams};
use std::time::{Duration, Instant};

const DTYPES: [ServeDtype; 4] =
    [ServeDtype::F32, ServeDtype::F16, ServeDtype::Bf16, ServeDtype::Int8];
/// Samples at a time, and tokens of each.
const BATCHES: [(usize, usize); 3] = [(1, 24), (8, 16), (64, 8)];

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with("--"));
    let path = arguments.next().expect("the model's path");
    let rounds = arguments.next().map_or(5, |rounds| rounds.parse().expect("a number of rounds"));
    let checkpoint = load(&path).expect("the model loads");
    let weights = Weights::new(checkpoint.tensors);
    let engines = DTYPES.map(|serve_dtype| {
        let config = checkpoint.config.clone();
        let model = Model {
            name: serve_dtype.to_string(),
            config,
            weights: weights.share(),
            tokenizer: None,
        };
        let config = EngineConfig { kv_memory: 64 << 20, serve_dtype, ..EngineConfig::default() };
        EngineHandle::start(model, config).expect("the engine starts")
    });
    for (dtype, engine) in DTYPES.iter().zip(&engines) {
        engine.update(|| Ok(())).expect("an update of nothing");
        let stats = engine.stats().expect("the engine runs");
        let mebibytes = stats.copied_bytes >> 20;
        println!("{dtype}: {mebibytes} MiB of copies, made anew in {:.1?}", stats.refresh);
    }
    println!(
        "samples: tokens/s, median (best), as {}",
        DTYPES.map(|dtype| dtype.to_string()).join(", ")
    );
    for (samples, tokens) in BATCHES {
        let mut rates = DTYPES.map(|_| Vec::new());
        for _ in 0..=rounds {
            for (rates, engine) in rates.iter_mut().zip(&engines) {
                rates.push(decode(engine, samples, tokens));
            }
        }
        let medians = rates.map(|mut rates| {
            rates.remove(0); // The first round warms up.
            rates.sort_by(f64::total_cmp);
            format!("{:.1} ({:.1})", rates[rates.len() / 2], rates[rates.len() - 1])
        });
        println!("{samples}: {}", medians.join(", "));
    }
}

/// Tokens a second over one group.
fn decode(engine: &EngineHandle, samples: usize, tokens: usize) -> f64 {
    let params = SamplingParams {
        n: samples,
        max_tokens: tokens,
        ignore_eos: true,
        seed: Some(7),
        ..SamplingParams::default()
    };
    let request = Request::new((100..116).collect(), params);
    let started = Instant::now();
    let deadline = started + Duration::from_secs(300);
    collect(engine, vec![request], deadline, &mut || {}).expect("the engine answers");
    (samples * tokens) as f64 / started.elapsed().as_secs_f64()
}
