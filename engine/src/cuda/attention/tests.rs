//! The kernels, on the CPU harness, against naive attention in f64.

mod decode;

use self::decode::Unwritten;
use super::*;
use crate::{
    cuda::plan::Machine,
    kernels::{attention::Span, pages::BLOCK},
    model::rope::{HeadNorms, Rotation},
    torch::random,
};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// A layer's pages and sequences in them, at scattered blocks, and rows of queries.
struct Case {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    k_pages: Tensor,
    v_pages: Tensor,
    sequences: Vec<Sequence>,
    q: Tensor,
}

/// The last `rows` positions of `len` are queried.
struct Sequence {
    len: usize,
    rows: usize,
    blocks: Vec<u32>,
}

impl Case {
    /// `lengths` holds length and queried rows of each sequence, the first `shared` blocks of which
    /// are the same.
    fn new(
        seed: u64,
        kind: Kind,
        ((heads, kv_heads), dim): ((usize, usize), usize),
        lengths: &[(usize, usize)],
        shared: usize,
    ) -> Self {
        random::seed(seed);
        let mut rng = StdRng::seed_from_u64(seed);
        let needed: usize = lengths.iter().map(|(len, _)| len.div_ceil(BLOCK)).sum();
        let mut free: Vec<u32> = (0..needed as u32 + 3).collect();
        let mut sequences: Vec<Sequence> = Vec::new();
        for &(len, rows) in lengths {
            let mut take = |_| free.swap_remove(rng.random_range(0..free.len()));
            let mut blocks: Vec<u32> = (0..len.div_ceil(BLOCK)).map(&mut take).collect();
            if let Some(first) = sequences.first() {
                let common = shared.min(blocks.len()).min(first.blocks.len());
                blocks[..common].copy_from_slice(&first.blocks[..common]);
            }
            sequences.push(Sequence { len, rows, blocks });
        }
        let shape = [needed as i64 + 3, kv_heads as i64, BLOCK as i64, dim as i64];
        // Whatever no token lies in is poison.
        let mut used = Tensor::zeros([shape[0], 1, shape[2], 1], (Kind::Bool, Device::Cpu));
        for sequence in &sequences {
            for token in 0..sequence.len {
                let block = i64::from(sequence.blocks[token / BLOCK]);
                let _ = used.get(block).select(1, (token % BLOCK) as i64).fill_(1);
            }
        }
        used = used.logical_not();
        let pages = || {
            let mut pages = random::normal(&shape).to_kind(kind);
            pages.masked_fill_(&used, f64::NAN)
        };
        let rows: usize = lengths.iter().map(|(_, rows)| rows).sum();
        let q = random::normal(&[rows as i64, heads as i64, dim as i64]);
        let (k_pages, v_pages) = (pages(), pages());
        Self { heads, kv_heads, dim, k_pages, v_pages, sequences, q: q.to_kind(kind) }
    }

    fn spans(&self) -> Vec<Span<'_>> {
        let mut row = 0;
        let spans = self.sequences.iter().map(|Sequence { len, rows, blocks }| {
            row += rows;
            Span { rows: row - rows..row, first_position: len - rows, blocks }
        });
        spans.collect()
    }

    fn machine(&self, blocks: usize) -> Machine {
        Machine { group: self.heads / self.kv_heads, kv_heads: self.kv_heads, blocks }
    }

    fn plan(&self, blocks: usize) -> PagedPlan {
        let rows = self.q.size()[0] as usize;
        let (tokens, slots) = (vec![0; rows], vec![-1; rows]);
        PagedPlan::new(&self.spans(), [&tokens, &slots], self.machine(blocks), Device::Cpu)
    }

    fn run(&self, plan: &PagedPlan, window: Option<usize>) -> Tensor {
        let Self { q, k_pages, v_pages, .. } = self;
        let scale = 1.0 / (self.dim as f64).sqrt();
        attend(&Paged { q, k_pages, v_pages, plan, scale, window }).unwrap()
    }

    /// `[rows, heads * dim]` in f64.
    fn naive(&self, window: Option<usize>) -> Tensor {
        let group = (self.heads / self.kv_heads) as i64;
        let mut out = Vec::new();
        for span in self.spans() {
            let len = span.first_position + span.rows.len();
            let blocks: Vec<i64> = span.blocks.iter().map(|&block| i64::from(block)).collect();
            // [kv_heads, len, dim], each as often as there are heads of its group.
            let tokens = |pages: &Tensor| {
                let own = pages.index_select(0, &Tensor::from_slice(&blocks)).to_kind(Kind::Double);
                let own = own.transpose(0, 1).reshape([self.kv_heads as i64, -1, self.dim as i64]);
                own.narrow(1, 0, len as i64).repeat_interleave_self_int(group, 0, None)
            };
            let (k, v) = (tokens(&self.k_pages), tokens(&self.v_pages));
            let q = self.q.narrow(0, span.rows.start as i64, span.rows.len() as i64);
            let q = q.to_kind(Kind::Double).transpose(0, 1);
            let scores = q.matmul(&k.transpose(1, 2)) / (self.dim as f64).sqrt();
            let from = Tensor::arange(len as i64, (Kind::Int64, Device::Cpu));
            let at = (Tensor::arange(span.rows.len() as i64, (Kind::Int64, Device::Cpu))
                + span.first_position as i64)
                .unsqueeze(1);
            let lowest = &at - window.map_or(i64::MAX / 2, |window| window as i64);
            let hidden = from.gt_tensor(&at).logical_or(&from.le_tensor(&lowest));
            let weights = scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, Kind::Double);
            out.push(weights.matmul(&v).transpose(0, 1).reshape([span.rows.len() as i64, -1]));
        }
        Tensor::cat(&out, 0)
    }

    /// Compares with the naive result, however the work is cut.
    fn check(&self, window: Option<usize>) {
        let want = self.naive(window);
        // The output's own rounding, and that of the weights.
        let allowed = match self.q.kind() {
            Kind::BFloat16 => 2e-2,
            Kind::Half => 2.5e-3,
            _ => 5e-6,
        };
        for blocks in [1, 400] {
            let plan = self.plan(blocks);
            let made = self.run(&plan, window);
            assert_eq!(
                plan.arrived().abs().max().int64_value(&[]),
                0,
                "the next layer finds zeros"
            );
            assert!(self.run(&plan, window).equal(&made), "the same once more");
            let got = made.to_kind(Kind::Double);
            let error = (got - &want).abs().max().double_value(&[]);
            assert!(error < allowed, "error {error} with {blocks} blocks, window {window:?}");
        }
    }
}

const BF16: Kind = Kind::BFloat16;

#[test]
fn decode_equals_naive_attention() {
    let lengths = [(1, 1), (300, 1), (16, 1), (65, 1), (1100, 1)];
    for heads in [(1, 1), (14, 2), (9, 3)] {
        Case::new(1, BF16, (heads, 64), &lengths, 0).check(None);
    }
    Case::new(2, BF16, ((12, 2), 128), &lengths, 0).check(None);
    Case::new(3, Kind::Half, ((32, 8), 80), &lengths, 0).check(None);
}

#[test]
fn chunks_of_prompts_equal_naive_attention() {
    let lengths = [(100, 100), (33, 1), (330, 47), (1, 1), (17, 2)];
    for heads in [(2, 2), (14, 2), (40, 1)] {
        Case::new(4, BF16, (heads, 64), &lengths, 0).check(None);
    }
    Case::new(5, Kind::Half, ((6, 2), 128), &lengths, 0).check(None);
}

#[test]
fn windows_equal_naive_attention() {
    for window in [1, 5, 63, 64, 200] {
        let lengths = [(150, 150), (700, 1), (70, 3), (2, 1)];
        Case::new(6, BF16, ((6, 2), 64), &lengths, 0).check(Some(window));
    }
}

#[test]
fn shared_blocks_equal_naive_attention() {
    let group = |len: usize, samples: usize| (0..samples).map(move |i| (len + i % 7, 1));
    let mut lengths: Vec<(usize, usize)> = group(330, 20).collect();
    lengths.extend([(340, 9), (400, 80), (321, 1)]);
    for heads in [(14, 2), (4, 4)] {
        let case = Case::new(7, BF16, (heads, 64), &lengths, 20);
        for window in [None, Some(100), Some(335)] {
            case.check(window);
        }
    }
}

#[test]
fn plain_attention_equals_naive_attention() {
    let lengths = [(100, 30), (33, 1), (300, 4), (1, 1)];
    for dim in [64, 80, 128] {
        let case = Case::new(8, Kind::Float, ((6, 2), dim), &lengths, 0);
        case.check(None);
        case.check(Some(20));
    }
}

#[test]
fn far_apart_scores_stay_finite() {
    let mut case = Case::new(9, Kind::Half, ((2, 1), 64), &[(200, 200)], 0);
    case.q = &case.q * 300.0;
    let got = case.run(&case.plan(1), None);
    let error = (got.to_kind(Kind::Double) - case.naive(None)).abs().max().double_value(&[]);
    assert!(error < 1e-2, "{error}");
}

/// A graph's plan: filled where it lies, with fewer rows than there is room for.
#[test]
fn a_plan_is_filled_again_where_it_lies() {
    let case = Case::new(10, BF16, ((14, 2), 64), &[(300, 1), (20, 1), (777, 1)], 0);
    let machine = case.machine(20);
    let mut plan =
        PagedPlan::with_capacity(Capacity::of_decode(5, 60, &machine), machine, Device::Cpu);
    let address = plan.block_tables().data_ptr();
    let q = Tensor::cat(&[&case.q, &Tensor::full([2, 14, 64], f64::NAN, (BF16, Device::Cpu))], 0);
    let Case { k_pages, v_pages, .. } = &case;
    let run = |plan: &PagedPlan| {
        attend(&Paged { q: &q, k_pages, v_pages, plan, scale: 0.125, window: None }).unwrap()
    };
    let want = case.run(&case.plan(20), None);
    let ids = |numbers: &Tensor| Vec::<i64>::try_from(numbers).unwrap();
    for _ in 0..2 {
        plan.refill(&case.spans(), [&[5, 1 << 33, 7], &[-1; 3]]).unwrap();
        assert_eq!(ids(&plan.tokens), [5, 1 << 33, 7, 0, 0]);
        assert_eq!(ids(&plan.positions), [299, 19, 776, 0, 0]);
        assert_eq!(ids(&plan.slots), [-1; 5]);
        assert!(run(&plan).narrow(0, 0, 3).equal(&want));
        assert_eq!(plan.block_tables().data_ptr(), address);
        plan.refill(&case.spans()[..1], [&[3], &[4]]).unwrap();
        assert_eq!([ids(&plan.tokens)[0], ids(&plan.slots)[0], ids(&plan.slots)[1]], [3, 4, -1]);
        assert!(run(&plan).get(0).equal(&want.get(0)));
    }
    let long = Case::new(11, BF16, ((14, 2), 64), &[(4000, 1), (900, 1)], 0);
    assert!(
        plan.refill(&long.spans(), [&[0; 2], &[-1; 2]]).is_err(),
        "two tables of 250 blocks, room for 300"
    );
}

#[test]
fn written_rows_are_attended_to() {
    let case = Case::new(12, BF16, ((4, 2), 64), &[(40, 1)], 0);
    let slot = i64::from(case.sequences[0].blocks[2]) * 16 + 7;
    let plan = PagedPlan::new(&case.spans(), [&[0], &[slot]], case.machine(1), Device::Cpu);
    let [k, v] = [0, 1].map(|_| random::normal(&[1, 2, 64]).to_kind(BF16));
    write_kv(&k, &v, &case.k_pages, &case.v_pages, &plan).unwrap();
    let written = case.k_pages.get(slot / 16).select(1, 7);
    assert!(written.equal(&k.get(0)));
    case.check(None);
}

#[test]
fn a_plan_of_single_rows_takes_no_others() {
    let case = Case::new(18, BF16, ((4, 2), 64), &[(40, 2)], 0);
    let machine = case.machine(1);
    assert!(!case.plan(1).single_rows());
    let mut plan =
        PagedPlan::with_capacity(Capacity::of_decode(4, 10, &machine), machine, Device::Cpu);
    assert!(plan.single_rows());
    assert!(plan.refill(&case.spans(), [&[0; 2], &[-1; 2]]).is_err());
}

#[test]
fn what_does_not_fit_is_refused() {
    let case = Case::new(13, BF16, ((4, 2), 64), &[(40, 1)], 0);
    let plan = case.plan(1);
    let Case { k_pages, v_pages, .. } = &case;
    for q in [
        case.q.narrow(1, 0, 3),
        case.q.to_kind(Kind::Half),
        Tensor::zeros([2, 4, 64], (BF16, Device::Cpu)),
    ] {
        let paged = Paged { q: &q, k_pages, v_pages, plan: &plan, scale: 1.0, window: None };
        assert!(matches!(attend(&paged), Err(CudaError::Unsupported(_))), "{q:?}");
    }
    let Unwritten { qkv: [q, k, v], rotation, .. } = case.unwritten();
    let paged = Paged { q: &q, k_pages, v_pages, plan: &plan, scale: 1.0, window: None };
    let [cos, sin] = rotation.angles().map(Tensor::shallow_clone);
    let narrow = Rotation::new(cos, sin.narrow(1, 0, 8));
    let weight = Tensor::ones([64], (BF16, Device::Cpu));
    let norms = |second| Some(HeadNorms { weights: [&weight, second], eps: 1e-6 });
    let (short, wide) = (weight.narrow(0, 0, 32), weight.to_kind(Kind::Float));
    for (kv, norms, rotation) in [
        ([&k, &v.narrow(1, 0, 1)], None, &rotation),
        ([&k, &v], None, &narrow),
        ([&k.to_kind(Kind::Half), &v], None, &rotation),
        ([&k, &v], norms(&short), &rotation),
        ([&k, &v], norms(&wide), &rotation),
    ] {
        let error = turn_and_attend(&paged, kv, &Turn { norms, rotation });
        assert!(matches!(error, Err(CudaError::Unsupported(_))), "{kv:?}");
    }
    assert!(!fits(BF16, 4, 2, 72) && !fits(Kind::Double, 4, 2, 64) && fits(Kind::Half, 64, 1, 64));
}
