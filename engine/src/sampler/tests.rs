//! Against a full sort and softmax in f64.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::logits::batch_stats;

/// The distribution that a draw is made from: ids and probabilities, likeliest first.
struct Naive(Vec<(u32, f64)>);

impl Naive {
    fn new(row: &[f32], params: &SamplingParams, forbidden: &[u32]) -> Self {
        let t = if params.temperature == 0.0 { 1.0 } else { f64::from(params.temperature) };
        let mut tokens: Vec<(u32, f64)> = (0..)
            .zip(row)
            .filter(|(id, logit)| !forbidden.contains(id) && **logit > f32::NEG_INFINITY)
            .map(|(id, &logit)| (id, f64::from(logit) / t))
            .collect();
        tokens.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
        let max = tokens[0].1;
        tokens.iter_mut().for_each(|(_, z)| *z = (*z - max).exp());
        let mut naive = Self(tokens);
        naive.normalise();
        if params.temperature == 0.0 {
            return naive;
        }
        let likeliest = naive.0[0].1;
        naive.0.retain(|(_, p)| *p >= f64::from(params.min_p) * likeliest);
        naive.0.truncate(if params.top_k == 0 { usize::MAX } else { params.top_k });
        naive.normalise();
        let top_p = if params.top_p < 1.0 { f64::from(params.top_p) } else { 2.0 };
        let mut sum = 0.0;
        let reached = naive.0.iter().position(|(_, p)| {
            sum += p;
            sum >= top_p
        });
        naive.0.truncate(reached.map_or(usize::MAX, |i| i + 1));
        naive.normalise();
        naive
    }

    fn normalise(&mut self) {
        let total: f64 = self.0.iter().map(|(_, p)| p).sum();
        self.0.iter_mut().for_each(|(_, p)| *p /= total);
    }

    fn check(&self, drawn: &Drawn, top: usize) {
        let entropy = -self.0.iter().map(|(_, p)| p * p.ln()).sum::<f64>();
        let baseline: f64 = self.0.iter().map(|(_, p)| p * p * (entropy + p.ln())).sum();
        let (_, p) = self.0.iter().find(|(id, _)| *id == drawn.id).expect("in the support");
        assert!((f64::from(drawn.stats.logprob) - p.ln()).abs() < 2e-6 - 3e-7 * p.ln());
        assert!((f64::from(drawn.stats.entropy) - entropy).abs() < 2e-6);
        assert!((f64::from(drawn.stats.baseline) - baseline).abs() < 1e-6);
        assert_eq!(drawn.top.len(), top.min(self.0.len()));
        for (&(id, logprob), &(want, p)) in drawn.top.iter().zip(&self.0) {
            assert_eq!(id, want);
            assert!((f64::from(logprob) - p.ln()).abs() < 2e-6 - 3e-7 * p.ln());
        }
    }

    /// Chi-square of the counts; cells that expect fewer than five draws are put together.
    fn check_counts(&self, ids: &[u32]) {
        let mut cells = Vec::new();
        let mut rare = (0.0, 0.0);
        let mut seen = 0;
        for &(id, p) in &self.0 {
            let (count, expected) = (count(ids, id), p * ids.len() as f64);
            seen += count;
            let count = count as f64;
            if expected < 5.0 {
                rare = (rare.0 + count, rare.1 + expected);
            } else {
                cells.push((count, expected));
            }
        }
        assert_eq!(seen, ids.len(), "a token outside of the support was drawn");
        if rare.1 >= 5.0 {
            cells.push(rare);
        }
        let chi: f64 = cells.iter().map(|(n, expected)| (n - expected).powi(2) / expected).sum();
        // Wilson and Hilferty's approximation of the quantile at 1 - 1e-6.
        let freedom = (cells.len() - 1).max(1) as f64;
        let spread = 2.0 / (9.0 * freedom);
        let limit = freedom * (1.0 - spread + 4.75 * spread.sqrt()).powi(3);
        assert!(chi < limit, "chi-square {chi} with {freedom} degrees of freedom");
    }
}

fn count(ids: &[u32], id: u32) -> usize {
    ids.iter().filter(|&&drawn| drawn == id).count()
}

fn random_row(rng: &mut StdRng, len: usize, spread: f32) -> Vec<f32> {
    (0..len).map(|_| (0..4).map(|_| rng.random::<f32>() - 0.5).sum::<f32>() * spread).collect()
}

fn draws<'a>(params: &'a SamplingParams, stream: u64, count: usize) -> Vec<Draw<'a>> {
    (0..count)
        .map(|position| Draw { row: 0, params, stream, position, forbidden: &[], mask: None })
        .collect()
}

fn one(row: &[f32], params: &SamplingParams, forbidden: &[u32]) -> Drawn {
    let draw = Draw { row: 0, params, stream: 9, position: 4, forbidden, mask: None };
    sample(row, row.len(), &[draw]).remove(0).unwrap()
}

/// The ids of all tokens with a part in the distribution, in order.
fn support(row: &[f32], params: SamplingParams) -> Vec<u32> {
    let params = SamplingParams { top_logprobs: 20, ..params };
    let mut ids: Vec<u32> = one(row, &params, &[]).top.iter().map(|(id, _)| *id).collect();
    ids.sort_unstable();
    ids
}

fn params() -> SamplingParams {
    SamplingParams::default()
}

#[test]
fn counts_follow_the_distribution_in_every_mode() {
    let row = random_row(&mut StdRng::seed_from_u64(1), 700, 5.0);
    let modes = [
        params(),
        SamplingParams { temperature: 0.6, ..params() },
        SamplingParams { temperature: 2.0, ..params() },
        SamplingParams { top_k: 20, ..params() },
        SamplingParams { top_p: 0.9, ..params() },
        SamplingParams { min_p: 0.1, ..params() },
        SamplingParams { temperature: 0.8, top_k: 50, top_p: 0.8, min_p: 0.02, ..params() },
    ];
    for (stream, params) in modes.iter().enumerate() {
        let drawn = sample(&row, row.len(), &draws(params, stream as u64, 200_000));
        let ids: Vec<u32> = drawn.into_iter().map(|drawn| drawn.unwrap().id).collect();
        Naive::new(&row, params, &[]).check_counts(&ids);
    }
}

#[test]
fn statistics_and_likeliest_tokens_are_those_of_what_is_left() {
    let mut rng = StdRng::seed_from_u64(2);
    for round in 0..600 {
        let len = [3, 16, 300, 2000, 20_000][round % 5];
        let spread = rng.random_range(0.1..12.0);
        let mut row = random_row(&mut rng, len, spread);
        if rng.random_bool(0.3) {
            // Many ties.
            row.iter_mut().for_each(|z| *z = z.round());
        }
        row[len / 2] = f32::NEG_INFINITY;
        let mut maybe = |p: f64| rng.random_bool(p);
        let (min_p, top_k, top_p, forbid) = (maybe(0.4), maybe(0.4), maybe(0.4), maybe(0.3));
        let params = SamplingParams {
            temperature: rng.random_range(0.1..2.0),
            min_p: if min_p { rng.random_range(0.0..0.5) } else { 0.0 },
            top_k: if top_k { rng.random_range(1..1500) } else { 0 },
            top_p: if top_p { rng.random_range(0.05..1.0) } else { 1.0 },
            top_logprobs: rng.random_range(0..=20),
            ..params()
        };
        let forbidden: &[u32] = if forbid { &[0, 7, 1_000_000] } else { &[] };
        let draw =
            Draw { row: 0, params: &params, stream: 5, position: round, forbidden, mask: None };
        let drawn = sample(&row, len, &[draw]).remove(0).unwrap();
        Naive::new(&row, &params, forbidden).check(&drawn, params.top_logprobs);
    }
}

#[test]
fn top_k_keeps_exactly_k_and_the_lower_ids_of_equal_tokens() {
    let row = [1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0];
    let top_k = |top_k| support(&row, SamplingParams { top_k, ..params() });
    assert_eq!(top_k(1), [1]);
    assert_eq!(top_k(2), [1, 3]);
    assert_eq!(top_k(3), [1, 2, 3]);
    assert_eq!(top_k(4), [1, 2, 3, 4]);
    assert_eq!(top_k(7).len(), 7);
    assert_eq!(top_k(100).len(), 7);
    assert_eq!(support(&[1.0; 5000], SamplingParams { top_k: 3, ..params() }), [0, 1, 2]);
}

#[test]
fn top_p_keeps_the_fewest_tokens_that_reach_it() {
    // Equal logits have weights of exactly 1, so the sums are exact.
    let top_p = |row: &[f32], top_p| support(row, SamplingParams { top_p, ..params() });
    assert_eq!(top_p(&[1.0; 4], 0.25), [0]);
    assert_eq!(top_p(&[1.0; 4], 0.5), [0, 1]);
    assert_eq!(top_p(&[1.0; 4], 0.501), [0, 1, 2]);
    assert_eq!(top_p(&[1.0; 4], 1.0), [0, 1, 2, 3]);
    assert_eq!(top_p(&[0.0, 9.0, 0.0, 8.0], 1e-6), [1]);
    assert_eq!(top_p(&[0.0, 9.0, 0.0, 8.0], 0.75), [1, 3]);
    assert_eq!(top_p(&[-2.5; 4096], 1.0 / 512.0), [0, 1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn min_p_keeps_tokens_down_to_its_share_of_the_likeliest() {
    let half = -std::f32::consts::LN_2;
    let row = [half - 1e-4, 0.0, half + 1e-4, 0.0, -5.0];
    let min_p = |min_p| support(&row, SamplingParams { min_p, ..params() });
    assert_eq!(min_p(0.5), [1, 2, 3]);
    assert_eq!(min_p(0.499), [0, 1, 2, 3]);
    assert_eq!(min_p(1.0), [1, 3]);
    assert_eq!(min_p(0.001), [0, 1, 2, 3, 4]);
}

#[test]
fn one_limit_applies_to_what_the_one_before_left() {
    let row = [0.0, 0.0, 0.0, 0.0, -0.1, -9.0];
    // Of five equal-ish tokens top_k leaves four with a quarter each, of which 0.5 is two.
    let both = SamplingParams { top_k: 4, top_p: 0.5, ..params() };
    assert_eq!(support(&row, both), [0, 1]);
    let all = SamplingParams { min_p: 0.95, top_k: 3, top_p: 0.6, ..params() };
    assert_eq!(support(&row, all), [0, 1]);
}

#[test]
fn greedy_takes_the_first_of_the_likeliest_with_the_whole_distribution() {
    let mut rng = StdRng::seed_from_u64(3);
    for len in [5, 100, 5000] {
        let mut row = random_row(&mut rng, len, 6.0);
        let greedy = SamplingParams { temperature: 0.0, top_logprobs: 3, ..params() };
        (row[len / 3], row[len / 2]) = (14.0, 14.0);
        let drawn = one(&row, &greedy, &[]);
        assert_eq!(drawn.id, len as u32 / 3);
        Naive::new(&row, &greedy, &[]).check(&drawn, 3);
        let limited = SamplingParams { top_k: 1, top_p: 0.1, min_p: 0.9, ..greedy.clone() };
        assert_eq!(one(&row, &limited, &[]), drawn);
        assert_eq!(one(&row, &greedy, &[len as u32 / 3]).id, len as u32 / 2);
    }
}

#[test]
fn a_draw_depends_on_nothing_else_in_the_batch() {
    let mut rng = StdRng::seed_from_u64(4);
    let vocab = 500;
    let logits = random_row(&mut rng, 40 * vocab, 4.0);
    let kinds = [
        params(),
        SamplingParams { top_p: 0.9, top_logprobs: 4, ..params() },
        SamplingParams { temperature: 0.0, ..params() },
        SamplingParams { top_k: 30, min_p: 0.01, ..params() },
    ];
    let draws: Vec<Draw> = (0..40)
        .map(|row| Draw {
            row,
            params: &kinds[row % 4],
            stream: stream_of(11, row),
            position: row * 3,
            forbidden: if row % 3 == 0 { &[1, 2, 3] } else { &[] },
            mask: None,
        })
        .collect();
    let together = sample(&logits, vocab, &draws);
    let reversed: Vec<Draw> = draws.iter().rev().copied().collect();
    let backwards = sample(&logits, vocab, &reversed);
    for (i, draw) in draws.iter().enumerate() {
        let row = &logits[draw.row * vocab..][..vocab];
        let alone = sample(row, vocab, &[Draw { row: 0, ..*draw }]).remove(0);
        assert_eq!(alone, together[i]);
        assert_eq!(backwards[39 - i], together[i]);
    }
}

#[test]
fn streams_and_positions_give_different_tokens() {
    let row = vec![0.0; 1000];
    let params = params();
    let ids = |stream| -> Vec<u32> {
        let drawn = sample(&row, 1000, &draws(&params, stream, 100));
        drawn.into_iter().map(|drawn| drawn.unwrap().id).collect()
    };
    let (a, b) = (ids(stream_of(1, 0)), ids(stream_of(1, 1)));
    assert_eq!(a, ids(stream_of(1, 0)));
    let same = a.iter().zip(&b).filter(|(a, b)| a == b).count();
    assert!(same < 5, "{same} of 100 tokens are the same in two streams");
    assert!(a.iter().collect::<std::collections::HashSet<_>>().len() > 80);
}

/// The trainer computes its log-probs with `batch_stats`; at temperature T and without
/// truncation they must be the engine's to the last bit.
#[test]
fn the_trainers_statistics_are_the_same_bits() {
    let mut rng = StdRng::seed_from_u64(5);
    let row = random_row(&mut rng, 49_152, 9.0);
    for temperature in [1.0, 0.7] {
        let drawn = one(&row, &SamplingParams { temperature, ..params() }, &[]);
        let stats = batch_stats(&row, row.len(), &[drawn.id], 1.0 / temperature);
        assert_eq!(stats, [drawn.stats]);
    }
}

#[test]
fn forbidden_tokens_are_never_drawn() {
    let row = [9.0, 0.0, 9.0, 0.1, 0.2];
    for params in [params(), SamplingParams { top_k: 2, ..params() }] {
        let draws: Vec<Draw> = draws(&params, 1, 2000)
            .into_iter()
            .map(|draw| Draw { forbidden: &[0, 2], ..draw })
            .collect();
        let drawn = sample(&row, 5, &draws);
        let ids: Vec<u32> = drawn.into_iter().map(|drawn| drawn.unwrap().id).collect();
        Naive::new(&row, &params, &[0, 2]).check_counts(&ids);
    }
}

#[test]
fn the_end_of_the_row_is_no_way_out() {
    // All mass in the middle: rounding at the very end must not reach a token without mass.
    let mut row = vec![f32::NEG_INFINITY; 1000];
    row[300..600].iter_mut().enumerate().for_each(|(i, z)| *z = (i as f32).sin());
    let mut masses = Vec::new();
    let stats = row_stats_and_masses(&row, 1.0, &mut masses);
    assert_eq!(pick(&row, &stats, &masses, 0.0), 300);
    assert_eq!(pick(&row, &stats, &masses, 1.0 - f64::EPSILON / 2.0), 599);
    assert_eq!(pick(&row, &stats, &masses, 1.0), 599);
    assert_eq!(pick(&row, &stats, &masses, 2.0), 599);
}

#[test]
fn extreme_temperatures_are_sound() {
    let row = [1.0, 2.0, 3.0, 2.9];
    for (temperature, likeliest) in [(1e-40, true), (1e-30, true), (0.001, true), (100.0, false)] {
        let params = SamplingParams { temperature, ..params() };
        let drawn = sample(&row, 4, &draws(&params, 2, 400));
        let ids: Vec<u32> = drawn.into_iter().map(|drawn| drawn.unwrap().id).collect();
        assert_eq!(count(&ids, 2) == 400, likeliest, "{temperature}");
    }
}

#[test]
fn a_row_that_is_no_distribution_fails_alone() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let logits = [0.0, nan, 1.0, 0.0, inf, 1.0, -inf, -inf, -inf, 0.5, 0.5, 0.5];
    let kinds = [
        params(),
        SamplingParams { temperature: 0.0, ..params() },
        SamplingParams { top_k: 2, top_p: 0.9, top_logprobs: 2, ..params() },
    ];
    for params in &kinds {
        let draw = |row| Draw { row, params, stream: 1, position: 1, forbidden: &[], mask: None };
        let drawn = sample(&logits, 3, &[draw(0), draw(1), draw(2), draw(3)]);
        let errors: Vec<_> = drawn[..3].iter().map(|drawn| drawn.clone().unwrap_err()).collect();
        assert!(errors[0].contains("NaN"), "{errors:?}");
        assert!(errors[1].contains("infinite"), "{errors:?}");
        assert!(errors[2].contains("forbidden"), "{errors:?}");
        assert!(drawn[3].as_ref().is_ok_and(|drawn| drawn.id < 3));
    }
}
