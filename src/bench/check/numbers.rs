//! Log-probs: against transformers', and the engine's against the trainer's.

use super::{Check, Limit, Place};
use anyhow::{Context, ensure};
use onpolicy_engine::{
    collect::{Samples, collect},
    model::loading::load_to,
    sampler::stream_of,
};
use onpolicy_plugin_api::{Request, SamplingParams, TokenStats};
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
    let samples = &drawn[0].samples;
    let ids: Vec<Vec<u32>> =
        samples.iter().map(|sample| sample.tokens.iter().map(|token| token.id).collect()).collect();
    let own = trained(&served, ids.iter().map(|ids| (&prompt[..], &ids[..])).collect());
    let told = samples.iter().flat_map(|sample| &sample.tokens).map(|token| token.stats);
    let column = |of: fn(&TokenStats) -> f32| {
        let own = own.iter().map(move |stats| f64::from(of(stats)));
        Distance::of(told.clone().map(move |stats| f64::from(of(&stats))), own)
    };
    let (logprob, baseline) = (column(|s| s.logprob)?, column(|s| s.baseline)?);
    served.shutdown();
    checks.extend([
        most("engine against trainer, mean distance", logprob.mean, 1e-5, 3e-2),
        most("engine against trainer, largest", logprob.most, 1e-4, 3e-1),
        most("baselines, largest distance", baseline.most, 1e-4, 1e-1),
    ]);
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
