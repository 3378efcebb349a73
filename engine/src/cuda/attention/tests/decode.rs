//! Decode steps in one kernel, against the kernels for each part of it; and what of attention could race.

use super::*;
use crate::cuda::{
    elementwise::rms_norm,
    harness::{Change, race, unchanged},
};

/// What a step finds: the pages without its own tokens, these as parts of one wide product, and angles.
pub(super) struct Unwritten {
    pub(super) pages: [Tensor; 2],
    pub(super) qkv: [Tensor; 3],
    pub(super) rotation: Rotation,
    pub(super) slots: Vec<i64>,
}

impl Case {
    /// Of sequences of one row each.
    pub(super) fn unwritten(&self) -> Unwritten {
        let Self { heads, kv_heads, dim, .. } = self;
        let (rows, parts) = (self.q.size()[0], [*heads, *kv_heads, *kv_heads]);
        let wide = (parts.iter().sum::<usize>() * dim) as i64;
        let joined = random::normal(&[rows, wide]).to_kind(self.q.kind());
        let mut end = 0;
        let qkv = parts.map(|heads| {
            let width = (heads * dim) as i64;
            end += width;
            joined.narrow(1, end - width, width).view([rows, heads as i64, *dim as i64])
        });
        let turns = random::normal(&[rows, *dim as i64 / 2]);
        let slot = |sequence: &Sequence| {
            let last = sequence.len - 1;
            i64::from(sequence.blocks[last / BLOCK]) * 16 + (last % BLOCK) as i64
        };
        let slots: Vec<i64> = self.sequences.iter().map(slot).collect();
        let pages = [&self.k_pages, &self.v_pages].map(Tensor::copy);
        for slot in &slots {
            for pages in &pages {
                let _ = pages.get(slot / 16).select(1, slot % 16).fill_(f64::NAN);
            }
        }
        Unwritten { pages, qkv, rotation: Rotation::new(turns.cos(), turns.sin()), slots }
    }

    /// One kernel does what several do: to the bit, but for the order in which a norm's squares are added.
    fn check_decode(&self, window: Option<usize>, normed: bool) {
        let Unwritten { pages, qkv, rotation, slots } = self.unwritten();
        let (plain, kind) = (Turn { norms: None, rotation: &rotation }, self.q.kind());
        let weights = [0, 1].map(|_| random::normal(&[self.dim as i64]).to_kind(kind));
        let norms = HeadNorms { weights: weights.each_ref(), eps: 1e-6 };
        let turn = Turn { norms: normed.then_some(norms), ..plain };
        let allowed = match (normed, kind) {
            (false, _) => 0.0,
            (true, Kind::BFloat16) => 2e-2,
            (true, _) => 2.5e-3,
        };
        let tokens = vec![0; slots.len()];
        let scale = 1.0 / (self.dim as f64).sqrt();
        let [q, k, v] = &qkv;
        for blocks in [1, 400] {
            let machine = self.machine(blocks);
            let plan = &PagedPlan::new(&self.spans(), [&tokens, &slots], machine, Device::Cpu);
            assert!(plan.single_rows());
            let [want, got] = [0, 1].map(|_| pages.each_ref().map(Tensor::copy));
            let over = |q, pages: [_; 2]| {
                let [k_pages, v_pages] = pages;
                Paged { q, k_pages, v_pages, plan, scale, window }
            };
            let normed = |x: &Tensor, weight: &Tensor| match normed {
                true => rms_norm(&x.contiguous(), weight, 1e-6).unwrap(),
                false => x.shallow_clone(),
            };
            let (own_q, own_k) = (normed(q, &weights[0]), normed(k, &weights[1]));
            let to = (&want[0], &want[1]);
            let turned =
                rotate_write([&own_q, &own_k, v], rotation.angles(), to, &plan.slots).unwrap();
            let wanted = attend(&over(&turned, want.each_ref())).unwrap();
            let fresh = || turn_and_attend(&over(q, got.each_ref()), [k, v], &turn).unwrap();
            let made = fresh();
            let far = |got: &Tensor, want: &Tensor| {
                let (got, want) = (got.to_kind(Kind::Double), want.to_kind(Kind::Double));
                assert!(got.isnan().equal(&want.isnan()));
                let apart = (got - &want).abs() / want.abs().clamp_min(1.0);
                apart.nan_to_num(0.0, None, None).max().double_value(&[])
            };
            assert!(made.isfinite().all().int64_value(&[]) == 1);
            let distance = far(&made, &wanted);
            assert!(distance <= allowed, "{distance}: {blocks} blocks, window {window:?}");
            for (got, want) in got.iter().zip(&want) {
                assert!(far(got, want) <= allowed, "{}", far(got, want));
            }
            assert!(fresh().equal(&made), "the same once more");
        }
    }
}

#[test]
fn decode_turns_and_stores_on_its_way() {
    let lengths =
        [(1, 1), (2, 1), (300, 1), (16, 1), (17, 1), (64, 1), (65, 1), (129, 1), (1100, 1)];
    for (heads, dim) in [((14, 2), 64), ((12, 2), 128), ((6, 6), 80), ((40, 1), 96), ((4, 2), 112)]
    {
        let case = Case::new(14, BF16, (heads, dim), &lengths, 0);
        for window in [None, Some(1), Some(50), Some(128)] {
            case.check_decode(window, false);
        }
        case.check_decode(None, true);
    }
    Case::new(15, Kind::Half, ((32, 8), 80), &lengths, 0).check_decode(None, true);
    let group: Vec<_> = (0..30).map(|i| (330 + i % 23, 1)).collect();
    for heads in [(14, 2), (4, 4)] {
        let case = Case::new(16, BF16, (heads, 64), &group, 20);
        for (window, normed) in [(None, false), (Some(100), true), (Some(335), false)] {
            case.check_decode(window, normed);
        }
    }
}

/// A row without a slot attends to its own token, which is stored nowhere.
#[test]
fn a_decoded_row_may_be_stored_nowhere() {
    let case = Case::new(17, BF16, ((4, 2), 64), &[(40, 1), (21, 1)], 0);
    let Unwritten { pages, qkv: [q, k, v], rotation, slots } = case.unwritten();
    let turn = Turn { norms: None, rotation: &rotation };
    let run = |slots: &[i64]| {
        let plan = PagedPlan::new(&case.spans(), [&[0; 2], slots], case.machine(1), Device::Cpu);
        let [k_pages, v_pages] = &pages.each_ref().map(Tensor::copy);
        let paged = Paged { q: &q, k_pages, v_pages, plan: &plan, scale: 0.125, window: None };
        let made = turn_and_attend(&paged, [&k, &v], &turn).unwrap();
        (made, k_pages.isnan().sum(Kind::Int64).int64_value(&[]))
    };
    let ((all, left), (some, more)) = (run(&slots), run(&[slots[0], -1]));
    assert!(all.equal(&some));
    assert_eq!(more, left + 2 * 64);
}

/// Steps of decode and of prompts, whose rows are cut into pieces and not.
fn first_race(change: Change, blocks: usize) -> [Option<String>; 2] {
    let case = Case::new(19, BF16, ((4, 2), 64), &[(1, 1), (150, 1), (330, 1)], 0);
    let Unwritten { pages: [k_pages, v_pages], qkv, rotation, slots } = case.unwritten();
    let weights = [0, 1].map(|_| random::normal(&[64]).to_kind(BF16));
    let norms = Some(HeadNorms { weights: weights.each_ref(), eps: 1e-6 });
    let plan = PagedPlan::new(&case.spans(), [&[0; 3], &slots], case.machine(blocks), Device::Cpu);
    let [q, k, v] = qkv.each_ref();
    let (k_pages, v_pages) = (&k_pages, &v_pages);
    let paged = Paged { q, k_pages, v_pages, plan: &plan, scale: 0.125, window: Some(200) };
    let [cos, sin] = rotation.angles();
    let decode = race(&[q, k, v, cos, sin], change, || {
        turn_and_attend(&paged, [k, v], &Turn { norms, rotation: &rotation }).unwrap()
    });

    let lengths: Vec<_> = [(100, 40)].into_iter().chain((0..6).map(|i| (330 + i, 1))).collect();
    let case = Case::new(20, BF16, ((4, 2), 64), &lengths, 20);
    let plan = case.plan(blocks);
    let made = [&case.q, &case.k_pages, &case.v_pages];
    [decode, race(&made, change, || case.run(&plan, None))]
}

/// Whatever a thread reads or writes is ordered after what others do with it.
#[test]
fn nothing_races() {
    for blocks in [1, 400] {
        assert_eq!(first_race(unchanged, blocks), [None, None], "{blocks} blocks");
    }
}

#[test]
fn races_are_found() {
    let changes: [Change; 3] = [
        |source| source.replace("count_up(*arrived)", "(*arrived)++"),
        |source| {
            source.replace("part);\n    __syncthreads();\n    load_step", "part);\n    load_step")
        },
        |source| source.replace("row);\n    __syncthreads();\n    float", "row);\n    float"),
    ];
    for (index, change) in changes.into_iter().enumerate() {
        let found = first_race(change, 400);
        assert!(found.iter().any(Option::is_some), "{index}: {found:?}");
    }
}
