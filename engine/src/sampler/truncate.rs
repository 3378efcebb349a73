//! Leaves out unlikely tokens: `min_p`, then `top_k`, then `top_p`, each on what the one before
//! left. Equally likely tokens are taken in the order of their ids, so that exactly `top_k`
//! tokens, and no more of equal ones than `top_p` needs, are kept.
//!
//! The vocabulary is never sorted. A bound below which no kept token can lie is found first, the
//! few tokens above it are gathered, and the rest is selection among these.

use std::cmp::Ordering;

use onpolicy_plugin_api::SamplingParams;

use crate::kernels::rows;
use crate::kernels::simd::Level;
use crate::logits::RowStats;

/// Id and logit of a token.
pub(super) type Candidate = (u32, f32);

/// Below this many candidates, sorting is quicker than more halving.
const SORTED: usize = 32;

/// Times that the range of logits is halved to find the lowest one of a nucleus. Each is a pass
/// over the row, about as costly as gathering and sorting a thousand tokens more.
const HALVINGS: usize = 5;

/// Whether the parameters leave every token of the vocabulary.
pub(super) fn keeps_all(params: &SamplingParams, vocab: usize) -> bool {
    params.min_p <= 0.0 && params.top_p >= 1.0 && !selects(params, vocab)
}

/// Whether `top_k` leaves out anything.
fn selects(params: &SamplingParams, vocab: usize) -> bool {
    (1..vocab).contains(&params.top_k)
}

/// The likelier token first; of equal ones the lower id.
pub(super) fn likelier(a: &Candidate, b: &Candidate) -> Ordering {
    b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal).then(a.0.cmp(&b.0))
}

/// Fills `candidates` with the tokens that the parameters keep, in no useful order. `stats` are
/// those of the whole row; `maxima` is scratch.
pub(super) fn keep(
    row: &[f32],
    stats: &RowStats,
    params: &SamplingParams,
    (candidates, maxima): (&mut Vec<Candidate>, &mut Vec<f32>),
) {
    let selects = selects(params, row.len());
    let mut floor = f32::MIN;
    if params.min_p > 0.0 {
        floor = floor.max(logit_at(stats, f64::from(params.min_p).ln()));
    }
    if selects {
        floor = floor.max(floor_of_likeliest(row, params.top_k, maxima));
    }
    let only_top_p = !selects && params.min_p <= 0.0;
    if only_top_p {
        floor = floor.max(floor_of_nucleus(row, stats, params.top_p));
    }
    candidates.clear();
    rows::gather(Level::best(), row, floor, candidates);

    if params.min_p > 0.0 {
        let limit = f64::from(params.min_p).ln();
        candidates.retain(|&(_, logit)| tempered(stats, logit) >= limit);
    }
    if selects {
        keep_likeliest(candidates, params.top_k);
    }
    if params.top_p < 1.0 {
        let total = if only_top_p { stats.z } else { mass(stats, candidates) };
        keep_nucleus(candidates, stats, f64::from(params.top_p) * total);
    }
}

/// A logit that at least `k` logits of the row reach, or the lowest finite one.
pub(super) fn floor_of_likeliest(row: &[f32], k: usize, maxima: &mut Vec<f32>) -> f32 {
    // The k-th largest of the groups' maxima: each of k groups holds one logit that reaches it.
    rows::group_maxima(Level::best(), row, maxima);
    if maxima.len() < k {
        return f32::MIN;
    }
    let (_, &mut floor, _) = maxima.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    floor.max(f32::MIN)
}

/// A logit that no token falls below of the fewest likeliest ones whose probability is `top_p`.
fn floor_of_nucleus(row: &[f32], stats: &RowStats, top_p: f32) -> f32 {
    // All tokens of the row together, were they below this logit, could not make up the mass that
    // is left out.
    let left_out = (1.0 - f64::from(top_p)) * stats.z / row.len() as f64;
    let mut floor = logit_at(stats, left_out.ln() - 1.0);
    // A bit more than is wanted, because the sums are rounded.
    let enough = f64::from(top_p) * stats.z * (1.0 + 1e-6);
    let mut ceiling = stats.max;
    for _ in 0..HALVINGS {
        let middle = floor + (ceiling - floor) / 2.0;
        if rows::mass_above(Level::best(), row, stats.scale(), middle) >= enough {
            floor = middle;
        } else {
            ceiling = middle;
        }
    }
    floor
}

/// A logit just below the one that is `d` from the largest one after the temperature.
fn logit_at(stats: &RowStats, d: f64) -> f32 {
    let logit = f64::from(stats.max) + d / f64::from(stats.inv_temperature);
    (logit as f32).next_down().clamp(f32::MIN, stats.max)
}

/// Distance to the largest logit after the temperature; at most 0.
fn tempered(stats: &RowStats, logit: f32) -> f64 {
    (f64::from(logit) - f64::from(stats.max)) * f64::from(stats.inv_temperature)
}

fn mass(stats: &RowStats, candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|&(_, logit)| tempered(stats, logit).exp()).sum()
}

/// Keeps the `k` likeliest candidates.
pub(super) fn keep_likeliest(candidates: &mut Vec<Candidate>, k: usize) {
    if k < candidates.len() {
        candidates.select_nth_unstable_by(k - 1, likelier);
        candidates.truncate(k);
    }
}

/// Keeps the fewest likeliest candidates whose mass reaches `wanted`, at least one.
fn keep_nucleus(candidates: &mut Vec<Candidate>, stats: &RowStats, mut wanted: f64) {
    // The candidates before `low` are kept, those from `high` on are not.
    let (mut low, mut high) = (0, candidates.len());
    while high - low > SORTED {
        let middle = (high - low) / 2;
        candidates[low..high].select_nth_unstable_by(middle, likelier);
        let likelier_half = mass(stats, &candidates[low..low + middle]);
        if likelier_half >= wanted {
            high = low + middle;
        } else {
            wanted -= likelier_half;
            low += middle;
        }
    }
    candidates[low..high].sort_unstable_by(likelier);
    let last = candidates[low..high].iter().position(|&(_, logit)| {
        wanted -= tempered(stats, logit).exp();
        wanted <= 0.0
    });
    candidates.truncate(last.map_or(high, |last| low + last + 1));
}
