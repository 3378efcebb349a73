//! Log-probs: against transformers', and the engine's against the trainer's.

use super::{super::shapes::Shape, Check, Limit, Place};
use anyhow::{Context, ensure};
use onpolicy_engine::{
    collect::{Samples, collect},
    model::loading::load_to,
    sampler::stream_of,
};
use onpolicy_plugin_api::{Engine, Memory, Request, SamplingParams, Sleep, TokenStats};
use onpolicy_trainer::{
    batch::{TrainBatch, TrainGroup, TrainSample},
    entropy::KeepAll,
    loss::token_stats,
    served::Served,
};
use serde_json::Value;
use std::{
    path::Path,
    time::{Duration, Instant},
};

/// Samples and tokens that the engine draws for the trainer to look at.
const SAMPLES: usize = 8;
const TOKENS: usize = 32;

/// Log-probs and entropies of the trainer's forward pass, and of the engine's prefill, against those
/// in `reference.json`.
pub fn golden(place: &Place, path: &Path) -> Result<Vec<Check>, anyhow::Error> {
    let reference = reference(path)?;
    let rows = |key: &str| -> Result<Vec<Vec<f64>>, anyhow::Error> {
        Ok(serde_json::from_value(reference[key].clone())?)
    };
    let (ids, logprobs, entropy) =
        (rows("input_ids")?, rows("next_token_logprobs")?, rows("entropy")?);
    let ids: Vec<Vec<u32>> =
        ids.iter().map(|row| row.iter().map(|&id| id as u32).collect()).collect();
    let served = serve(place, path)?;
    let own = trained(&served, ids.iter().map(|row| row.split_at(1)).collect());
    let want = logprobs.concat();
    let trainer = Distance::of(own.iter().map(|s| f64::from(s.logprob)), want.iter().copied())?;
    // The last entropy is that of a token that is not there.
    let heads = entropy.iter().flat_map(|row| row[..row.len() - 1].to_vec());
    let entropy = Distance::of(own.iter().map(|s| f64::from(s.entropy)), heads)?;
    let params = SamplingParams { prompt_logprobs: Some(0), max_tokens: 1, ..Default::default() };
    let requests = ids.iter().map(|row| Request::new(row.clone(), params.clone())).collect();
    let answers = ask(&served, requests)?;
    let got = answers.iter().flat_map(|answer| &answer.prompt_logprobs);
    let engine = Distance::of(got.map(|&logprob| f64::from(logprob)), want.iter().copied())?;
    served.shutdown();
    let most = limits(place, path);
    Ok(vec![
        most("trainer's log-probs, mean distance", trainer.mean, 1e-4, 3e-2),
        most("trainer's log-probs, largest", trainer.most, 1e-3, 3e-1),
        most("entropy, largest", entropy.most, 1e-3, 2e-1),
        most("engine's log-probs, mean distance", engine.mean, 1e-4, 3e-2),
        most("engine's log-probs, largest", engine.most, 1e-3, 3e-1),
    ])
}

/// Greedy tokens, in f32, and what the engine says of the samples that it draws against what the
/// trainer says of them.
pub fn engine(place: &Place, path: &Path) -> Result<Vec<Check>, anyhow::Error> {
    let reference = reference(path)?;
    let prompt: Vec<u32> = serde_json::from_value(reference["greedy_prompt"].clone())?;
    let greedy: Vec<u32> = serde_json::from_value(reference["greedy_ids"].clone())?;
    let served = serve(place, path)?;
    let draw = |temperature: f32, n: usize, tokens: usize| {
        let params = SamplingParams {
            n,
            temperature,
            max_tokens: tokens,
            ignore_eos: true,
            seed: Some(stream_of(3, n)),
            ..Default::default()
        };
        ask(&served, vec![Request::new(prompt.clone(), params)])
    };
    let most = limits(place, path);
    let mut checks = Vec::new();
    if place.placement.element_bytes() == 4 {
        let drawn = draw(0.0, 1, greedy.len())?;
        let same = drawn[0].samples[0].tokens.iter().zip(&greedy).filter(|(a, b)| a.id == **b);
        let (count, all) = (same.count() as f64, greedy.len() as f64);
        checks.push(Check::new(
            format!("{}: greedy tokens as transformers'", name(path)),
            count,
            Limit::Least(all),
        ));
    }
    let drawn = draw(1.0, SAMPLES, TOKENS)?;
    let [logprob, baseline] = against_trainer(&served, std::slice::from_ref(&prompt), &drawn)?;
    served.shutdown();
    checks.extend([
        most("engine against trainer, mean distance", logprob.mean, 1e-5, 3e-2),
        most("engine against trainer, largest", logprob.most, 1e-4, 3e-1),
        most("baselines, largest distance", baseline.most, 1e-4, 1e-1),
    ]);
    Ok(checks)
}

/// Log-probs and baselines of samples: what the engine said of them, and what the trainer says.
fn against_trainer(
    served: &Served,
    prompts: &[Vec<u32>],
    drawn: &[Samples],
) -> Result<[Distance; 2], anyhow::Error> {
    let ids = |samples: &Samples| -> Vec<Vec<u32>> {
        let tokens = samples.samples.iter().map(|sample| sample.tokens.iter());
        tokens.map(|tokens| tokens.map(|token| token.id).collect()).collect()
    };
    let ids: Vec<Vec<Vec<u32>>> = drawn.iter().map(ids).collect();
    let sequences = prompts.iter().zip(&ids);
    let sequences =
        sequences.flat_map(|(prompt, ids)| ids.iter().map(|ids| (&prompt[..], &ids[..])));
    let own = trained(served, sequences.collect());
    let samples = drawn.iter().flat_map(|drawn| &drawn.samples);
    let told: Vec<TokenStats> =
        samples.flat_map(|sample| &sample.tokens).map(|token| token.stats).collect();
    let column = |of: fn(&TokenStats) -> f32| {
        let numbers = |stats: &[TokenStats]| -> Vec<f64> {
            stats.iter().map(|stats| f64::from(of(stats))).collect()
        };
        Distance::of(numbers(&told).into_iter(), numbers(&own).into_iter())
    };
    Ok([column(|s| s.logprob)?, column(|s| s.baseline)?])
}

/// Decode steps of batches of changing sizes, which a CUDA device runs as recorded graphs: before and
/// after an update of the weights in place, and after the pages were given back and taken again.
/// Random weights in a shape whose heads the kernels take; the tokenizer is that of the model at `path`.
pub fn decoding(place: &Place, path: &Path) -> Result<Vec<Check>, anyhow::Error> {
    let config = place.config(path, &["engine.max_model_len=512"])?;
    let shape = Shape::parse("tiny").map_err(anyhow::Error::msg)?;
    let model = shape.random(&config.model.path, place.placement)?;
    let served = Served::over(model, &config, None)?;
    let engine = served.native().context("the native engine")?.clone();
    let prompts: Vec<Vec<u32>> =
        [3u32, 90, 200].iter().map(|&len| (0..len).map(|i| 7 * i % 500).collect()).collect();
    let mut checks = Vec::new();
    for what in ["as loaded", "updated", "woken up"] {
        match what {
            "updated" => {
                let weights = served.weights.share();
                engine.update(move || {
                    onpolicy_engine::torch::no_grad(|| {
                        for (_, tensor) in weights.iter() {
                            let _ = tensor.shallow_clone().g_mul_scalar_(1.5);
                        }
                    });
                    Ok(())
                })?;
            }
            "woken up" => {
                engine.sleep(Sleep::KvCache)?;
                engine.wake_up(&[Memory::KvCache])?;
            }
            _ => {}
        }
        // Samples that end one after the other, in batches of up to eighteen.
        let requests = prompts.iter().enumerate().map(|(index, prompt)| {
            let params = SamplingParams {
                n: 6,
                temperature: 1.0,
                max_tokens: 20 + 15 * index,
                ignore_eos: true,
                seed: Some(stream_of(4, index)),
                ..Default::default()
            };
            Request::new(prompt.clone(), params)
        });
        let drawn = ask(&served, requests.collect())?;
        let [logprob, _] = against_trainer(&served, &prompts, &drawn)?;
        let name = |which: &str| format!("decode steps, {what}: engine against trainer, {which}");
        checks.extend([
            Check::new(name("mean"), logprob.mean, place.most(1e-5, 3e-2)),
            Check::new(name("largest"), logprob.most, place.most(1e-4, 3e-1)),
        ]);
    }
    let stats = engine.stats()?;
    served.shutdown();
    // The first step of each size is not a graph's, and none is planned behind the last one.
    let least = if place.placement.device.is_cuda() { 100.0 } else { 0.0 };
    for (what, steps) in [("recorded", stats.graph_steps), ("planned ahead", stats.steps_ahead)] {
        let check = Check::new(format!("decode steps: {what}"), steps as f64, Limit::Least(least));
        checks.push(Check { note: format!("of {} steps", stats.steps), ..check });
    }
    Ok(checks)
}

/// How far two lists of numbers lie from each other.
struct Distance {
    mean: f64,
    most: f64,
}

impl Distance {
    fn of(
        got: impl Iterator<Item = f64>,
        want: impl Iterator<Item = f64>,
    ) -> Result<Self, anyhow::Error> {
        let (got, want): (Vec<f64>, Vec<f64>) = (got.collect(), want.collect());
        ensure!(got.len() == want.len(), "{} numbers where {} are wanted", got.len(), want.len());
        let off: Vec<f64> = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).collect();
        // NaN, which no maximum would show, makes both NaN.
        let sum: f64 = off.iter().sum();
        let most = if sum.is_nan() { f64::NAN } else { off.iter().copied().fold(0.0, f64::max) };
        Ok(Self { mean: sum / off.len().max(1) as f64, most })
    }
}

/// Makes checks of the model at `path`: what is measured, the number, and its limits in f32 and in
/// narrower types.
fn limits<'a>(place: &'a Place, path: &Path) -> impl Fn(&str, f64, f64, f64) -> Check + use<'a> {
    let name = name(path);
    move |what, number, wide, narrow| {
        Check::new(format!("{name}: {what}"), number, place.most(wide, narrow))
    }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn reference(path: &Path) -> Result<Value, anyhow::Error> {
    let file = path.join("reference.json");
    let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    Ok(serde_json::from_str(&text)?)
}

fn serve(place: &Place, path: &Path) -> Result<Served, anyhow::Error> {
    let config = place.config(path, &[])?;
    let checkpoint = load_to(&config.model.path, place.placement)?;
    Ok(Served::over(checkpoint, &config, None)?)
}

fn ask(served: &Served, requests: Vec<Request>) -> Result<Vec<Samples>, anyhow::Error> {
    let deadline = Instant::now() + Duration::from_secs(300);
    Ok(collect(&*served.engine, requests, deadline, &mut || {})?)
}

/// The trainer's statistics of what follows each prompt.
fn trained(served: &Served, sequences: Vec<(&[u32], &[u32])>) -> Vec<TokenStats> {
    let group = |(prompt, tokens): (&[u32], &[u32])| {
        let column = vec![0.0; tokens.len()];
        let sample = TrainSample {
            tokens: tokens.to_vec(),
            logprob: column.clone(),
            entropy: column.clone(),
            baseline: column,
            advantage: 1.0,
        };
        TrainGroup { prompt: prompt.to_vec(), samples: vec![sample], teaches: true }
    };
    let groups = sequences.into_iter().map(group).collect();
    let batch = TrainBatch::new(groups, &KeepAll {});
    let packs = batch.mini_batches(1, 512);
    let decoder = served.decoder();
    let micros = packs.iter().flat_map(|pack| &pack.micro_batches);
    micros.flat_map(|micro| token_stats(&decoder, micro, 1.0)).collect()
}
