//! The kernels, on the CPU harness, against the sampler and the statistics of the CPU.

use super::*;
use crate::{
    cuda::harness::{race, unchanged},
    device::sampling::completed,
    logits::{batch_stats, logprob_gradient},
    sampler::{Draw as OneDraw, stream_of},
    torch::random,
};
use onpolicy_plugin_api::SamplingParams;

/// Logits as a model makes them: `[rows, vocab]`, a few of them likely.
fn logits(seed: u64, rows: i64, vocab: i64) -> Tensor {
    random::seed(seed);
    let z = random::normal(&[rows, vocab]) * 3.0;
    &z + (random::normal(&[rows, vocab]) - 3.0).clamp_min(0.0) * 20.0
}

fn temperature(temperature: f32) -> SamplingParams {
    SamplingParams { temperature, ..SamplingParams::default() }
}

fn drawn(numbers: &RowNumbers) -> Vec<Result<Drawn, String>> {
    numbers.to_host().and_then(Coming::wait).unwrap()
}

fn close(got: TokenStats, want: TokenStats) -> bool {
    let near = |a: f32, b: f32, by: f32| (a - b).abs() <= by * (1.0 + b.abs());
    near(got.logprob, want.logprob, 3e-6)
        && near(got.entropy, want.entropy, 3e-6)
        && near(got.baseline, want.baseline, 3e-6)
}

/// Draws on both sides; gives how many rows drew another token.
fn compare(logits: &Tensor, draws: &[OneDraw]) -> usize {
    let (rows, vocab) = logits.size2().unwrap();
    let hows: Vec<How> = draws.iter().map(|draw| How::of(draw, vocab as usize).unwrap()).collect();
    let got = drawn(&draw(logits, &DrawPlan::new(&hows, Device::Cpu)).unwrap());
    let plain = logits.to_kind(Kind::Float).contiguous();
    let want = sampler::sample(floats(&plain), vocab as usize, draws);
    assert_eq!(got.len(), rows as usize);
    let mut others = 0;
    for (got, want) in got.into_iter().zip(want) {
        match (got, want) {
            (Ok(got), Ok(want)) if got.id == want.id => {
                assert!(close(got.stats, want.stats), "{got:?} instead of {want:?}");
            }
            (Err(got), Err(want)) => assert_eq!(got, want),
            (got, want) => {
                assert!(got.is_ok() && want.is_ok(), "{got:?} instead of {want:?}");
                others += 1;
            }
        }
    }
    others
}

#[test]
fn seeds_mean_the_same_tokens() {
    for (seed, vocab) in [(1, 1), (2, 17), (3, 4096), (4, 4097), (5, 20_000), (6, 151_936)] {
        let rows = if vocab > 100_000 { 6 } else { 40 };
        let logits = logits(seed, rows, vocab);
        for how in [temperature(1.0), temperature(0.3), temperature(2.5)] {
            let draws: Vec<OneDraw> = (0..rows as usize)
                .map(|row| OneDraw {
                    stream: stream_of(seed, row),
                    position: 7 * row,
                    ..OneDraw::new(row, &how)
                })
                .collect();
            assert_eq!(compare(&logits, &draws), 0, "vocab {vocab}");
        }
    }
}

#[test]
fn narrow_logits_and_rows_that_lie_apart() {
    let how = temperature(0.8);
    for kind in [Kind::BFloat16, Kind::Half] {
        let wide = logits(7, 10, 6000).to_kind(kind);
        let part = wide.narrow(1, 100, 5001);
        let draws: Vec<OneDraw> = (0..10)
            .map(|row| OneDraw { stream: row as u64, position: 3, ..OneDraw::new(row, &how) })
            .collect();
        assert_eq!(compare(&part, &draws), 0, "{kind:?}");
    }
}

#[test]
fn the_likeliest_token_is_the_first_of_equal_ones() {
    let how = temperature(0.0);
    let mut logits = logits(8, 4, 9001);
    for (row, ids) in [(0, [3000, 3001, 8999]), (1, [4095, 4096, 5000]), (2, [0, 1, 2])] {
        for id in ids {
            let _ = logits.get(row).get(id).fill_(500.0);
        }
    }
    let draws: Vec<OneDraw> = (0..4).map(|row| OneDraw::new(row, &how)).collect();
    assert_eq!(compare(&logits, &draws), 0);
    let hows = vec![How { inv_temperature: 1.0, number: None }; 4];
    let numbers = draw(&logits, &DrawPlan::new(&hows, Device::Cpu)).unwrap();
    let ids = Vec::<i64>::try_from(&numbers.tokens).unwrap();
    assert_eq!(ids[..3], [3000, 4095, 0]);
    logits = logits.narrow(0, 0, 1);
    let how = How { inv_temperature: 1.0, number: Some(0.999) };
    let plan = DrawPlan::new(&[how], Device::Cpu);
    let id = draw(&logits, &plan).unwrap().tokens.int64_value(&[0]);
    assert_eq!(id, 8999, "three equally likely tokens share the line");
}

#[test]
fn the_ends_of_the_line() {
    let logits = logits(9, 2, 5000);
    let only = Tensor::full([1, 9000], f64::NEG_INFINITY, (Kind::Float, Device::Cpu));
    let _ = only.get(0).get(4100).fill_(-3.0);
    for number in [0.0, 1.0 - f64::EPSILON / 2.0] {
        let how = How { inv_temperature: 1.0, number: Some(number) };
        let plan = DrawPlan::new(&[how; 2], Device::Cpu);
        let ids = Vec::<i64>::try_from(draw(&logits, &plan).unwrap().tokens).unwrap();
        assert!(ids.iter().all(|id| (0..5000).contains(id)), "{ids:?}");
        let plan = DrawPlan::new(&[how], Device::Cpu);
        let numbers = draw(&only, &plan).unwrap();
        assert_eq!(numbers.tokens.int64_value(&[0]), 4100);
        let stats = drawn(&numbers)[0].as_ref().unwrap().stats;
        assert_eq!((stats.logprob, stats.entropy), (0.0, 0.0));
    }
}

#[test]
fn rows_that_are_no_distribution_say_why() {
    let how = temperature(1.0);
    let logits = logits(10, 5, 5000);
    let _ = logits.get(0).get(4500).fill_(f64::NAN);
    let _ = logits.get(1).get(3).fill_(f64::INFINITY);
    let _ = logits.get(2).fill_(f64::NEG_INFINITY);
    let _ = logits.get(3).narrow(0, 0, 4990).fill_(f64::NEG_INFINITY);
    for params in [temperature(0.0), how] {
        let draws: Vec<OneDraw> = (0..5).map(|row| OneDraw::new(row, &params)).collect();
        assert_eq!(compare(&logits, &draws), 0);
    }
}

#[test]
fn statistics_and_gradients_are_those_of_the_cpu() {
    for (vocab, inv_temperature) in [(300usize, 1.0f32), (9000, 1.25)] {
        let logits = logits(11, 6, vocab as i64);
        let tokens: Vec<u32> = (0..6).map(|row| (row * 41 + 7) % vocab as u32).collect();
        let ids: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
        let ids = Tensor::from_slice(&ids);
        let numbers = stats(&logits, &ids, inv_temperature).unwrap();
        let mut plain = floats(&logits).to_vec();
        let want = batch_stats(&plain, vocab, &tokens, inv_temperature);
        for ((got, want), id) in drawn(&numbers).into_iter().zip(want).zip(&tokens) {
            let got = got.unwrap();
            assert!(got.id == *id && close(got.stats, want), "{got:?} instead of {want:?}");
        }
        let scales = [0.5f32, -2.0, 0.0, 1.0, 3.0, -1.0];
        logprob_gradient(&mut plain, vocab, &tokens, &scales, inv_temperature);
        let scales = Tensor::from_slice(&scales);
        for (kind, most) in [(Kind::BFloat16, 8e-3), (Kind::Half, 1e-3), (Kind::Float, 2e-6)] {
            let (own, of) = (logits.shallow_clone(), (&ids, &scales));
            let got = gradient(own, of, inv_temperature, &numbers.sums, kind).unwrap();
            assert_eq!((got.kind(), got.size()), (kind, logits.size()));
            for (got, want) in floats(&got.to_kind(Kind::Float)).iter().zip(&plain) {
                assert!((got - want).abs() < most, "{kind:?}: {got} instead of {want}");
            }
        }
    }
}

#[test]
fn draws_of_all_kinds_in_one_step() {
    let logits = logits(12, 5, 5000);
    let plain = temperature(0.9);
    let few = SamplingParams { top_k: 3, top_logprobs: 2, ..temperature(0.7) };
    let draws: Vec<OneDraw> = [(4, &plain), (0, &few), (4, &few), (2, &plain), (1, &few)]
        .into_iter()
        .map(|(row, params)| OneDraw { stream: 99, position: row, ..OneDraw::new(row, params) })
        .collect();
    assert!(sample_all(&logits, &draws).unwrap().is_none(), "some look at all logits");
    let got = completed(&logits, &draws, sample_some(&logits, &draws).unwrap());
    let want = sampler::sample(floats(&logits), 5000, &draws);
    for (i, (got, want)) in got.into_iter().zip(want).enumerate() {
        let (got, want) = (got.unwrap(), want.unwrap());
        assert_eq!((got.id, &got.top), (want.id, &want.top), "draw {i}");
        assert!(close(got.stats, want.stats), "{got:?} instead of {want:?}");
    }
    let none = completed(&logits, &[], sample_some(&logits, &[]).unwrap());
    assert!(none.is_empty() && sample_all(&logits, &[]).unwrap().is_none());
}

#[test]
fn draws_that_see_all_logits_are_not_for_the_kernels() {
    let with = |params: SamplingParams| How::of(&OneDraw::new(0, &params), 100).is_none();
    assert!(with(SamplingParams { top_k: 5, ..temperature(1.0) }));
    assert!(with(SamplingParams { top_p: 0.9, ..temperature(1.0) }));
    assert!(with(SamplingParams { top_logprobs: 2, ..temperature(1.0) }));
    assert!(!with(temperature(1.0)));
    let wrong = logits(1, 2, 10).to_kind(Kind::Double);
    let plan = DrawPlan::new(&[How { inv_temperature: 1.0, number: None }; 2], Device::Cpu);
    assert!(matches!(draw(&wrong, &plan), Err(CudaError::Unsupported(_))));
}

/// Whatever a thread reads or writes is ordered after what others do with it.
#[test]
fn nothing_races() {
    let logits = logits(21, 3, 1300);
    let params = [0.0, 0.7, 1.0].map(temperature);
    let hows = params.each_ref().map(|params| {
        let draw = OneDraw { stream: stream_of(5, 0), ..OneDraw::new(0, params) };
        How::of(&draw, 1300).unwrap()
    });
    let plan = DrawPlan::new(&hows, Device::Cpu);
    let found = race(&[&logits], unchanged, || draw(&logits, &plan).unwrap());
    assert_eq!(found, None);

    let (ids, scales) = (Tensor::from_slice(&[5i64, 0, 1299]), Tensor::from_slice(&[0.5f32; 3]));
    let sums = stats(&logits, &ids, 1.0).unwrap().sums;
    for kind in [Kind::BFloat16, Kind::Float] {
        let own = logits.copy();
        let made = [&own, &ids, &scales, &sums];
        let body = || gradient(own.shallow_clone(), (&ids, &scales), 1.0, &sums, kind).unwrap();
        assert_eq!(race(&made, unchanged, body), None, "{kind:?}");
    }
}
