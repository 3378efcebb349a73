use super::*;
use crate::{
    device::{
        pages::DevicePages,
        plan::{StepPlan, StepRows},
    },
    kernels::attention::{Pages, PagesMut, paged_attention, write_pages},
    model::rope::{Rotation, Turn},
    torch::{
        random,
        slices::{floats, floats_mut},
    },
};

const HEAD_DIM: i64 = 16;

/// A span, and the tokens that its sequence has in pages already.
struct Case {
    first_position: usize,
    rows: usize,
    blocks: Vec<u32>,
}

fn cases(shapes: &[(usize, usize)], shared: usize) -> Vec<Case> {
    let mut next = 1 + shared as u32;
    let case = |&(first_position, rows): &(usize, usize)| {
        let own = (first_position + rows).div_ceil(BLOCK_SIZE).saturating_sub(shared) as u32;
        let blocks = (1..=shared as u32).chain((next..next + own).rev()).collect();
        next += own;
        Case { first_position, rows, blocks }
    };
    shapes.iter().map(case).collect()
}

fn spans(cases: &[Case]) -> Vec<Span<'_>> {
    let mut start = 0;
    let span = |case| {
        let &Case { first_position, rows, ref blocks } = case;
        start += rows;
        Span { rows: start - rows..start, first_position, blocks }
    };
    cases.iter().map(span).collect()
}

fn slots(spans: &[Span<'_>]) -> Vec<u32> {
    let of = |span: &Span<'_>| {
        let positions = span.first_position..span.first_position + span.rows.len();
        let slot =
            |p: usize| span.blocks[p / BLOCK_SIZE] * BLOCK_SIZE as u32 + (p % BLOCK_SIZE) as u32;
        positions.map(slot).collect::<Vec<_>>()
    };
    spans.iter().flat_map(of).collect()
}

/// The native kernel over the same numbers, `[N, heads * head_dim]`.
fn native(qkv: &[Tensor; 3], old: &[Tensor; 2], cases: &[Case], window: Option<usize>) -> Tensor {
    let (blocks, kv_heads, _, _) = old[0].size4().unwrap();
    let [mut keys, mut values] = [0, 1].map(|_| vec![0.0; old[0].numel()]);
    let (kv_heads, head_dim) = (kv_heads as usize, HEAD_DIM as usize);
    let mut pages = PagesMut { keys: &mut keys, values: &mut values, kv_heads, head_dim };
    // Everything that is in the pages, as rows; then the new rows.
    let as_rows = |pages: &Tensor| pages.transpose(1, 2).contiguous();
    let [k, v] = old.each_ref().map(as_rows);
    let all: Vec<u32> = (0..(blocks * BLOCK) as u32).collect();
    write_pages(floats(&k), floats(&v), &mut pages, &all);
    let spans = spans(cases);
    let [q, k, v] = qkv;
    write_pages(floats(k), floats(v), &mut pages, &slots(&spans));
    let (rows, heads, _) = q.size3().unwrap();
    let mut out = Tensor::zeros([rows, heads * HEAD_DIM], (Kind::Float, Device::Cpu));
    let pages = Pages { keys: &keys, values: &values, kv_heads, head_dim };
    paged_attention(floats(q), floats_mut(&mut out), &pages, &spans, window);
    out
}

fn check(shapes: &[(usize, usize)], shared: usize, [heads, kv_heads]: [i64; 2]) {
    let cases = cases(shapes, shared);
    let blocks = cases.iter().flat_map(|case| &case.blocks).max().unwrap() + 2;
    let rows: usize = shapes.iter().map(|(_, rows)| rows).sum();
    let qkv = [heads, kv_heads, kv_heads].map(|n| random::normal(&[rows as i64, n, HEAD_DIM]));
    let page_shape = [i64::from(blocks), kv_heads, BLOCK, HEAD_DIM];
    let old = [0, 1].map(|_| random::normal(&page_shape));
    for window in [None, Some(1), Some(9), Some(40), Some(4096)] {
        let want = native(&qkv, &old, &cases, window);
        let spans = spans(&cases);
        let rows = StepRows {
            tokens: vec![0; rows],
            positions: vec![0; rows],
            slots: slots(&spans),
            spans,
            ..StepRows::default()
        };
        let plan = StepPlan::new(&rows, Device::Cpu, None);
        let pages = old.each_ref().map(|pages| pages.to_kind(Kind::Double));
        // Block 0 belongs to nobody, and what lies behind a sequence's end to nobody either.
        pages.iter().for_each(|pages| drop(pages.get(0).fill_(f64::NAN)));
        let wide = qkv.each_ref().map(|x| x.to_kind(Kind::Double));
        // Angles of zero.
        let options = (Kind::Double, Device::Cpu);
        let half = [rows.tokens.len() as i64, HEAD_DIM / 2];
        let rotation = Rotation::new(Tensor::ones(half, options), Tensor::zeros(half, options));
        let turn = Turn { norms: None, rotation: &rotation };
        let got = plan.attend(wide.each_ref(), &turn, (&pages[0], &pages[1]), window);
        let error = (got - want).abs().max().double_value(&[]);
        assert!(error < 1e-5, "{shapes:?}, {heads}/{kv_heads}, window {window:?}: {error:e}");
    }
}

#[test]
fn it_is_the_native_kernel() {
    random::seed(1);
    for heads in [[4, 2], [3, 1], [2, 2]] {
        // Decode, prompts, chunks, all of them together.
        check(&[(0, 1), (5, 1), (16, 1), (130, 1), (31, 1)], 0, heads);
        check(&[(0, 40), (0, 1), (0, 16)], 0, heads);
        check(&[(16, 20), (3, 5)], 0, heads);
        check(&[(70, 1), (0, 33), (47, 2), (48, 1), (15, 1)], 0, heads);
        check(&[(48, 1), (50, 1), (63, 1)], 3, heads);
    }
}

#[test]
fn plans_are_brought_over_as_they_are() {
    let cases = cases(&[(17, 2), (3, 1)], 0);
    let spans = spans(&cases);
    let plan = PagedPlan::new(&spans, Tensor::from_slice(&[0i64; 3]), Device::Cpu);
    let ints = |tensor: &Tensor| Vec::<i32>::try_from(tensor.flatten(0, -1)).unwrap();
    assert_eq!(plan.block_table.size(), [2, 2]);
    assert_eq!(ints(&plan.block_table), [2, 1, 3, 0]);
    assert_eq!(ints(&plan.row_position), [17, 18, 3]);
    assert_eq!(plan.longest(), 19);
}

#[test]
fn pages_of_the_model_have_the_layout() {
    let config = crate::model::config::ModelConfig::from_hf(
        &serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32,
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5, "hidden_act": "silu", "eos_token_id": 1
        }),
        None,
    )
    .unwrap();
    let placement = crate::device::Placement { device: Device::Cpu, kind: Kind::BFloat16 };
    let pages = DevicePages::new(&config, 5, placement).unwrap();
    let (k, v) = pages.layer(2);
    assert_eq!((k.size(), v.size()), (vec![5, 2, BLOCK, 8], vec![5, 2, BLOCK, 8]));
    assert!(k.is_contiguous() && k.kind() == Kind::BFloat16);
}
