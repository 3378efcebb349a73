//! The engine's log-probs, entropies and baselines are the trainer's: 64 sampled sequences of the
//! real model, f32.

use onpolicy_engine::collect::collect;
use onpolicy_plugin_api::{Message, Request, SamplingParams};
use onpolicy_trainer::{
    batch::{TrainBatch, TrainGroup, TrainSample},
    config::Config,
    entropy::KeepAll,
    loss::token_stats,
    served::Served,
};
use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

fn smollm2() -> PathBuf {
    let cache = std::env::var("ONPOLICY_CACHE").map(PathBuf::from).unwrap_or_else(|_| {
        Path::new(&std::env::var("HOME").expect("HOME is set")).join(".cache/onpolicy")
    });
    let path = cache.join("models/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is missing: run scripts/setup", path.display());
    path
}

#[test]
fn the_engines_numbers_are_the_trainers() {
    let config = format!("[model]\npath = {:?}", smollm2().display().to_string());
    let config = Config::parse(&config, &[]).expect("a configuration");
    let served = Served::start(&config.model.path, &config).expect("the model");
    for temperature in [1.0, 0.7] {
        let requests = (0..8).map(|number| {
            let messages = [Message::user(format!("What is {number}+{}?", 9 - number))];
            let chat = onpolicy_engine::chat::Chat::from_messages(&messages);
            let prompt = served.tokenizer.encode_chat(&chat).expect("a prompt");
            let params = SamplingParams {
                n: 8,
                temperature,
                max_tokens: 40,
                seed: Some(number),
                ..SamplingParams::default()
            };
            Request::new(prompt, params)
        });
        let requests: Vec<Request> = requests.collect();
        let deadline = Instant::now() + Duration::from_secs(300);
        let groups = collect(&*served.engine, requests.clone(), deadline, &mut || {});
        let groups = groups.expect("the engine answers");
        let groups = requests.into_iter().zip(&groups).map(|(request, group)| TrainGroup {
            prompt: request.prompt,
            samples: group.samples.iter().map(|s| TrainSample::new(s, 0.0)).collect(),
            teaches: true,
        });
        let batch = TrainBatch::new(groups.collect(), &KeepAll {});
        let decoder = served.decoder();
        let (mut differences, mut worst) = ([0.0f64; 3], 0.0f64);
        let mut tokens = 0;
        for micro in &batch.mini_batches(1, 2048)[0].micro_batches {
            for stats in token_stats(&decoder, micro, temperature) {
                let engine = batch.tokens();
                let pairs = [
                    (stats.logprob, engine.logprob[tokens]),
                    (stats.entropy, engine.entropy[tokens]),
                    (stats.baseline, engine.baseline[tokens]),
                ];
                for (sum, (ours, theirs)) in differences.iter_mut().zip(pairs) {
                    *sum += f64::from(ours - theirs).abs();
                }
                let ratio = f64::from(stats.logprob - engine.logprob[tokens]).exp();
                worst = worst.max((ratio - 1.0).abs());
                tokens += 1;
            }
        }
        assert_eq!(tokens, batch.tokens().len());
        assert!(tokens > 500, "{tokens} tokens are too few to show anything");
        let means = differences.map(|sum| sum / tokens as f64);
        println!(
            "T {temperature}: {tokens} tokens, mean differences {means:?}, worst ratio {worst:e}"
        );
        assert!(means[0] < 1e-5, "log-probs differ by {:e} on average", means[0]);
        assert!(means[1] < 2e-5 && means[2] < 2e-5, "entropy and baseline: {means:?}");
        assert!(worst < 1e-3, "a ratio is {worst:e} away from 1");
    }
}
