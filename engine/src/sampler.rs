//! Logits to the next token of each sample.
//!
//! A draw is one pass over the row for the statistics, which also leaves the mass of each block
//! of the row, and then a search for a random number among these masses and in one block. Only
//! `min_p`, `top_k` and `top_p` look for the likeliest tokens (see `truncate`); what they leave is
//! a shorter row, drawn from in the same way. What changes logits (penalties, biases, tokens that
//! may not be drawn) works on a copy of the row (see `adjust`).

mod adjust;
mod past;
mod random;
pub(crate) mod summed;
mod truncate;

use std::cell::RefCell;

use onpolicy_plugin_api::{LogprobsMode, PromptToken, SamplingParams, TokenStats};

pub(crate) use self::adjust::has_penalties;
pub use self::past::{Counts, Past};
pub use self::random::stream_of;
use self::random::uniform;
use self::summed::inv_temperature;
use self::truncate::Candidate;
use crate::kernels::rows::{self, ROW_BLOCK};
use crate::kernels::{disjoint, simd::Level};
use crate::logits::{RowStats, row_stats, row_stats_and_masses};

/// One token to draw.
#[derive(Debug, Clone, Copy)]
pub struct Draw<'a> {
    /// Row of the logits.
    pub row: usize,
    /// How to draw.
    pub params: &'a SamplingParams,
    /// The sample's random stream, see [`stream_of`].
    pub stream: u64,
    /// How many tokens of the sample were generated before.
    pub position: usize,
    /// Ids that may not be drawn here; their probability is 0.
    pub forbidden: &'a [u32],
    /// Ids that alone may be drawn: a bit for each, from the lowest bit of the first word on.
    pub mask: Option<&'a [u32]>,
    /// The tokens before.
    pub past: Past<'a>,
}

impl<'a> Draw<'a> {
    /// The first draw of stream 0, with nothing forbidden and nothing before.
    pub fn new(row: usize, params: &'a SamplingParams) -> Self {
        let (forbidden, mask, past) = (&[][..], None, Past::default());
        Self { row, params, stream: 0, position: 0, forbidden, mask, past }
    }
}

/// What is said of a row whose tokens are all forbidden.
pub(crate) const NOTHING_LEFT: &str = "no token can be drawn, every one is forbidden";

/// A token that was drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Drawn {
    /// The token.
    pub id: u32,
    /// Statistics of the distribution it was drawn from, or of the model's own (see
    /// [`LogprobsMode`]).
    pub stats: TokenStats,
    /// The likeliest tokens of that distribution and their log-probs, likeliest first, the lower
    /// id first where two are equally likely; fewer than asked for if fewer were left.
    pub top: Vec<(u32, f32)>,
}

/// Draws one token each, from `logits`, `[rows, vocab]`. A draw depends on its own row and fields
/// only. At temperature 0 it takes the likeliest token, the lowest id of equal ones, with the
/// statistics of the whole distribution at temperature 1.
///
/// # Errors
/// Per draw, if its row is no distribution: the model made NaN or infinite logits, or every token
/// is forbidden.
///
/// # Panics
/// If `logits` is not whole rows, or a draw's row is not among them.
pub fn sample(logits: &[f32], vocab: usize, draws: &[Draw]) -> Vec<Result<Drawn, String>> {
    assert!(vocab > 0 && logits.len().is_multiple_of(vocab), "logits are whole rows");
    let rows = logits.len() / vocab;
    assert!(draws.iter().all(|draw| draw.row < rows), "a draw's row is not among the logits");
    disjoint::map(draws.len(), &|i| sample_row(&logits[draws[i].row * vocab..][..vocab], &draws[i]))
}

/// The number in `[0, 1)` that a draw is made with.
pub(crate) fn random_number(draw: &Draw) -> f64 {
    uniform(draw.stream, draw.position)
}

/// As [`sample`], from a draw's own row of logits.
pub(crate) fn sample_row(row: &[f32], draw: &Draw) -> Result<Drawn, String> {
    SCRATCH.with_borrow_mut(|scratch| scratch.draw(row, draw))
}

/// What rows of `logits`, `[tokens.len(), vocab]`, say of one token each at temperature 1: its
/// log-prob (NaN where a row is no distribution), its rank in the order of [`Drawn::top`], and the
/// `top` likeliest tokens.
///
/// # Panics
/// If the shapes do not fit, or a token is not below `vocab`.
pub fn place(logits: &[f32], vocab: usize, tokens: &[u32], top: usize) -> Vec<PromptToken> {
    assert_eq!(logits.len(), tokens.len() * vocab, "one row of logits per token");
    disjoint::map(tokens.len(), &|i| {
        let row = &logits[i * vocab..][..vocab];
        SCRATCH.with_borrow_mut(|scratch| scratch.work.place(row, tokens[i], top))
    })
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// What a draw works on; kept from draw to draw by each thread.
#[derive(Default)]
struct Scratch {
    /// The row as it is drawn from, where that is not the model's own.
    changed: Vec<f32>,
    work: Work,
}

#[derive(Default)]
struct Work {
    masses: Vec<f64>,
    maxima: Vec<f32>,
    candidates: Vec<Candidate>,
    /// The candidates' logits.
    kept: Vec<f32>,
}

impl Scratch {
    fn draw(&mut self, row: &[f32], draw: &Draw) -> Result<Drawn, String> {
        let Self { changed, work } = self;
        let top = draw.params.top_logprobs;
        let drawn_from = if adjust::changes(draw) {
            adjust::apply(row, draw, changed);
            &changed[..]
        } else {
            row
        };
        match draw.params.logprobs_mode {
            LogprobsMode::Processed => work.draw(drawn_from, draw, top),
            LogprobsMode::Raw => {
                let drawn = work.draw(drawn_from, draw, 0)?;
                let stats = check(row_stats(row, 1.0), row)?;
                Ok(work.whole(row, drawn.id as usize, &stats, top))
            }
        }
    }
}

impl Work {
    /// Draws from the row, and lists its `top` likeliest tokens.
    fn draw(&mut self, row: &[f32], draw: &Draw, top: usize) -> Result<Drawn, String> {
        if draw.params.temperature == 0.0 {
            return self.greedy(row, top);
        }
        let inv_temperature = inv_temperature(draw);
        let stats = check(row_stats_and_masses(row, inv_temperature, &mut self.masses), row)?;
        let u = uniform(draw.stream, draw.position);
        if truncate::keeps_all(draw.params, row.len()) {
            let id = pick(row, &stats, &self.masses, u);
            return Ok(self.whole(row, id, &stats, top));
        }
        truncate::keep(row, &stats, draw.params, (&mut self.candidates, &mut self.maxima));
        self.kept.clear();
        self.kept.extend(self.candidates.iter().map(|&(_, logit)| logit));
        let stats = row_stats_and_masses(&self.kept, inv_temperature, &mut self.masses);
        let (id, logit) = self.candidates[pick(&self.kept, &stats, &self.masses, u)];
        Ok(self.drawn(id, logit, &stats, top))
    }

    fn greedy(&mut self, row: &[f32], top: usize) -> Result<Drawn, String> {
        let stats = check(row_stats(row, 1.0), row)?;
        let id = rows::find(Level::best(), row, stats.max).expect("a row holds its maximum");
        Ok(self.whole(row, id, &stats, top))
    }

    /// Token `id` of the whole row.
    fn whole(&mut self, row: &[f32], id: usize, stats: &RowStats, top: usize) -> Drawn {
        if top > 0 {
            let floor = truncate::floor_of_likeliest(row, top, &mut self.maxima);
            self.candidates.clear();
            rows::gather(Level::best(), row, floor, &mut self.candidates);
        }
        self.drawn(id as u32, row[id], stats, top)
    }

    /// Token `id` as the row sees it, with its `top` likeliest tokens.
    fn place(&mut self, row: &[f32], id: u32, top: usize) -> PromptToken {
        let own = row[id as usize];
        let Drawn { stats, top, .. } = self.whole(row, id as usize, &row_stats(row, 1.0), top);
        let (before, after) = row.split_at(id as usize);
        let likelier = before.iter().filter(|logit| **logit >= own).count()
            + after.iter().filter(|logit| **logit > own).count();
        PromptToken { logprob: stats.logprob, rank: Some(1 + likelier), top }
    }

    /// A token, with the `top` likeliest of the candidates.
    fn drawn(&mut self, id: u32, logit: f32, stats: &RowStats, top: usize) -> Drawn {
        let mut likeliest = Vec::new();
        if top > 0 {
            truncate::keep_likeliest(&mut self.candidates, top);
            self.candidates.sort_unstable_by(truncate::likelier);
            likeliest.extend(self.candidates.iter().map(|&(id, z)| (id, stats.logprob(z))));
        }
        Drawn { id, stats: stats.token(logit), top: likeliest }
    }
}

/// Says what is wrong with a row that is no distribution.
fn check(stats: RowStats, row: &[f32]) -> Result<RowStats, String> {
    if stats.is_valid() {
        return Ok(stats);
    }
    Err(if row.iter().any(|logit| logit.is_nan()) {
        "the model produced NaN logits; its weights are broken".into()
    } else if stats.max == f32::INFINITY {
        "the model produced infinite logits; its weights are broken".into()
    } else {
        NOTHING_LEFT.into()
    })
}

/// The index at which the row's weights, summed from the left, exceed the part `u` of their total;
/// never one whose weight is 0.
fn pick(row: &[f32], stats: &RowStats, masses: &[f64], u: f64) -> usize {
    let (block, rest) = search(masses.iter().copied(), u * stats.z);
    let start = block * ROW_BLOCK;
    let len = ROW_BLOCK.min(row.len() - start);
    let mut weights = [0.0; ROW_BLOCK];
    weights[..len].copy_from_slice(&row[start..start + len]);
    rows::weigh(Level::best(), &mut weights[..len], stats.scale(), 1.0);
    start + search(weights[..len].iter().map(|&weight| f64::from(weight)), rest).0
}

/// The index at which the sum exceeds `target`, and what of the target is left there. Rounding
/// may leave the sum short: then it is the last index that holds anything.
fn search(masses: impl Iterator<Item = f64>, mut target: f64) -> (usize, f64) {
    let mut last = 0;
    for (i, mass) in masses.enumerate() {
        if mass > target {
            return (i, target);
        }
        if mass > 0.0 {
            last = i;
        }
        target -= mass;
    }
    (last, f64::INFINITY)
}

#[cfg(test)]
mod tests;
