//! Against the formulas applied to every token of the vocabulary, with everything counted anew.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use onpolicy_plugin_api::LogprobsMode;

use super::*;
use crate::logits::batch_stats;
use crate::sampler::{Counts, Drawn, Past, sample, stream_of};

/// A prompt, the sample so far, and the rules for its next token.
struct Case {
    row: Vec<f32>,
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    params: SamplingParams,
    forbidden: Vec<u32>,
}

impl Case {
    fn random(rng: &mut StdRng) -> Self {
        let vocab = [5, 33, 700][rng.random_range(0..3)];
        let mut ids = |most: usize| -> Vec<u32> {
            let len = rng.random_range(0..=most);
            (0..len).map(|_| rng.random_range(0..vocab as u32)).collect()
        };
        let (prompt, tokens) = (ids(40), ids(60));
        let (mut allowed, forbidden) = (ids(vocab / 2 + 2), ids(2));
        let words: Vec<Vec<u32>> = (0..6).map(|_| ids(2)).collect();
        // Some words begin as the sample ends.
        let mut bad_words: Vec<Vec<u32>> = words.into_iter().filter(|w| !w.is_empty()).collect();
        for len in [1, 2] {
            let before = &tokens[tokens.len().saturating_sub(len)..];
            bad_words.push([before, &[len as u32]].concat());
        }
        // One token at least is left.
        let left = vocab as u32 - 1;
        allowed.push(left);
        bad_words.retain(|word| word.last() != Some(&left));
        let forbidden = forbidden.into_iter().filter(|id| *id != left).collect();
        let biased: Vec<u32> = (0..vocab as u32).filter(|_| rng.random_bool(0.1)).collect();
        let mut maybe = |p: f64| rng.random_bool(p);
        let uses: [bool; 6] = [0.5, 0.5, 0.5, 0.5, 0.3, 0.5].map(&mut maybe);
        let mut spread = |most: f32| (rng.random::<f32>() * 2.0 - 1.0) * most;
        let params = SamplingParams {
            repetition_penalty: if uses[0] { 1.3 + spread(1.0) } else { 1.0 },
            presence_penalty: if uses[1] { spread(2.0) } else { 0.0 },
            frequency_penalty: if uses[2] { spread(2.0) } else { 0.0 },
            logit_bias: if uses[3] {
                biased.into_iter().map(|id| (id, spread(20.0))).collect()
            } else {
                vec![]
            },
            allowed_token_ids: uses[4].then_some(allowed),
            bad_words: if uses[5] { bad_words } else { vec![] },
            ..SamplingParams::default()
        };
        let mut row: Vec<f32> = (0..vocab).map(|_| spread(8.0)).collect();
        row[0] = f32::NEG_INFINITY;
        Self { row, prompt, tokens, params, forbidden }
    }

    /// The logits as the documentation says, token by token.
    fn naive(&self) -> Vec<f32> {
        let p = &self.params;
        let logit = |(id, &z): (usize, &f32)| {
            let id = id as u32;
            let count = self.tokens.iter().filter(|token| **token == id).count();
            let mut z = z;
            if self.prompt.contains(&id) || count > 0 {
                z = if z > 0.0 { z / p.repetition_penalty } else { z * p.repetition_penalty };
            }
            z -= p.frequency_penalty * count as f32;
            z -= if count > 0 { p.presence_penalty } else { 0.0 };
            z += p.logit_bias.iter().find(|(other, _)| *other == id).map_or(0.0, |(_, b)| *b);
            let allowed = p.allowed_token_ids.as_ref().is_none_or(|ids| ids.contains(&id));
            let with = [&self.tokens[..], &[id]].concat();
            let bad = p.bad_words.iter().any(|word| {
                word.last() == Some(&id) && with.len() >= word.len() && with.ends_with(word)
            });
            let out = !allowed || bad || self.forbidden.contains(&id);
            if out { f32::NEG_INFINITY } else { z }
        };
        self.row.iter().enumerate().map(logit).collect()
    }

    fn counts(&self) -> Counts {
        let mut counts = Counts::new(&self.prompt);
        self.tokens.iter().for_each(|&token| counts.push(token));
        counts
    }

    fn draw<'a>(&'a self, params: &'a SamplingParams, counts: &'a Counts) -> Draw<'a> {
        let past = Past { tokens: &self.tokens, counts: Some(counts) };
        Draw { forbidden: &self.forbidden, past, ..Draw::new(0, params) }
    }
}

fn one(row: &[f32], draw: Draw) -> Drawn {
    sample(row, row.len(), &[draw]).remove(0).expect("a token is left")
}

#[test]
fn every_logit_is_what_the_formulas_say() {
    let mut rng = StdRng::seed_from_u64(11);
    let (mut changed, mut same) = (0, 0);
    for _ in 0..2000 {
        let case = Case::random(&mut rng);
        let counts = case.counts();
        let draw = case.draw(&case.params, &counts);
        let want = case.naive();
        if changes(&draw) {
            let mut got = vec![9.0; 3];
            apply(&case.row, &draw, &mut got);
            assert_eq!(got, want, "{:?}", case.params);
            changed += 1;
        } else {
            assert_eq!(case.row, want, "{:?}", case.params);
            same += 1;
        }
    }
    assert!(changed > 1500 && same > 10, "{changed} {same}");
}

/// What is drawn from changed logits, and what is said of it, is the same as from a model that makes
/// these logits by itself.
#[test]
fn draws_are_those_of_the_changed_logits() {
    let mut rng = StdRng::seed_from_u64(12);
    for round in 0..600 {
        let case = Case::random(&mut rng);
        let counts = case.counts();
        let plain = SamplingParams {
            temperature: [0.0, 0.7, 1.0][round % 3],
            top_k: [0, 3][round / 3 % 2],
            top_p: [1.0, 0.8][round / 6 % 2],
            top_logprobs: round % 4,
            ..SamplingParams::default()
        };
        let params = SamplingParams {
            temperature: plain.temperature,
            top_k: plain.top_k,
            top_p: plain.top_p,
            top_logprobs: plain.top_logprobs,
            ..case.params.clone()
        };
        let at = |draw| Draw { stream: stream_of(5, round), position: round, ..draw };
        let got = one(&case.row, at(case.draw(&params, &counts)));
        assert_eq!(got, one(&case.naive(), at(Draw::new(0, &plain))));
    }
}

#[test]
fn raw_statistics_are_those_of_the_models_own_distribution() {
    let mut rng = StdRng::seed_from_u64(13);
    for round in 0..600 {
        let case = Case::random(&mut rng);
        let counts = case.counts();
        let processed = SamplingParams {
            temperature: [0.0, 0.4, 1.0, 1.7][round % 4],
            top_k: [0, 2][round / 4 % 2],
            min_p: [0.0, 0.2][round / 8 % 2],
            top_logprobs: 3,
            ..case.params.clone()
        };
        let raw = SamplingParams { logprobs_mode: LogprobsMode::Raw, ..processed.clone() };
        let at = |draw| Draw { stream: 3, position: round, ..draw };
        let want = one(&case.row, at(case.draw(&processed, &counts)));
        let got = one(&case.row, at(case.draw(&raw, &counts)));
        assert_eq!(got.id, want.id, "the mode changes no token");
        let vocab = case.row.len();
        assert_eq!(vec![got.stats], batch_stats(&case.row, vocab, &[got.id], 1.0));
        let own = SamplingParams { temperature: 0.0, top_logprobs: 3, ..Default::default() };
        assert_eq!(got.top, one(&case.row, Draw::new(0, &own)).top);
    }
}

#[test]
fn what_is_finite_stays_finite_and_what_is_broken_stays_broken() {
    let bias = vec![(0, f32::MAX), (1, f32::MIN), (2, 5.0), (3, 5.0), (4, 1.0)];
    let params = SamplingParams { logit_bias: bias, ..SamplingParams::default() };
    let row = [f32::MAX, f32::MIN, f32::NAN, f32::NEG_INFINITY, f32::INFINITY];
    let mut got = Vec::new();
    apply(&row, &Draw::new(0, &params), &mut got);
    assert_eq!((got[0], got[1], got[3], got[4]), (f32::MAX, f32::MIN, row[3], row[4]));
    assert!(got[2].is_nan());
}

#[test]
fn a_bad_word_is_forbidden_where_it_would_be_completed() {
    let bad_words = vec![vec![1, 2, 3], vec![3], vec![2, 2]];
    let params = SamplingParams { bad_words, ..SamplingParams::default() };
    let forbidden = |tokens: &[u32]| -> Vec<u32> {
        let past = Past { tokens, counts: None };
        completed_by(&Draw { past, ..Draw::new(0, &params) }).collect()
    };
    assert_eq!(forbidden(&[]), [3]);
    assert_eq!(forbidden(&[1]), [3]);
    assert_eq!(forbidden(&[1, 2]), [3, 3, 2]);
    assert_eq!(forbidden(&[2, 1]), [3]);
    assert_eq!(forbidden(&[7, 2]), [3, 2]);
}

#[test]
fn a_row_of_which_nothing_is_left_says_so() {
    let params = SamplingParams {
        allowed_token_ids: Some(vec![1]),
        bad_words: vec![vec![1]],
        ..Default::default()
    };
    let drawn = sample(&[1.0, 2.0, 3.0], 3, &[Draw::new(0, &params)]).remove(0);
    assert_eq!(drawn, Err(crate::sampler::NOTHING_LEFT.into()));
}
