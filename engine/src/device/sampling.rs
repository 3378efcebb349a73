//! Draws from rows of logits in tensor operations. The random numbers are the sampler's, so a seed
//! means the same everywhere.

use super::{download, stats::RowSums, upload};
use crate::{
    cuda::{CudaError, sampling as kernel, takes},
    kernels::disjoint,
    sampler::{
        Draw, Drawn, random_number, sample_row,
        summed::{inv_temperature, needs_logits},
    },
};
use onpolicy_plugin_api::TokenStats;
use tch::{Device, Kind, Tensor};

/// Tokens whose weights are summed up before a draw looks at one of them.
const BLOCK: i64 = 512;

/// Draws whose weights are in memory at a time.
const ROWS: i64 = 32;

/// As [`sampler::sample`](crate::sampler::sample), from `logits` (`[rows, vocab]`, f32 or f64) on any
/// device, by kernels of our own on a CUDA one: what comes back for most draws is four numbers each, all in one copy. Rows whose draws
/// look at all logits (penalties, biases, grammars, truncation, `top_logprobs`) come back whole.
///
/// # Errors
/// Per draw, as there.
///
/// # Panics
/// If a draw's row is not among the logits, or a kernel cannot be launched.
pub fn sample(logits: &Tensor, draws: &[Draw<'_>]) -> Vec<Result<Drawn, String>> {
    let (rows, _) = logits.size2().expect("logits have two axes");
    assert!(draws.iter().all(|draw| draw.row < rows as usize), "a draw's row is not among them");
    let kernels = takes(logits.device()).then(|| kernel::sample_some(logits, draws));
    let drawn = match kernels {
        None | Some(Err(CudaError::Unsupported(_))) => draw_on_device(logits, draws),
        Some(made) => made.unwrap_or_else(|error| panic!("{error}")),
    };
    completed(logits, draws, drawn)
}

/// `drawn`, and the draws that it lacks: their rows of `logits` come to the host whole.
pub(crate) fn completed(
    logits: &Tensor,
    draws: &[Draw<'_>],
    mut drawn: Vec<Option<Result<Drawn, String>>>,
) -> Vec<Result<Drawn, String>> {
    let vocab = logits.size()[1];
    let rest: Vec<usize> = (0..draws.len()).filter(|&i| drawn[i].is_none()).collect();
    if !rest.is_empty() {
        let mut rows: Vec<i64> = rest.iter().map(|&i| draws[i].row as i64).collect();
        rows.sort_unstable();
        rows.dedup();
        let seen = download(&logits.index_select(0, &upload(&rows, logits.device())));
        let made = disjoint::map(rest.len(), &|i| {
            let draw = &draws[rest[i]];
            let place = rows.binary_search(&(draw.row as i64)).expect("a row that came back");
            sample_row(&seen[place * vocab as usize..][..vocab as usize], draw)
        });
        rest.into_iter().zip(made).for_each(|(i, made)| drawn[i] = Some(made));
    }
    drawn.into_iter().flatten().collect()
}

/// The draws that need not see all logits; none for the others, and where a row is no distribution:
/// what is wrong with it is told from all of it.
fn draw_on_device(logits: &Tensor, draws: &[Draw<'_>]) -> Vec<Option<Result<Drawn, String>>> {
    let vocab = logits.size()[1] as usize;
    let summed = |&i: &usize| !needs_logits(&draws[i], vocab);
    let summed: Vec<usize> = (0..draws.len()).filter(summed).collect();
    let mut drawn: Vec<_> = draws.iter().map(|_| None).collect();
    if summed.is_empty() {
        return drawn;
    }
    let planned: Vec<_> = summed.iter().map(|&i| planned(&draws[i])).collect();
    let numbers = download(&draw(logits, &DrawPlan::new(&planned, logits.device())));
    for (i, numbers) in summed.into_iter().zip(numbers.as_chunks::<4>().0) {
        let [id, logprob, entropy, baseline] = *numbers;
        let stats = TokenStats { logprob, entropy, baseline };
        let token = || Ok(Drawn { id: id as u32, stats, top: Vec::new() });
        drawn[i] = (!logprob.is_nan()).then(token);
    }
    drawn
}

/// A draw as [`DrawPlan::new`] takes it.
fn planned(draw: &Draw<'_>) -> (usize, f32, Option<f64>) {
    let greedy = draw.params.temperature == 0.0;
    (draw.row, inv_temperature(draw), (!greedy).then(|| random_number(draw)))
}

/// Tokens to draw, on the device.
#[derive(Debug)]
pub struct DrawPlan {
    /// Row of the logits that each draw is from, i64 `[draws]`.
    pub rows: Tensor,
    /// One over the temperature, f64 `[draws]`; 1 where the likeliest token is taken.
    pub inv_temperatures: Tensor,
    /// A random number in `[0, 1)`, f64 `[draws]`; below 0 where the likeliest token is taken.
    pub uniforms: Tensor,
}

impl DrawPlan {
    /// Brings row, inverse temperature and random number (none: take the likeliest token) of each
    /// draw to the device, in one copy.
    pub fn new(draws: &[(usize, f32, Option<f64>)], device: Device) -> Self {
        let rows = draws.iter().map(|&(row, _, _)| row as f64);
        let factors = draws.iter().map(|&(_, factor, _)| f64::from(factor));
        let uniforms = draws.iter().map(|&(_, _, uniform)| uniform.unwrap_or(-1.0));
        let numbers: Vec<f64> = rows.chain(factors).chain(uniforms).collect();
        let numbers = upload(&numbers, device).view([3, -1]);
        Self {
            rows: numbers.get(0).to_kind(Kind::Int64),
            inv_temperatures: numbers.get(1),
            uniforms: numbers.get(2),
        }
    }

    fn len(&self) -> i64 {
        self.rows.size()[0]
    }
}

/// Draws a token for each of the plan's draws from `logits`, `[rows, vocab]`, f32 or f64. Gives the
/// token, its log-prob, entropy and baseline, f64 `[draws, 4]`; the log-prob is NaN where a row is
/// no distribution.
pub fn draw(logits: &Tensor, plan: &DrawPlan) -> Tensor {
    let starts = (0..plan.len()).step_by(ROWS as usize);
    let parts = starts.map(|start| {
        let part = |numbers: &Tensor| numbers.narrow(0, start, ROWS.min(plan.len() - start));
        let rows = logits.index_select(0, &part(&plan.rows));
        draw_rows(&rows, &part(&plan.inv_temperatures), &part(&plan.uniforms))
    });
    Tensor::cat(&parts.collect::<Vec<_>>(), 0)
}

fn draw_rows(logits: &Tensor, inv_temperatures: &Tensor, uniforms: &Tensor) -> Tensor {
    let factors = inv_temperatures.to_kind(logits.kind()).unsqueeze(1);
    let (sums, weights) = RowSums::of(logits, &factors);
    let uniforms = uniforms.unsqueeze(1);
    let drawn = pick(&weights, &uniforms);
    let ids = logits.argmax(-1, true).where_self(&uniforms.lt(0.0), &drawn);
    let stats = sums.token(&logits.gather(1, &ids, false));
    Tensor::cat(&[ids.to_kind(Kind::Double), stats], 1)
}

/// The index at which each row's weights, summed from the left, exceed the part `uniforms`
/// (`[rows, 1]`) of their total, `[rows, 1]`.
fn pick(weights: &Tensor, uniforms: &Tensor) -> Tensor {
    let (rows, vocab) = weights.size2().expect("weights have two axes");
    let blocks = vocab.div_euclid(BLOCK) + i64::from(vocab % BLOCK > 0);
    let padded = weights.constant_pad_nd([0, blocks * BLOCK - vocab].as_slice());
    let padded = padded.view([rows, blocks, BLOCK]);
    let masses = padded.sum_dim_intlist([-1i64].as_slice(), false, Kind::Double).cumsum(-1, None);
    let target = uniforms * masses.narrow(1, blocks - 1, 1);
    let block = first_above(&masses, &target);
    let before = masses.gather(1, &(&block - 1).clamp_min(0), false);
    let rest = &target - before.where_self(&block.gt(0), &target.zeros_like());
    let place = block.unsqueeze(-1).expand([rows, 1, BLOCK], false);
    let cells = padded.gather(1, &place, false).squeeze_dim(1).cumsum(-1, Kind::Double);
    &block * BLOCK + first_above(&cells, &rest)
}

/// The first index at which `sums` (`[rows, n]`, ascending) exceeds `target` (`[rows, 1]`), which
/// is brought below the last sum: rounding may have left that short.
fn first_above(sums: &Tensor, target: &Tensor) -> Tensor {
    let last = sums.narrow(1, sums.size()[1] - 1, 1);
    let target = target.minimum(&last.nextafter(&last.zeros_like()));
    sums.le_tensor(&target).sum_dim_intlist([-1i64].as_slice(), true, Kind::Int64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        sampler::{self, NOTHING_LEFT},
        torch::{random, slices::floats},
    };
    use onpolicy_plugin_api::{LogprobsMode, SamplingParams};

    fn logits(rows: i64, vocab: i64) -> Tensor {
        random::seed(vocab as u64);
        random::normal(&[rows, vocab]) * 3.0
    }

    #[test]
    fn draws_are_those_of_the_sampler() {
        for vocab in [1, 2, 160, 512, 513, 5000] {
            let logits = logits(7, vocab);
            let temperatures = [0.0, 1.0, 0.6, 1.7];
            let params = temperatures
                .map(|temperature| SamplingParams { temperature, ..SamplingParams::default() });
            let draw_of = |i: usize| Draw {
                stream: i as u64,
                position: i * 3,
                ..Draw::new(i % 7, &params[i % 4])
            };
            let draws: Vec<Draw<'_>> = (0..400).map(draw_of).collect();
            let want = sampler::sample(floats(&logits), vocab as usize, &draws);
            let planned: Vec<_> = draws.iter().map(planned).collect();
            let got = draw(&logits, &DrawPlan::new(&planned, Device::Cpu));
            assert_eq!((got.size(), got.kind()), (vec![400, 4], Kind::Double));
            for (i, (got, want)) in download(&got).chunks(4).zip(want).enumerate() {
                let want = want.expect("a distribution");
                let stats = [want.stats.logprob, want.stats.entropy, want.stats.baseline];
                assert_eq!(got[0], want.id as f32, "vocabulary {vocab}, draw {i}");
                for (got, want) in got[1..].iter().zip(stats) {
                    assert!((got - want).abs() < 2e-5, "vocabulary {vocab}, draw {i}: {got}");
                }
            }
        }
    }

    /// Rows that come back whole, next to others and to rows that are broken.
    #[test]
    fn every_rule_of_sampling_is_kept() {
        let logits = logits(6, 700);
        let _ = logits.get(4).get(5).fill_(f64::NAN);
        let plain = SamplingParams::default();
        let rules = [
            plain.clone(),
            SamplingParams { top_k: 5, ..plain.clone() },
            SamplingParams { top_p: 0.6, temperature: 1.3, ..plain.clone() },
            SamplingParams { min_p: 0.2, top_logprobs: 3, ..plain.clone() },
            SamplingParams { logit_bias: vec![(3, 9.0)], ..plain.clone() },
            SamplingParams { allowed_token_ids: Some(vec![7]), ..plain.clone() },
            SamplingParams { temperature: 0.5, logprobs_mode: LogprobsMode::Raw, ..plain.clone() },
            SamplingParams { temperature: 0.0, top_logprobs: 1, ..plain.clone() },
        ];
        let draws = (0..96).map(|i| Draw {
            stream: i as u64,
            forbidden: if i % 5 == 0 { &[1, 2] } else { &[] },
            ..Draw::new(i % 6, &rules[i % rules.len()])
        });
        let draws: Vec<Draw<'_>> = draws.collect();
        let want = sampler::sample(floats(&logits), 700, &draws);
        let got = sample(&logits, &draws);
        assert_eq!(got.len(), want.len());
        for (i, (got, want)) in got.into_iter().zip(want).enumerate() {
            let (got, want) = match (got, want) {
                (Ok(got), Ok(want)) => (got, want),
                (got, want) => {
                    assert_eq!(got, want, "draw {i}");
                    assert_eq!(i % 6, 4, "draw {i}");
                    continue;
                }
            };
            assert_eq!((got.id, got.top), (want.id, want.top), "draw {i}");
            assert!((got.stats.logprob - want.stats.logprob).abs() < 2e-5, "draw {i}");
        }
        let nothing = SamplingParams { allowed_token_ids: Some(vec![]), ..plain };
        assert_eq!(sample(&logits, &[Draw::new(0, &nothing)]), [Err(NOTHING_LEFT.to_string())]);
    }

    #[test]
    fn the_ends_of_a_row_are_never_passed() {
        let weights = Tensor::zeros([2, 1030], (Kind::Float, Device::Cpu));
        // Nothing but two tokens has any weight.
        let _ = weights.narrow(1, 3, 1).fill_(1.0);
        let _ = weights.narrow(1, 700, 1).fill_(1e-30);
        let almost = 1.0f64.next_down();
        for (u, want) in [(0.0, 3), (0.5, 3), (almost, 3)] {
            let uniforms = Tensor::from_slice(&[u, u]).unsqueeze(1);
            let got = Vec::<i64>::try_from(pick(&weights, &uniforms).flatten(0, 1)).unwrap();
            assert_eq!(got, [want; 2], "{u}");
        }
        let even = Tensor::ones([1, 1030], (Kind::Float, Device::Cpu));
        for (u, want) in [(0.0, 0), (511.5 / 1030.0, 511), (512.5 / 1030.0, 512), (almost, 1029)] {
            let got = pick(&even, &Tensor::from_slice(&[u]).unsqueeze(1));
            assert_eq!(got.int64_value(&[0, 0]), want, "{u}");
        }
    }

    #[test]
    fn a_broken_row_is_told_and_no_other_suffers() {
        let logits = logits(3, 600);
        let _ = logits.get(1).get(77).fill_(f64::NAN);
        let plan = [(0, 1.0, Some(0.3)), (1, 1.0, Some(0.3)), (1, 1.0, None), (2, 1.0, None)];
        let got = download(&draw(&logits, &DrawPlan::new(&plan, Device::Cpu)));
        let nan: Vec<bool> = got.chunks(4).map(|drawn| drawn[1].is_nan()).collect();
        assert_eq!(nan, [false, true, true, false]);
        assert!(got.chunks(4).all(|drawn| (0.0..600.0).contains(&drawn[0])), "{got:?}");
    }
}
