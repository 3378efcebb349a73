//! The output head: hidden states to tokens and their statistics.
//!
//! The logits of a row are summed up while the matrix product makes them (`kernels/parts.rs`), and
//! none is kept: a draw computes again the few of the cell that it falls into, which are the same
//! bits. Only rows whose draws look at all logits get a row of them in memory.

use std::{cell::RefCell, ops::Range};

use tch::{Device, Kind, Tensor};

use crate::{
    kernels::{
        disjoint,
        matmul::{Summed, nt, nt_summed},
        parts::{Part, parts_of},
        simd::LANES,
    },
    logits::merge::merge,
    profile::{Phase, timed},
    sampler::{
        Draw, Drawn, sample_row,
        summed::{SummedRow, inv_temperature, needs_logits},
    },
    torch::slices::{floats, floats_mut},
};

/// Rows that are computed at a time when log-probs of many are wanted.
const ROWS: usize = 256;

thread_local! {
    /// Kept from step to step.
    static PARTS: RefCell<Vec<Part>> = const { RefCell::new(Vec::new()) };
}

/// The weight of an output head.
#[derive(Clone, Copy)]
pub struct Head<'a> {
    weight: &'a [f32],
    vocab: usize,
    width: usize,
}

/// The rows of a batch in the order in which they are computed: first those that logits are
/// written of.
struct Order {
    rows: Vec<usize>,
    /// How many have their logits written.
    written: usize,
    /// One over the temperature of each row, in this order.
    inv_temperatures: Vec<f32>,
    /// Where each row stands in this order.
    place: Vec<usize>,
    /// The draws from each row, in this order.
    draws: Vec<Vec<usize>>,
}

impl Order {
    fn new(rows: usize, draws: &[Draw], vocab: usize) -> Self {
        // None: the logits are needed.
        let mut factors: Vec<Option<f32>> = vec![Some(f32::NAN); rows];
        for draw in draws {
            let (factor, own) = (&mut factors[draw.row], inv_temperature(draw));
            let differs = factor.is_some_and(|factor| !factor.is_nan() && factor != own);
            let summed = factor.is_some() && !differs && !needs_logits(draw, vocab);
            *factor = summed.then_some(own);
        }
        let mut order: Vec<usize> = (0..rows).collect();
        order.sort_by_key(|&row| factors[row].is_some());
        let mut place = vec![0; rows];
        order.iter().enumerate().for_each(|(at, &row)| place[row] = at);
        let mut draws_of = vec![Vec::new(); rows];
        draws.iter().enumerate().for_each(|(i, draw)| draws_of[place[draw.row]].push(i));
        Self {
            written: factors.iter().filter(|factor| factor.is_none()).count(),
            inv_temperatures: order.iter().map(|&row| factors[row].unwrap_or(1.0)).collect(),
            place,
            rows: order,
            draws: draws_of,
        }
    }
}

impl<'a> Head<'a> {
    /// A head with the weight `[vocab, width]`.
    ///
    /// # Panics
    /// If the weight is not a contiguous f32 matrix on the CPU.
    pub fn new(weight: &'a Tensor) -> Self {
        let (vocab, width) = weight.size2().expect("a head's weight has two axes");
        Self { weight: floats(weight), vocab: vocab as usize, width: width as usize }
    }

    /// Draws one token each, as [`sample`](crate::sampler::sample) does from the logits of
    /// `hidden`, `[rows, width]`; a draw depends on its own row and the draws from it only. Sums
    /// are rounded in another order than there.
    ///
    /// # Errors
    /// As [`sample`](crate::sampler::sample).
    ///
    /// # Panics
    /// If `hidden` is not whole rows, or a draw's row is not among them.
    pub fn sample(&self, hidden: &[f32], draws: &[Draw]) -> Vec<Result<Drawn, String>> {
        let rows = self.rows(hidden);
        assert!(draws.iter().all(|draw| draw.row < rows), "a draw's row is not among the rows");
        let order = Order::new(rows, draws, self.vocab);
        let ordered: Vec<f32> =
            order.rows.iter().flat_map(|&row| self.row(hidden, row)).copied().collect();
        let shape = [order.written as i64, self.vocab as i64];
        let mut logits = Tensor::empty(shape, (Kind::Float, Device::Cpu));
        let logits = floats_mut(&mut logits);
        let mut drawn = self.summed(&ordered, &order.inv_temperatures, logits, &|at, summed| {
            let hidden = self.row(&ordered, at);
            let draw = |&i: &usize| (i, self.draw(hidden, &summed, &draws[i]));
            order.draws[at].iter().map(draw).collect::<Vec<_>>()
        });
        let written = order.draws[..order.written].concat();
        drawn.push(disjoint::map(written.len(), &|i| {
            let draw = &draws[written[i]];
            let row = &logits[order.place[draw.row] * self.vocab..][..self.vocab];
            (written[i], sample_row(row, draw))
        }));
        let mut drawn = drawn.concat();
        drawn.sort_by_key(|&(i, _)| i);
        drawn.into_iter().map(|(_, drawn)| drawn).collect()
    }

    fn draw(&self, hidden: &[f32], summed: &SummedRow, draw: &Draw) -> Result<Drawn, String> {
        let drawn = summed.draw(draw, self.vocab, |tokens| self.logits(hidden, tokens));
        // What is wrong with a row that is no distribution is told from all of it.
        drawn.map_or_else(|| sample_row(&self.logits(hidden, 0..self.vocab), draw), Ok)
    }

    /// Log-probs, at temperature 1, of one token for each row of `hidden`, `[tokens, width]`; NaN
    /// where a row is no distribution.
    ///
    /// # Panics
    /// If the shapes do not fit, or a token is outside of the vocabulary.
    pub fn logprobs(&self, hidden: &[f32], tokens: &[u32]) -> Vec<f32> {
        assert_eq!(self.rows(hidden), tokens.len(), "one row for each token");
        let mut logprobs = Vec::with_capacity(tokens.len());
        for (hidden, tokens) in hidden.chunks(ROWS * self.width).zip(tokens.chunks(ROWS)) {
            let ones = vec![1.0; tokens.len()];
            logprobs.extend(self.summed(hidden, &ones, &mut [], &|row, summed| {
                let token = tokens[row] as usize;
                let logit = self.logits(self.row(hidden, row), token..token + 1)[0];
                summed.stats().logprob(logit)
            }));
        }
        logprobs
    }

    /// Sums up the logits of `hidden`, except that those of the first rows are written, as many as
    /// `written` has room for. Gives what `each` makes of the sums of the other rows, in order.
    fn summed<T: Send>(
        &self,
        hidden: &[f32],
        inv_temperatures: &[f32],
        written: &mut [f32],
        each: &(dyn Fn(usize, SummedRow) -> T + Sync),
    ) -> Vec<T> {
        let rows = inv_temperatures.len();
        let written_rows = written.len() / self.vocab;
        // Rows of whole vectors that are written have no parts.
        let first = written_rows / LANES * LANES;
        let parts_of_rows = parts_of(self.vocab);
        let mut made: Vec<Option<T>> = (first..rows).map(|_| None).collect();
        PARTS.with_borrow_mut(|parts| {
            let len = made.len().div_ceil(LANES) * parts_of_rows;
            if parts.len() < len {
                parts.resize(len, Part::EMPTY);
            }
            let parts = &mut parts[..len];
            let sums = Summed { written, inv_temperatures, parts };
            let shape = [rows, self.vocab, self.width];
            timed(Phase::Head, || nt_summed(hidden, self.weight, sums, shape));
            disjoint::for_each_pair(
                (parts, parts_of_rows),
                (&mut made, LANES),
                &|i, parts, made| {
                    let start = first + i * LANES;
                    let sums = merge(parts, &inv_temperatures[start..start + made.len()]);
                    for (lane, made) in made.iter_mut().enumerate() {
                        if start + lane >= written_rows {
                            *made =
                                Some(each(start + lane, SummedRow { parts, sums: &sums, lane }));
                        }
                    }
                },
            );
        });
        made.into_iter().flatten().collect()
    }

    /// Logits of some neighbouring tokens for one row, the same bits as in any batch.
    fn logits(&self, row: &[f32], tokens: Range<usize>) -> Vec<f32> {
        let mut logits = vec![0.0; tokens.len()];
        let weight = &self.weight[tokens.start * self.width..tokens.end * self.width];
        nt(row, weight, None, &mut logits, [1, tokens.len(), self.width]);
        logits
    }

    fn rows(&self, hidden: &[f32]) -> usize {
        assert!(hidden.len().is_multiple_of(self.width), "hidden states are whole rows");
        hidden.len() / self.width
    }

    fn row<'b>(&self, hidden: &'b [f32], row: usize) -> &'b [f32] {
        &hidden[row * self.width..][..self.width]
    }
}

#[cfg(test)]
mod tests;
