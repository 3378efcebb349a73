//! Causal attention of sequences of different lengths that lie one after the other in a batch:
//! flash attention on a CUDA device, one sequence after the other elsewhere.

use crate::{kernels::packed::PackedGroup, torch::flash};
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Rows of `q` and the keys that they see.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sequence {
    /// Rows of `q`, the last positions of the sequence.
    rows: Range<usize>,
    /// Its length: keys.
    len: usize,
}

/// Sequences over the rows of a batch, in their order.
#[derive(Debug)]
pub struct Varlen {
    sequences: Vec<Sequence>,
    /// Row of `k` and `v` of each key, sequence by sequence, i64; none if they are the rows of `q`.
    keys: Option<Tensor>,
    /// Where the rows, and where the keys, of each sequence begin, and the end: i32, on the device.
    starts: [Tensor; 2],
}

impl Varlen {
    /// The sequences of packed groups: each prompt, and each tail that is not empty with its prompt
    /// before it.
    pub fn of_groups(groups: &[PackedGroup], device: Device) -> Self {
        let (mut sequences, mut keys) = (Vec::new(), Vec::new());
        let mut add = |before: Range<usize>, rows: Range<usize>| {
            keys.extend(before.clone().chain(rows.clone()).map(|row| row as i64));
            sequences.push(Sequence { len: before.len() + rows.len(), rows });
        };
        for group in groups {
            add(0..0, group.prompt.clone());
            for (index, &len) in group.tails.iter().enumerate().filter(|(_, len)| **len > 0) {
                let start = group.tail_start(index);
                add(group.prompt.clone(), start..start + len);
            }
        }
        Self::new(sequences, Some(super::upload(&keys, device)), device)
    }

    /// Sequences that are whole in the batch: `rows` follow each other and begin at position 0.
    pub fn of_prompts(rows: impl Iterator<Item = Range<usize>>, device: Device) -> Self {
        let sequences = rows.map(|rows| Sequence { len: rows.len(), rows }).collect();
        Self::new(sequences, None, device)
    }

    fn new(sequences: Vec<Sequence>, keys: Option<Tensor>, device: Device) -> Self {
        let starts = |len: fn(&Sequence) -> usize| {
            let mut starts = vec![0i32];
            for sequence in &sequences {
                starts.push(starts[starts.len() - 1] + len(sequence) as i32);
            }
            super::upload(&starts, device)
        };
        let starts = [starts(|sequence| sequence.rows.len()), starts(|sequence| sequence.len)];
        Self { sequences, keys, starts }
    }

    fn longest(&self, len: fn(&Sequence) -> usize) -> i64 {
        self.sequences.iter().map(len).max().unwrap_or(0) as i64
    }

    /// `k` or `v` of each key.
    fn gather(&self, x: &Tensor) -> Tensor {
        self.keys.as_ref().map_or_else(|| x.shallow_clone(), |keys| x.index_select(0, keys))
    }
}

/// Every row attends to what stands before it in its own sequence, with scale
/// `1 / sqrt(head_dim)`: `q` `[N, heads, head_dim]`, `k` and `v` `[N, kv_heads, head_dim]`;
/// `[N, heads * head_dim]`. With a window `w`, position `p` sees positions `p - w + 1 ..= p`.
///
/// # Panics
/// If a shape does not fit.
pub fn varlen_attention([q, k, v]: [&Tensor; 3], varlen: &Varlen, window: Option<usize>) -> Tensor {
    let (rows, heads, head_dim) = q.size3().expect("q has three axes");
    let (k, v) = (varlen.gather(k), varlen.gather(v));
    if flash::takes(q) {
        let shape = flash::Sequences {
            starts: [&varlen.starts[0], &varlen.starts[1]],
            longest: [varlen.longest(|s| s.rows.len()), varlen.longest(|s| s.len)],
            window,
        };
        let out = flash::attention([q, &k, &v], &shape);
        return out.unwrap_or_else(|error| panic!("flash attention: {error}")).view([rows, -1]);
    }
    let mut first_key = 0;
    let outputs = varlen.sequences.iter().map(|sequence| {
        let Sequence { rows, len } = sequence;
        let q = q.narrow(0, rows.start as i64, rows.len() as i64);
        let [k, v] = [&k, &v].map(|x| x.narrow(0, first_key, *len as i64));
        first_key += *len as i64;
        causal([&q, &k, &v], window, None)
    });
    Tensor::cat(&outputs.collect::<Vec<_>>(), 0).view([rows, heads * head_dim])
}

/// The last rows of one sequence: `q` `[n, heads, head_dim]`, `k` and `v` `[len, kv_heads,
/// head_dim]`; the shape of `q`. Without a scale it is `1 / sqrt(head_dim)`.
pub(super) fn causal([q, k, v]: [&Tensor; 3], window: Option<usize>, scale: Option<f64>) -> Tensor {
    let (rows, keys) = (q.size()[0], k.size()[0]);
    let [q, k, v] = [q, k, v].map(|x| x.transpose(0, 1).unsqueeze(0));
    let window = window.map_or(keys, |window| keys.min(window as i64));
    let plain = window == keys && rows == keys;
    let mask = (!plain && (rows != 1 || window != keys)).then(|| {
        let seen = Tensor::ones([rows, keys], (Kind::Bool, q.device()));
        seen.tril(keys - rows).triu(keys - rows - window + 1)
    });
    let out = Tensor::scaled_dot_product_attention(&q, &k, &v, mask, 0.0, plain, scale, true);
    out.squeeze_dim(0).transpose(0, 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::packed_attention::packed_attention,
        torch::{autograd::backward, random},
    };
    use std::sync::Arc;

    fn groups() -> Vec<PackedGroup> {
        vec![
            PackedGroup { prompt: 0..5, tails: vec![3, 0, 20] },
            PackedGroup { prompt: 28..70, tails: vec![] },
            PackedGroup { prompt: 70..71, tails: vec![1, 2] },
        ]
    }

    /// Values and gradients against the native kernel.
    #[test]
    fn packed_groups_are_those_of_the_kernel() {
        random::seed(1);
        let groups = Arc::new(groups());
        let varlen = Varlen::of_groups(&groups, Device::Cpu);
        for (heads, kv_heads) in [(4, 2), (3, 3), (6, 1)] {
            for window in [None, Some(1), Some(4), Some(17), Some(1000)] {
                let random = |heads: i64| random::normal(&[74, heads, 16]).to_kind(Kind::Double);
                let inputs = [random(heads), random(kv_heads), random(kv_heads)];
                let leaf = |kind| move |x: &Tensor| x.to_kind(kind).copy().set_requires_grad(true);
                let ours = inputs.each_ref().map(leaf(Kind::Double));
                let theirs = inputs.each_ref().map(leaf(Kind::Float));
                let got = varlen_attention(ours.each_ref(), &varlen, window);
                let want = packed_attention(theirs.each_ref(), &groups, window);
                let gradient = random::normal(&want.size());
                backward(&got, &gradient.to_kind(Kind::Double)).unwrap();
                backward(&want, &gradient).unwrap();
                let mut pairs = vec![(got, want)];
                pairs.extend(ours.iter().zip(&theirs).map(|(a, b)| (a.grad(), b.grad())));
                for (index, (got, want)) in pairs.iter().enumerate() {
                    let error = (got - want).abs().max().double_value(&[]);
                    let what = format!("{heads}/{kv_heads} heads, window {window:?}, {index}");
                    assert!(error < 1e-5, "{what}: off by {error:e}");
                }
            }
        }
    }

    #[test]
    fn prompts_need_no_gather() {
        random::seed(2);
        let qkv = [4, 2, 2].map(|n| random::normal(&[28, n, 8]).to_kind(Kind::Double));
        let whole = Varlen::of_prompts([0..20, 20..28].into_iter(), Device::Cpu);
        let prompts = [0..20, 20..28].map(|prompt| PackedGroup { prompt, tails: vec![] });
        let groups = Varlen::of_groups(&prompts, Device::Cpu);
        assert_eq!(whole.sequences, groups.sequences);
        assert_eq!(Vec::<i32>::try_from(&whole.starts[0]).unwrap(), [0, 20, 28]);
        let [got, want] =
            [whole, groups].map(|varlen| varlen_attention(qkv.each_ref(), &varlen, Some(6)));
        assert!(got.equal(&want));
    }

    #[test]
    fn keys_of_a_tail_are_its_prompt_and_itself() {
        let varlen = Varlen::of_groups(&groups(), Device::Cpu);
        let starts = varlen.starts.each_ref().map(|starts| Vec::<i32>::try_from(starts).unwrap());
        assert_eq!(starts[0], [0, 5, 8, 28, 70, 71, 72, 74]);
        assert_eq!(starts[1], [0, 5, 13, 38, 80, 81, 83, 86]);
        let keys = Vec::<i64>::try_from(varlen.keys.as_ref().unwrap()).unwrap();
        assert_eq!(keys[5..13], [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(keys[81..86], [70, 71, 70, 72, 73]);
        assert_eq!((varlen.longest(|s| s.rows.len()), varlen.longest(|s| s.len)), (42, 42));
    }
}
