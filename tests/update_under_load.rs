//! Weights change while requests run: none fails, none is answered from old KV, and afterwards the
//! policy answers as a fresh process does that loads its checkpoint.

mod common;

use onpolicy_engine::{
    collect::collect,
    engine::EngineHandle,
    torch::{autograd::set_grad, random},
};
use onpolicy_plugin_api::{Engine, Request, SamplingParams};
use onpolicy_trainer::{
    checkpoint::{save_source, save_weights},
    config::Config,
    optimizer::{Optimizer, OptimizerSettings},
    served::Served,
};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};
use tch::Tensor;

const UPDATES: u64 = 4;
const QUESTIONS: [&str; 4] = [
    "What is 7+5?",
    "What is the capital of France?",
    "Write a haiku about autumn leaves.",
    "Name three animals that live in the sea and say one thing about each of them.",
];

fn request(prompt: &[u32], n: usize, temperature: f32) -> Request {
    let params = SamplingParams { n, temperature, max_tokens: 32, ..SamplingParams::default() };
    Request::new(prompt.to_vec(), params)
}

fn answers(engine: &EngineHandle, request: Request) -> Vec<Vec<(u32, u64)>> {
    let deadline = Instant::now() + Duration::from_secs(120);
    let groups = collect(engine, vec![request], deadline, &mut || {}).expect("no request fails");
    let sample = |sample: &onpolicy_engine::collect::Sample| {
        sample.tokens.iter().map(|token| (token.id, token.weight_version)).collect()
    };
    groups[0].samples.iter().map(sample).collect()
}

/// A random push to every weight, another one for each `turn` of the same numbers; big enough to
/// change answers, small enough to keep them text.
fn push(served: &Served, mut optimizer: Optimizer, numbers: &[Tensor], turn: u64) -> Optimizer {
    for ((_, weight), numbers) in served.weights.iter().zip(numbers) {
        set_grad(weight, &numbers.roll(turn as i64, 0)).expect("a gradient");
    }
    let update = served.native().expect("the native engine").update(move || {
        optimizer.step(2e-4, 1.0).map_err(|error| error.to_string())?;
        Ok(optimizer)
    });
    update.expect("the update is applied").0
}

/// Is set when this is dropped.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn greedy_over_http(url: &str, prompt: &[u32]) -> Vec<u32> {
    let body = json!({
        "prompt": prompt, "max_tokens": 32, "temperature": 0, "return_token_ids": true
    });
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let answer: Value = runtime.block_on(async {
        let client = reqwest::Client::new();
        let answer = client.post(format!("{url}/v1/completions")).json(&body).send().await;
        answer.expect("an answer").json().await.expect("JSON")
    });
    let ids = answer["choices"][0]["token_ids"].as_array();
    let ids = ids.unwrap_or_else(|| panic!("no token ids in {answer}"));
    ids.iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

#[test]
fn updates_under_load_leave_no_trace_of_old_weights() {
    let set = ["engine.kv_memory_mb=128".to_string()];
    let config = format!("[model]\npath = {:?}", common::smollm2().display().to_string());
    let config = Config::parse(&config, &set).expect("a configuration");
    let served = Served::start(&config.model.path, &config).expect("the model");
    let native = served.native().expect("the native engine").clone();
    let prompts: Vec<Vec<u32>> = QUESTIONS
        .iter()
        .map(|question| {
            let messages = [onpolicy_plugin_api::Message::user(*question)];
            let chat = onpolicy_engine::chat::Chat::from_messages(&messages);
            served.tokenizer.encode_chat(&chat).expect("a prompt")
        })
        .collect();
    let before: Vec<Vec<u32>> = prompts.iter().map(|p| greedy(&native, p)).collect();

    let settings =
        OptimizerSettings { betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.0, max_grad_norm: 0.0 };
    let mut optimizer = Optimizer::new(&served.weights, settings).expect("an optimizer");
    let sizes = served.weights.iter().map(|(_, weight)| weight.size());
    let numbers: Vec<Tensor> = sizes.map(|size| random::normal(&size)).collect();
    let (stop, ended) = (AtomicBool::new(false), AtomicUsize::new(0));
    let mixed = std::sync::Mutex::new(BTreeSet::new());
    let optimizer = std::thread::scope(|scope| {
        for prompt in &prompts {
            let (engine, stop, ended, mixed) = (native.clone(), &stop, &ended, &mixed);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    for sample in answers(&engine, request(prompt, 4, 1.0)) {
                        assert!(sample.is_sorted_by_key(|(_, version)| *version));
                        let (first, last) = (sample[0].1, sample[sample.len() - 1].1);
                        mixed.lock().expect("no panic").insert(last - first);
                    }
                    ended.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        // Whatever happens here, those threads must end.
        let _stop = Stop(&stop);
        for update in 1..=UPDATES {
            std::thread::sleep(Duration::from_millis(300));
            optimizer = push(&served, optimizer, &numbers, update);
            assert_eq!(native.weight_version(), update);
        }
        std::thread::sleep(Duration::from_millis(300));
        optimizer
    });
    assert!(ended.load(Ordering::Relaxed) >= 4, "there was load");
    // On a busy machine they may all have seen all of them.
    let mixed = mixed.into_inner().expect("no panic");
    assert!(mixed.last() > Some(&0), "some samples saw an update: {mixed:?}");
    assert_eq!(native.stats().expect("the engine runs").blocks_used, 0, "all blocks are back");

    // One more update while nothing runs: the prefixes cached just now must not be found.
    let _optimizer = push(&served, optimizer, &numbers, 99);
    let hits = native.stats().expect("the engine runs").prefix_hits;
    let first = greedy(&native, &prompts[0]);
    assert_eq!(
        native.stats().expect("the engine runs").prefix_hits,
        hits,
        "no KV of old weights is reused"
    );
    let after: Vec<Vec<u32>> = prompts.iter().map(|p| greedy(&native, p)).collect();
    assert_ne!(before, after, "the updates changed the answers");
    assert_eq!(first, after[0]);
    assert!(
        native.stats().expect("the engine runs").prefix_hits > hits,
        "prefixes of this version are found"
    );

    let dir = tempfile::tempdir().expect("a folder");
    save_weights(&served.weights, &dir.path().join("model.safetensors")).expect("saved");
    save_source(&served.source, &served.weights, dir.path()).expect("saved");
    let fresh = common::serve(dir.path(), &[]);
    for (prompt, after) in prompts.iter().zip(&after) {
        assert_eq!(&greedy_over_http(&fresh.url, prompt), after);
    }
}

fn greedy(engine: &EngineHandle, prompt: &[u32]) -> Vec<u32> {
    let sample = answers(engine, request(prompt, 1, 0.0)).remove(0);
    sample.into_iter().map(|(id, _)| id).collect()
}
