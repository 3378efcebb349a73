//! The kernels, on the CPU harness, against products in f64.

use super::*;
use crate::{
    cuda::harness::{Change, race, unchanged},
    torch::random,
};

const KINDS: [(Kind, f64); 2] = [(Kind::BFloat16, 1.0 / 256.0), (Kind::Half, 1.0 / 2048.0)];

/// So many of them, as an H100 has them.
fn processors(count: usize) -> Processors {
    Processors { count, shared: 228 << 10, shared_of_block: 227 << 10 }
}

fn normal(shape: &[i64], kind: Kind) -> Tensor {
    random::normal(shape).to_kind(kind)
}

struct Case {
    x: Tensor,
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Case {
    fn new([rows, width, depth]: [i64; 3], biased: bool, kind: Kind) -> Self {
        let bias = biased.then(|| normal(&[1, width], kind).view([width]));
        Self { x: normal(&[rows, depth], kind), weight: normal(&[width, depth], kind), bias }
    }

    fn run(
        &self,
        workspace: &mut Workspace,
        output: Output,
        way: Way,
    ) -> Result<Tensor, CudaError> {
        workspace.product((&self.x, &self.weight, self.bias.as_ref()), output, way)
    }

    fn want(&self, output: Output) -> Tensor {
        let [x, weight] = [&self.x, &self.weight].map(|part| part.to_kind(Kind::Double));
        let mut y = x.matmul(&weight.tr());
        if let Some(bias) = &self.bias {
            y += bias.to_kind(Kind::Double);
        }
        if output == Output::Gated {
            let halves = y.chunk(2, 1);
            y = halves[0].silu() * &halves[1];
        }
        y
    }

    /// By all ways.
    fn check(&self, workspace: &mut Workspace, output: Output, allowed: f64) {
        let want = self.want(output);
        // A sum grows as the root of the depth, and what it is rounded by on the way does, too.
        let depth = self.x.size()[1] as f64;
        let allowed = if output == Output::Wide { 1e-6 * depth.sqrt() } else { allowed };
        let shape = Shape::of(&self.x, &self.weight, output).unwrap();
        for way in workspace.ways(shape) {
            let what = format!("{:?} by {:?}, {output:?}, {way}", self.x, self.weight);
            let got = self.run(workspace, output, way).unwrap();
            assert_eq!(got.kind() == Kind::Float, output == Output::Wide, "{what}");
            let errors = (got.to_kind(Kind::Double) - &want).abs() / want.abs().clamp_min(1.0);
            let error = errors.max().double_value(&[]);
            assert!(error <= allowed, "{what}: {error:e}");
            let left = workspace.arrived.abs().max().int64_value(&[]);
            assert_eq!(left, 0, "{what}: the next product finds zeros");
            let again = self.run(workspace, output, way).unwrap();
            assert!(again.equal(&got), "{what}: the same once more");
        }
    }
}

#[test]
fn products_are_those_of_f64() {
    random::seed(1);
    for (kind, allowed) in KINDS {
        // One tile and one unit; tails in every direction; tiles that blocks share, and not.
        for (shape, count) in
            [([1, 8, 8], 3), ([5, 72, 200], 2), ([16, 300 * 8, 96], 3), ([13, 136, 1048], 5)]
        {
            let mut workspace = Workspace::new(processors(count), Device::Cpu).unwrap();
            for (output, biased) in
                [(Output::Plain, true), (Output::Wide, false), (Output::Plain, false)]
            {
                Case::new(shape, biased, kind).check(&mut workspace, output, allowed);
            }
        }
    }
}

#[test]
fn products_of_all_numbers_of_rows() {
    random::seed(2);
    let mut workspace = Workspace::new(processors(3), Device::Cpu).unwrap();
    for rows in [1, 16, 17, 31, 33, 64] {
        let case = Case::new([rows, 152, 320], true, Kind::BFloat16);
        case.check(&mut workspace, Output::Plain, 1.0 / 256.0);
    }
}

#[test]
fn gates() {
    random::seed(3);
    for (kind, allowed) in KINDS {
        for (shape, count) in [([3, 16, 16], 2), ([20, 2 * 200, 72], 3), ([9, 2 * 64, 520], 4)] {
            let mut workspace = Workspace::new(processors(count), Device::Cpu).unwrap();
            for biased in [true, false] {
                Case::new(shape, biased, kind).check(&mut workspace, Output::Gated, allowed);
            }
        }
    }
}

/// A sample's numbers do not depend on who else is in the batch.
#[test]
fn a_row_does_not_depend_on_the_others() {
    random::seed(4);
    let mut workspace = Workspace::new(processors(3), Device::Cpu).unwrap();
    let case = Case::new([16, 200, 600], true, Kind::BFloat16);
    let shape = Shape::of(&case.x, &case.weight, Output::Plain).unwrap();
    for way in workspace.ways(shape) {
        let all = case.run(&mut workspace, Output::Plain, way).unwrap();
        for rows in [1, 7] {
            let x = case.x.narrow(0, 16 - rows, rows).contiguous();
            let parts = (&x, &case.weight, case.bias.as_ref());
            let some = workspace.product(parts, Output::Plain, way).unwrap();
            assert!(some.equal(&all.narrow(0, 16 - rows, rows)), "{way} {rows}");
        }
    }
}

/// Whatever a thread reads or writes is ordered after what others do with it.
#[test]
fn nothing_races() {
    random::seed(6);
    let mut workspace = Workspace::new(processors(3), Device::Cpu).unwrap();
    for (output, shape) in [(Output::Plain, [3, 264, 1160]), (Output::Gated, [33, 400, 200])] {
        let case = Case::new(shape, true, Kind::BFloat16);
        let shape = Shape::of(&case.x, &case.weight, output).unwrap();
        for way in workspace.ways(shape) {
            let body = || case.run(&mut workspace, output, way).unwrap();
            assert_eq!(race(&[&case.x], unchanged, body), None, "{way}");
        }
    }
}

/// Each way that orders something is looked at: without it there is a race.
#[test]
fn races_are_found() {
    random::seed(7);
    let mut workspace = Workspace::new(processors(4), Device::Cpu).unwrap();
    let case = Case::new([3, 264, 1160], false, Kind::BFloat16);
    let way = |tiling: usize, deal| Way { tiling: &TILINGS[tiling], deal };
    let (even, parts) = (way(1, Deal::Even(4)), way(0, Deal::Parts(2)));
    let changes: [(Way, &str, Change); 5] = [
        (even, "has written, in shared", |source| {
            source.replacen("sync_threads<MULTIPLIERS>();", "", 1)
        }),
        (even, "has written, in global", |source| {
            source.replace("count_up(a.arrived[own_tile(tile)])", "a.arrived[own_tile(tile)]++")
        }),
        (even, "reads what thread 128", |source| {
            source.replace(
                "multiply_stage(memory.stages[turn.stage]);",
                "multiply_stage(memory.stages[(turn.stage + 1) % STAGES]);",
            )
        }),
        (parts, "has written, in shared", |source| {
            source.replace("arrive_at_cluster<true>", "arrive_at_cluster<false>")
        }),
        (way(3, Deal::Parts(1)), "in shared", |source| {
            source
                .replace("if (PAIR > 1) arrive_at_cluster<false>();", "")
                .replace("if (PAIR > 1) wait_for_cluster();", "")
        }),
    ];
    for (way, said, change) in changes {
        let body = || case.run(&mut workspace, Output::Plain, way).unwrap();
        let found = race(&[&case.x], change, body).unwrap_or_default();
        let _ = workspace.arrived.zero_();
        assert!(found.contains(said), "{way}: '{found}'");
    }
}

/// Of Qwen2.5-7B on an H100, at 64 rows.
#[test]
fn work_is_dealt_out_in_ways_that_fill_the_device() {
    let h100 = processors(132);
    let deals = |width, depth, tiling: usize| {
        let (element, output) = (Element::Bf16, Output::Plain);
        let shape = Shape { element, columns: 64, width, depth, output };
        let tiling = &TILINGS[tiling];
        (shape.tiles(tiling), shape.deals(tiling, &h100))
    };
    let parts = |parts: &[usize]| -> Vec<Deal> { parts.iter().map(|&n| Deal::Parts(n)).collect() };
    let also = |first: &[usize], blocks| [parts(first), vec![Deal::Even(blocks)]].concat();
    let [half, whole, half_pair, whole_pair, wide] = [0, 1, 2, 3, 4];
    assert_eq!(deals(3584, 3584, whole), (28, also(&[1, 2, 3, 4], 132)));
    let twice = [also(&[1, 2, 3, 4], 132), also(&[7, 8], 264)].concat();
    assert_eq!(deals(3584, 3584, half), (28, twice), "and at most eight blocks share a tile");
    assert_eq!(deals(37888, 3584, whole), (296, also(&[1], 132)));
    assert_eq!(deals(37888, 3584, half), (296, [also(&[1], 132), vec![Deal::Even(264)]].concat()));
    assert_eq!(deals(1152, 896, whole), (9, also(&[1, 4, 7, 8], 126)));
    assert_eq!(deals(128 * 132, 3584, whole), (132, parts(&[1])), "one tile for each processor");
    assert_eq!(deals(64, 64, half), (1, parts(&[1])), "there is nothing to share");
    // Tiles and runs of pairs.
    assert_eq!(deals(3584, 3584, whole_pair), (14, also(&[1, 2, 3, 4], 66)));
    let twice = [also(&[1, 2, 3, 4], 66), vec![Deal::Even(132)]].concat();
    assert_eq!(deals(3584, 3584, half_pair), (14, twice));
    // Tiles of twice as many rows.
    assert_eq!(deals(4608, 3584, wide), (18, also(&[1, 4, 6, 7], 132)));
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut workspace = Workspace::new(processors(2), Device::Cpu).unwrap();
    let zeros = |shape: [i64; 2], kind| Tensor::zeros(shape, (kind, Device::Cpu));
    let half = |rows, columns| zeros([rows, columns], Kind::Half);
    let whole = Way { tiling: &TILINGS[0], deal: Deal::Parts(1) };
    let mut refused = |x: Tensor, weight: Tensor, bias: Option<Tensor>, output, way| {
        let error = workspace.product((&x, &weight, bias.as_ref()), output, way).unwrap_err();
        assert!(matches!(error, CudaError::Unsupported(_)), "{error}");
    };
    let plain = Output::Plain;
    refused(half(65, 16), half(8, 16), None, plain, whole);
    refused(half(0, 16), half(8, 16), None, plain, whole);
    refused(half(2, 16), half(12, 16), None, plain, whole);
    refused(half(2, 16), half(8, 16), None, Output::Gated, whole);
    refused(half(2, 12), half(8, 12), None, plain, whole);
    refused(half(2, 16), half(8, 24), None, plain, whole);
    refused(half(2, 16), half(16, 8).tr(), None, plain, whole);
    refused(half(2, 16), half(8, 16), Some(half(1, 8)), plain, whole);
    refused(half(2, 16), zeros([8, 16], Kind::BFloat16), None, plain, whole);
    refused(zeros([2, 16], Kind::Float), zeros([8, 16], Kind::Float), None, plain, whole);
    let many = Way { deal: Deal::Parts(100), ..whole };
    refused(half(2, 16), half(8, 16), None, plain, many);
    let tight = Processors { count: 2, shared: 110 << 10, shared_of_block: 109 << 10 };
    let tight = Workspace::new(tight, Device::Cpu).unwrap();
    let shape = Shape::of(&half(64, 16), &half(8, 16), plain).unwrap();
    let names = |shape| tight.ways(shape).iter().map(|way| way.tiling.name).collect::<Vec<_>>();
    let halves = ["product_half", "product_half_pair"];
    assert_eq!(names(shape), halves, "the others need more shared memory");
    let none = Processors { count: 2, shared: 90 << 10, shared_of_block: 89 << 10 };
    assert!(Workspace::new(none, Device::Cpu).unwrap().ways(shape).is_empty());
}
