//! The kernels, on the CPU harness, against products in f64.

use super::*;
use crate::torch::random;

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
        tiling: &Tiling,
    ) -> Result<Tensor, CudaError> {
        workspace.product((&self.x, &self.weight, self.bias.as_ref()), output, tiling)
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

    fn check(&self, workspace: &mut Workspace, output: Output, tiling: &Tiling, allowed: f64) {
        let what = format!("{:?} by {:?}, {output:?}, {}", self.x, self.weight, tiling.name);
        let got = self.run(workspace, output, tiling).unwrap();
        assert_eq!(got.kind() == Kind::Float, output == Output::Wide, "{what}");
        let want = self.want(output);
        let errors = (got.to_kind(Kind::Double) - &want).abs() / want.abs().clamp_min(1.0);
        let error = errors.max().double_value(&[]);
        // f32 sums of products of this size are off by more than a last bit of their own.
        let allowed = if output == Output::Wide { 1e-5 } else { allowed };
        assert!(error <= allowed, "{what}: {error:e}");
        let left = workspace.arrived.abs().max().int64_value(&[]);
        assert_eq!(left, 0, "{what}: the next product finds zeros");
        let again = self.run(workspace, output, tiling).unwrap();
        assert!(again.equal(&got), "{what}: the same once more");
    }
}

#[test]
fn products_are_those_of_f64() {
    random::seed(1);
    for (kind, allowed) in KINDS {
        for tiling in &TILINGS {
            // One tile and one unit; tails in every direction; tiles that blocks share, and not.
            for (shape, count) in
                [([1, 8, 8], 3), ([5, 72, 200], 2), ([16, 300 * 8, 96], 3), ([13, 136, 1048], 5)]
            {
                let mut workspace = Workspace::new(processors(count), Device::Cpu).unwrap();
                for (output, biased) in
                    [(Output::Plain, true), (Output::Wide, false), (Output::Plain, false)]
                {
                    Case::new(shape, biased, kind).check(&mut workspace, output, tiling, allowed);
                }
            }
        }
    }
}

#[test]
fn products_of_all_numbers_of_rows() {
    random::seed(2);
    let mut workspace = Workspace::new(processors(3), Device::Cpu).unwrap();
    for tiling in &TILINGS {
        for rows in [1, 16, 17, 31, 33, 64] {
            let case = Case::new([rows, 152, 320], true, Kind::BFloat16);
            case.check(&mut workspace, Output::Plain, tiling, 1.0 / 256.0);
        }
    }
}

#[test]
fn gates() {
    random::seed(3);
    for (kind, allowed) in KINDS {
        for tiling in &TILINGS {
            for (shape, count) in [([3, 16, 16], 2), ([20, 2 * 200, 72], 3), ([9, 2 * 64, 520], 4)]
            {
                let mut workspace = Workspace::new(processors(count), Device::Cpu).unwrap();
                for biased in [true, false] {
                    let case = Case::new(shape, biased, kind);
                    case.check(&mut workspace, Output::Gated, tiling, allowed);
                }
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
    for tiling in &TILINGS {
        let all = case.run(&mut workspace, Output::Plain, tiling).unwrap();
        for rows in [1, 7] {
            let x = case.x.narrow(0, 16 - rows, rows).contiguous();
            let parts = (&x, &case.weight, case.bias.as_ref());
            let some = workspace.product(parts, Output::Plain, tiling).unwrap();
            assert!(some.equal(&all.narrow(0, 16 - rows, rows)), "{} {rows}", tiling.name);
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut workspace = Workspace::new(processors(2), Device::Cpu).unwrap();
    let zeros = |shape: [i64; 2], kind| Tensor::zeros(shape, (kind, Device::Cpu));
    let half = |rows, columns| zeros([rows, columns], Kind::Half);
    let mut refused = |x: Tensor, weight: Tensor, bias: Option<Tensor>, output| {
        let parts = (&x, &weight, bias.as_ref());
        let error = workspace.product(parts, output, &TILINGS[0]).unwrap_err();
        assert!(matches!(error, CudaError::Unsupported(_)), "{error}");
    };
    refused(half(65, 16), half(8, 16), None, Output::Plain);
    refused(half(0, 16), half(8, 16), None, Output::Plain);
    refused(half(2, 16), half(12, 16), None, Output::Plain);
    refused(half(2, 16), half(8, 16), None, Output::Gated);
    refused(half(2, 12), half(8, 12), None, Output::Plain);
    refused(half(2, 16), half(8, 24), None, Output::Plain);
    refused(half(2, 16), half(16, 8).tr(), None, Output::Plain);
    refused(half(2, 16), half(8, 16), Some(half(1, 8)), Output::Plain);
    refused(half(2, 16), zeros([8, 16], Kind::BFloat16), None, Output::Plain);
    refused(zeros([2, 16], Kind::Float), zeros([8, 16], Kind::Float), None, Output::Plain);
    let tight = Processors { count: 2, shared: 100 << 10, shared_of_block: 99 << 10 };
    let tight = Workspace::new(tight, Device::Cpu).unwrap();
    let shape = Shape::of(&half(64, 16), &half(8, 16), Output::Plain).unwrap();
    assert_eq!(tight.tilings(shape).count(), 0, "64 rows need more shared memory");
    let fitting = tight.tilings(Shape { columns: 16, ..shape }).map(|tiling| tiling.name);
    assert_eq!(fitting.collect::<Vec<_>>(), ["product_128", "product_64"]);
}
