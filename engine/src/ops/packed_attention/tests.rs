//! Against libtorch's attention, every prompt repeated for each of its tails.

use super::super::testing::check;
use super::*;
use crate::{
    model::attention::Pack,
    torch::random::{normal, seed},
};

/// The slow way: gathered rows, masks, and libtorch's scaled dot-product attention.
fn theirs(rows: &[Tensor], groups: &[PackedGroup], window: Option<usize>) -> Tensor {
    let rows = Rows { q: &rows[0], k: &rows[1], v: &rows[2] };
    let parts: Vec<Tensor> =
        groups.iter().flat_map(|group| attend_group(&rows, group, window)).collect();
    Tensor::cat(&parts, 0)
}

/// Queries, keys and values of all rows, `[N, heads, head_dim]`.
struct Rows<'a> {
    q: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
}

/// Outputs of the prompt's rows and of the tails' rows, in row order, `[rows, heads * head_dim]`.
fn attend_group(rows: &Rows<'_>, group: &PackedGroup, window: Option<usize>) -> Vec<Tensor> {
    let prompt_len = group.prompt.len() as i64;
    let narrow = |t: &Tensor| t.narrow(0, group.prompt.start as i64, prompt_len).unsqueeze(0);
    let (prompt_k, prompt_v) = (narrow(rows.k), narrow(rows.v));
    let mask = causal_mask(prompt_len, prompt_len, window);
    let mut outputs =
        vec![grouped_sdpa(&narrow(rows.q), &prompt_k, &prompt_v, &mask).squeeze_dim(0)];
    let longest = group.tails.iter().copied().max().unwrap_or(0) as i64;
    if longest > 0 {
        let samples = group.tails.len() as i64;
        let (padded, real) = tail_indices(group, longest as usize);
        let gather = |t: &Tensor| {
            let (_, heads, head_dim) = t.size3().expect("rows have three axes");
            t.index_select(0, &padded).view([samples, longest, heads, head_dim])
        };
        let with_prompt = |prompt: &Tensor, tail: &Tensor| {
            let (_, p, heads, head_dim) = prompt.size4().expect("a prompt has four axes");
            Tensor::cat(&[&prompt.expand([samples, p, heads, head_dim], false), tail], 1)
        };
        let k = with_prompt(&prompt_k, &gather(rows.k));
        let v = with_prompt(&prompt_v, &gather(rows.v));
        let mask = causal_mask(longest, prompt_len + longest, window);
        let out = grouped_sdpa(&gather(rows.q), &k, &v, &mask);
        outputs.push(out.flatten(0, 1).index_select(0, &real));
    }
    outputs
}

/// For tails padded to `longest`: the row that each padded place is filled from (padding repeats
/// a row; nothing real attends to it), and the padded places that are real.
fn tail_indices(group: &PackedGroup, longest: usize) -> (Tensor, Tensor) {
    let (mut padded, mut real) = (Vec::new(), Vec::new());
    for (sample, &len) in group.tails.iter().enumerate() {
        let start = group.tail_start(sample);
        for place in 0..longest {
            padded.push(if place < len { start + place } else { group.prompt.start } as i64);
            if place < len {
                real.push((sample * longest + place) as i64);
            }
        }
    }
    (Tensor::from_slice(&padded), Tensor::from_slice(&real))
}

/// `[rows, columns]`, true where row `r` (the last `rows` positions of `columns`) may look.
fn causal_mask(rows: i64, columns: i64, window: Option<usize>) -> Tensor {
    let full = Tensor::ones([rows, columns], (Kind::Bool, Device::Cpu));
    let seen = full.tril(columns - rows);
    match window {
        Some(window) => seen.triu(columns - rows - window as i64 + 1),
        None => seen,
    }
}

/// Scaled dot-product attention, `q` `[B, R, heads, d]`, `k` and `v` `[B, C, kv_heads, d]`, `mask`
/// `[R, C]`; returns `[B, R, heads * d]`. The query heads of one KV head become more rows of it,
/// so that K and V are never repeated.
fn grouped_sdpa(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Tensor {
    let (batch, rows, heads, head_dim) = q.size4().expect("q has four axes");
    let kv_heads = k.size()[2];
    let per_kv = heads / kv_heads;
    let q = q.view([batch, rows, kv_heads, per_kv, head_dim]).permute([0, 2, 3, 1, 4]).reshape([
        batch,
        kv_heads,
        per_kv * rows,
        head_dim,
    ]);
    let out = Tensor::scaled_dot_product_attention(
        &q,
        &k.transpose(1, 2),
        &v.transpose(1, 2),
        Some(mask.repeat([per_kv, 1])),
        0.0,
        false,
        None,
        false,
    );
    out.view([batch, kv_heads, per_kv, rows, head_dim]).permute([0, 3, 1, 2, 4]).reshape([
        batch,
        rows,
        heads * head_dim,
    ])
}

/// A pack of groups, each given by its prompt's length and those of its tails.
fn pack(groups: &[(usize, &[usize])]) -> Pack {
    let mut pack = Pack::default();
    for (prompt, tails) in groups {
        let tails: Vec<Vec<u32>> = tails.iter().map(|&len| vec![1; len]).collect();
        let tails: Vec<&[u32]> = tails.iter().map(Vec::as_slice).collect();
        pack.push(&vec![1; *prompt], &tails);
    }
    pack
}

fn agree(groups: &[(usize, &[usize])], [heads, kv_heads, head_dim]: [i64; 3]) {
    let pack = pack(groups);
    let rows = pack.len() as i64;
    let inputs = [
        normal(&[rows, heads, head_dim]),
        normal(&[rows, kv_heads, head_dim]),
        normal(&[rows, kv_heads, head_dim]),
    ];
    for window in [None, Some(2), Some(7), Some(50), Some(100)] {
        check(
            &inputs,
            &|rows| packed_attention([&rows[0], &rows[1], &rows[2]], pack.groups(), window),
            &|rows| theirs(rows, pack.groups(), window),
        );
    }
}

#[test]
fn values_and_gradients_are_those_of_libtorch() {
    seed(1);
    for heads in [[1, 1, 8], [4, 2, 16], [9, 3, 64], [3, 1, 24], [4, 4, 40], [14, 2, 64]] {
        agree(&[(5, &[3, 0, 9])], heads);
        agree(&[(1, &[1]), (17, &[]), (16, &[16, 1]), (33, &[64, 65, 2])], heads);
    }
}

#[test]
fn long_prompts_and_many_tails() {
    seed(2);
    agree(&[(41, &[63; 8])], [9, 3, 64]);
    agree(&[(200, &[30; 19]), (130, &[140, 7])], [4, 2, 32]);
}

#[test]
fn inputs_that_are_not_contiguous() {
    seed(3);
    let pack = pack(&[(20, &[10, 30])]);
    let inputs = [normal(&[4, 60, 16]), normal(&[2, 60, 16]), normal(&[2, 60, 16])];
    let turn =
        |rows: &[Tensor]| -> Vec<Tensor> { rows.iter().map(|t| t.transpose(0, 1)).collect() };
    check(
        &inputs,
        &|rows| {
            let rows = turn(rows);
            packed_attention([&rows[0], &rows[1], &rows[2]], pack.groups(), None)
        },
        &|rows| theirs(&turn(rows), pack.groups(), None),
    );
}

#[test]
fn a_sample_does_not_depend_on_its_company() {
    seed(4);
    let whole = pack(&[(41, &[30, 63])]);
    let rows = whole.len() as i64;
    let inputs = [normal(&[rows, 9, 64]), normal(&[rows, 3, 64]), normal(&[rows, 3, 64])];
    let out = packed_attention([&inputs[0], &inputs[1], &inputs[2]], whole.groups(), None);
    // The second sample alone, as one sequence.
    let places: Vec<i64> = (0..41).chain(71..134).collect();
    let places = Tensor::from_slice(&places);
    let alone = inputs.map(|t| t.index_select(0, &places));
    let single = pack(&[(104, &[])]);
    let got = packed_attention([&alone[0], &alone[1], &alone[2]], single.groups(), None);
    assert!(got.equal(&out.index_select(0, &places)));
}

#[test]
fn a_row_that_sees_itself_alone_copies_its_value() {
    seed(5);
    let pack = pack(&[(20, &[10, 30])]);
    let leaf = |shape: &[i64]| normal(shape).set_requires_grad(true);
    let inputs = [leaf(&[60, 2, 16]), leaf(&[60, 2, 16]), leaf(&[60, 2, 16])];
    let out = packed_attention([&inputs[0], &inputs[1], &inputs[2]], pack.groups(), Some(1));
    assert!((&out - inputs[2].view([60, 32])).abs().max().double_value(&[]) < 1e-6);
    let gradient = normal(&[60, 32]);
    crate::torch::autograd::backward(&out, &gradient).unwrap();
    for (input, want) in [(0, gradient.zeros_like()), (1, gradient.zeros_like()), (2, gradient)] {
        let error = inputs[input].grad().view([60, 32]) - want;
        assert!(error.abs().max().double_value(&[]) < 1e-5, "input {input}");
    }
}
