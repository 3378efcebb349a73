//! Against logits in memory and the sampler's passes over them.

use onpolicy_plugin_api::SamplingParams;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::logits::{batch_stats, row_stats};
use crate::sampler::{sample, stream_of};

const WIDTH: usize = 20;

/// A head, hidden states and their logits.
struct Case {
    weight: Tensor,
    hidden: Vec<f32>,
    logits: Vec<f32>,
    vocab: usize,
}

impl Case {
    /// Logits are about as spread as `spread` says.
    fn new(rows: usize, vocab: usize, spread: f32) -> Self {
        let mut rng = StdRng::seed_from_u64((rows * 1_000_003 + vocab) as u64);
        let mut numbers = |len: usize, size: f32| -> Vec<f32> {
            (0..len).map(|_| (rng.random::<f32>() * 2.0 - 1.0) * size).collect()
        };
        Self::of(numbers(vocab * WIDTH, 1.0), numbers(rows * WIDTH, spread), vocab)
    }

    fn of(weight: Vec<f32>, hidden: Vec<f32>, vocab: usize) -> Self {
        let mut logits = vec![0.0; hidden.len() / WIDTH * vocab];
        nt(&hidden, &weight, None, &mut logits, [hidden.len() / WIDTH, vocab, WIDTH]);
        let weight = Tensor::from_slice(&weight).view([vocab as i64, WIDTH as i64]);
        Self { weight, hidden, logits, vocab }
    }

    fn sample(&self, draws: &[Draw]) -> Vec<Result<Drawn, String>> {
        Head::new(&self.weight).sample(&self.hidden, draws)
    }

    fn oracle(&self, draws: &[Draw]) -> Vec<Result<Drawn, String>> {
        sample(&self.logits, self.vocab, draws)
    }
}

fn at(temperature: f32) -> SamplingParams {
    SamplingParams { temperature, ..Default::default() }
}

fn draw(row: usize, params: &SamplingParams, position: usize) -> Draw<'_> {
    Draw { row, params, stream: stream_of(3, row), position, forbidden: &[], mask: None }
}

/// Draws at five temperatures, one of them greedy, `times` from each row.
fn draws(kinds: &[SamplingParams; 5], rows: usize, times: usize) -> Vec<Draw<'_>> {
    let pairs = (0..rows).flat_map(|row| (0..times).map(move |position| (row, position)));
    pairs.map(|(row, position)| draw(row, &kinds[row % 5], position)).collect()
}

fn kinds() -> [SamplingParams; 5] {
    [1.0, 0.7, 0.0, 1.8, 0.02].map(at)
}

fn assert_close(got: &Drawn, want: &Drawn) {
    let pairs = [
        (got.stats.logprob, want.stats.logprob),
        (got.stats.entropy, want.stats.entropy),
        (got.stats.baseline, want.stats.baseline),
    ];
    for (got, want) in pairs {
        assert!((got - want).abs() <= 1e-6 * want.abs() + 5e-7, "{got} instead of {want}");
    }
    assert_eq!(got.top, want.top);
}

#[test]
fn tokens_and_statistics_are_those_of_logits_in_memory() {
    let kinds = kinds();
    let shapes = [(1, 1), (3, 2), (2, 15), (5, 16), (5, 17), (7, 47), (16, 48), (17, 49)];
    let larger = [(300, 100), (40, 1535), (33, 1536), (64, 1537), (9, 5000), (70, 49_152)];
    for (rows, vocab) in shapes.into_iter().chain(larger) {
        for spread in [0.3, 2.0, 8.0] {
            let case = Case::new(rows, vocab, spread);
            let draws = draws(&kinds, rows, 20);
            let (got, want) = (case.sample(&draws), case.oracle(&draws));
            let same = got.iter().zip(&want).filter(|(got, want)| {
                let (got, want) = (got.as_ref().unwrap(), want.as_ref().unwrap());
                let same = got.id == want.id;
                if same {
                    assert_close(got, want);
                }
                same
            });
            // A number may fall between the two roundings of a border between tokens.
            let other = draws.len() - same.count();
            assert!(other <= draws.len() / 1000, "{other} other tokens, {rows} x {vocab}");
        }
    }
}

#[test]
fn a_draw_depends_on_its_own_row_alone() {
    let kinds = [
        at(1.0),
        SamplingParams { top_logprobs: 3, ..at(0.8) },
        at(0.0),
        SamplingParams { top_p: 0.9, ..at(1.0) },
        at(0.5),
    ];
    for (rows, vocab) in [(90, 3000), (33, 49)] {
        let case = Case::new(rows, vocab, 2.0);
        let mut draws = draws(&kinds, rows, 2);
        for draw in draws.iter_mut().filter(|draw| draw.row % 7 == 0) {
            draw.forbidden = &[1, 5];
        }
        let together = case.sample(&draws);
        let head = Head::new(&case.weight);
        for (draw, want) in draws.iter().zip(&together) {
            let hidden = head.row(&case.hidden, draw.row);
            let alone = head.sample(hidden, &[Draw { row: 0, ..*draw }]);
            assert_eq!(&alone[0], want, "row {} of {rows}", draw.row);
        }
        // Those that look at all logits are drawn from them, to the last bit.
        for (want, (got, draw)) in case.oracle(&draws).iter().zip(together.iter().zip(&draws)) {
            if needs_logits(draw, vocab) {
                assert_eq!(got, want);
            }
        }
    }
}

#[test]
fn a_row_may_be_drawn_from_at_several_temperatures() {
    let (case, kinds) = (Case::new(1, 500, 3.0), kinds());
    let draws: Vec<Draw> = (0..5).map(|i| draw(0, &kinds[i], i)).collect();
    assert_eq!(case.sample(&draws), case.oracle(&draws));
}

#[test]
fn greedy_takes_the_lowest_of_equal_tokens() {
    for vocab in [40, 48, 100, 4000] {
        for twin in [1, 7, 20, 39] {
            let weight = Case::new(1, vocab, 1.0).weight;
            let hidden = vec![1.0; WIDTH];
            for id in [0, twin].map(|i| vocab as i64 - 1 - i) {
                let _ = weight.narrow(0, id, 1).fill_(1.5);
            }
            let head = Head::new(&weight);
            let drawn = head.sample(&hidden, &[draw(0, &at(0.0), 0)]).remove(0).unwrap();
            assert_eq!(i64::from(drawn.id), vocab as i64 - 1 - twin);
        }
    }
}

#[test]
fn tokens_of_probability_0_are_never_drawn() {
    let mut weight = vec![-1e38; 300 * WIDTH];
    weight[130 * WIDTH..131 * WIDTH].fill(0.1);
    weight[290 * WIDTH..291 * WIDTH].fill(0.1);
    let case = Case::of(weight, vec![1.0; 17 * WIDTH], 300);
    assert_eq!(case.logits[0], f32::NEG_INFINITY);
    for temperature in [1e-40, 1.0, 1e30] {
        let params = at(temperature);
        let draws: Vec<Draw> = (0..1000).map(|i| draw(i % 17, &params, i)).collect();
        let drawn = case.sample(&draws);
        let ids: Vec<u32> = drawn.iter().map(|drawn| drawn.as_ref().unwrap().id).collect();
        assert!(ids.iter().all(|id| [130, 290].contains(id)), "{temperature}");
        let first = ids.iter().filter(|&&id| id == 130).count();
        assert!((400..600).contains(&first), "{first} of 1000 at {temperature}");
        let stats = drawn[0].as_ref().unwrap().stats;
        assert!((stats.entropy - std::f32::consts::LN_2).abs() < 1e-6);
    }
}

#[test]
fn a_row_that_is_no_distribution_fails_alone() {
    let vocab = 100;
    let mut case = Case::new(5, vocab, 1.0);
    case.weight = case.weight.abs();
    let mut fill = |row: usize, x: f32| case.hidden[row * WIDTH..][..WIDTH].fill(x);
    fill(0, f32::NAN);
    fill(1, f32::MAX);
    fill(2, -f32::MAX);
    case.weight += 1.0;
    // Both: not a number beside infinity.
    case.hidden[3 * WIDTH..][..2].copy_from_slice(&[f32::INFINITY, f32::NEG_INFINITY]);
    for params in [at(1.0), at(0.0), at(0.3), SamplingParams { top_k: 3, ..at(1.0) }] {
        let draws: Vec<Draw> = (0..5).map(|row| draw(row, &params, 0)).collect();
        let drawn = case.sample(&draws);
        for (drawn, what) in drawn.iter().zip(["NaN", "infinite", "forbidden", "NaN"]) {
            assert!(drawn.as_ref().unwrap_err().contains(what), "{drawn:?}");
        }
        assert!(drawn[4].is_ok());
    }
    let logprobs = Head::new(&case.weight).logprobs(&case.hidden, &[1; 5]);
    assert!(logprobs[..2].iter().all(|x| x.is_nan()) && logprobs[4].is_finite(), "{logprobs:?}");
}

#[test]
fn logprobs_are_those_of_logits_in_memory() {
    for (rows, vocab) in [(0, 10), (1, 1), (16, 47), (300, 100), (513, 1600), (20, 49_152)] {
        let case = Case::new(rows, vocab, 2.0);
        let tokens: Vec<u32> = (0..rows).map(|row| (row * 7919 % vocab) as u32).collect();
        let got = Head::new(&case.weight).logprobs(&case.hidden, &tokens);
        let want = batch_stats(&case.logits, vocab, &tokens, 1.0);
        assert_eq!(got.len(), rows);
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want.logprob).abs() <= 1e-6 * want.logprob.abs() + 5e-7);
        }
    }
}

#[test]
fn nothing_to_draw() {
    let case = Case::new(3, 50, 1.0);
    assert!(case.sample(&[]).is_empty());
    assert!(Head::new(&case.weight).sample(&[], &[]).is_empty());
}

#[test]
#[should_panic(expected = "a draw's row is not among the rows")]
fn rows_are_checked() {
    Case::new(2, 50, 1.0).sample(&[draw(2, &at(1.0), 0)]);
}

/// The statistics that a draw reports are its row's, whether it was summed up or not.
#[test]
fn sums_are_those_of_the_whole_row() {
    let case = Case::new(40, 4321, 3.0);
    let head = Head::new(&case.weight);
    let factors: Vec<f32> = (0..40).map(|row| 0.5 + row as f32 / 20.0).collect();
    let got = head.summed(&case.hidden, &factors, &mut [], &|_, summed| summed.stats());
    assert_eq!(got.len(), 40);
    for (row, (got, logits)) in got.iter().zip(case.logits.chunks(4321)).enumerate() {
        let want = row_stats(logits, factors[row]);
        assert_eq!((got.max, got.inv_temperature), (want.max, want.inv_temperature));
        let pairs = [(got.z, want.z), (got.a1, want.a1), (got.b, want.b), (got.c, want.c)];
        for (got, want) in pairs {
            assert!((got / want - 1.0).abs() < 1e-6, "{got} instead of {want}");
        }
    }
}
