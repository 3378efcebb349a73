use super::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

fn numbers(rng: &mut StdRng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random::<f32>() * 2.0 - 1.0).collect()
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Nt,
    NtBias,
    Nn,
    Tn,
    TnAdd,
}

const KINDS: [Kind; 5] = [Kind::Nt, Kind::NtBias, Kind::Nn, Kind::Tn, Kind::TnAdd];

/// Operands of a product, what is added, and what was in the output.
struct Case {
    kind: Kind,
    shape: [usize; 3],
    a: Vec<f32>,
    b: Vec<f32>,
    bias: Vec<f32>,
    before: Vec<f32>,
}

impl Case {
    fn new(kind: Kind, [m, n, k]: [usize; 3]) -> Self {
        let mut rng = StdRng::seed_from_u64((m * 1_000_003 + n * 1009 + k) as u64);
        Self {
            kind,
            shape: [m, n, k],
            a: numbers(&mut rng, m * k),
            b: numbers(&mut rng, n * k),
            bias: numbers(&mut rng, n),
            before: numbers(&mut rng, m * n),
        }
    }

    fn compute(&self, level: Level) -> Vec<f32> {
        let (operands, mut c) = ([&self.a[..], &self.b[..]], self.before.clone());
        match self.kind {
            Kind::Nt => nt_at(level, operands, None, &mut c, self.shape),
            Kind::NtBias => nt_at(level, operands, Some(&self.bias), &mut c, self.shape),
            Kind::Nn => nn_at(level, operands, &mut c, self.shape),
            Kind::Tn => tn_at(level, operands, false, &mut c, self.shape),
            Kind::TnAdd => tn_at(level, operands, true, &mut c, self.shape),
        }
        c
    }

    /// One result, and the sum of the magnitudes in it.
    fn oracle(&self, i: usize, j: usize) -> [f64; 2] {
        let [m, n, k] = self.shape;
        let at = |p: usize| match self.kind {
            Kind::Nt | Kind::NtBias => (self.a[i * k + p], self.b[j * k + p]),
            Kind::Nn => (self.a[i * k + p], self.b[p * n + j]),
            Kind::Tn | Kind::TnAdd => (self.a[p * m + i], self.b[p * n + j]),
        };
        let start = match self.kind {
            Kind::NtBias => f64::from(self.bias[j]),
            Kind::TnAdd => f64::from(self.before[i * n + j]),
            _ => 0.0,
        };
        let products = (0..k).map(|p| f64::from(at(p).0) * f64::from(at(p).1));
        products.fold([start, start.abs()], |[sum, size], x| [sum + x, size + x.abs()])
    }

    fn assert(&self, level: Level, step: usize) {
        let [m, n, k] = self.shape;
        let c = self.compute(level);
        for i in (0..m * n).step_by(step) {
            let [want, size] = self.oracle(i / n, i % n);
            // Rounding errors add up like a random walk.
            let bound = 6e-8 * size * (1.0 + (k as f64).sqrt());
            let error = (f64::from(c[i]) - want).abs();
            assert!(
                error <= bound,
                "{:?} {:?} at {level:?}, ({}, {}): {} for {want}",
                self.kind,
                self.shape,
                i / n,
                i % n,
                c[i]
            );
        }
    }
}

#[test]
fn small_shapes() {
    let mut rng = StdRng::seed_from_u64(1);
    for _ in 0..400 {
        let shape = [70, 70, 70].map(|most| rng.random_range(1..=most));
        for kind in KINDS {
            let case = Case::new(kind, shape);
            for level in Level::available() {
                case.assert(level, 1);
            }
        }
    }
}

#[test]
fn each_dimension_at_its_edges() {
    for size in [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65]
    {
        for kind in KINDS {
            for shape in [[size, 50, 20], [20, size, 50], [50, 20, size]] {
                Case::new(kind, shape).assert(Level::best(), 1);
            }
        }
    }
}

#[test]
fn several_blocks() {
    // Blocks of lanes, of rows and of the depth, all with a rest; on one thread and on more.
    let shapes = [[3, 1000, 2500], [70, 300, 2100], [700, 130, 900], [130, 150, 9000]];
    for shape in shapes {
        for kind in KINDS {
            Case::new(kind, shape).assert(Level::best(), 37);
        }
    }
}

#[test]
fn nothing_to_compute() {
    for kind in KINDS {
        for shape in [[0, 5, 7], [5, 0, 7], [0, 0, 0]] {
            assert!(Case::new(kind, shape).compute(Level::best()).is_empty());
        }
        let case = Case::new(kind, [5, 70, 0]);
        let want: Vec<f32> = (0..350).map(|i| case.oracle(i / 70, i % 70)[0] as f32).collect();
        assert_eq!(case.compute(Level::best()), want, "{kind:?}");
    }
}

#[test]
fn rows_do_not_depend_on_the_batch() {
    for [n, k] in [[576, 576], [100, 1537], [49, 4864]] {
        let all = Case::new(Kind::NtBias, [300, n, k]);
        for level in Level::available() {
            let want = all.compute(level);
            for rows in [0..1, 7..8, 3..19, 5..22, 40..104, 10..75, 0..299, 17..217] {
                let mut c = vec![0.0; rows.len() * n];
                let a = &all.a[rows.start * k..rows.end * k];
                let bias = Some(&all.bias[..]);
                nt_at(level, [a, &all.b], bias, &mut c, [rows.len(), n, k]);
                assert!(c == want[rows.start * n..rows.end * n], "{rows:?} of [300, {n}, {k}]");
            }
        }
    }
}

#[test]
fn layers_in_one_go_are_the_same() {
    for (m, k) in [(1, 576), (64, 576), (70, 100), (300, 2500), (5, 0)] {
        let cases = [576, 192, 7, 0, 1536].map(|n| Case::new(Kind::NtBias, [m, n, k]));
        let a = &cases[0].a;
        for level in Level::available() {
            let mut outputs = cases.each_ref().map(|case| case.before.clone());
            let layers = cases.iter().zip(&mut outputs).map(|(case, output)| Layer {
                weight: &case.b,
                bias: Some(&case.bias),
                output,
            });
            nt_each_at(level, a, &mut layers.collect::<Vec<_>>(), [m, k]);
            for (case, output) in cases.iter().zip(&outputs) {
                let mut alone = case.before.clone();
                nt_at(level, [a, &case.b], Some(&case.bias), &mut alone, case.shape);
                assert!(*output == alone, "{:?} of {level:?}", case.shape);
            }
        }
    }
}

#[test]
fn sums_run_in_order_by_fused_steps() {
    let case = Case::new(Kind::Nt, [70, 50, 2500]);
    for (level, c) in Level::available().into_iter().map(|level| (level, case.compute(level))) {
        if level == Level::available()[0] {
            continue; // Not fused on every machine.
        }
        for i in 0..70 {
            for j in 0..50 {
                let (a, b) = (&case.a[i * 2500..], &case.b[j * 2500..]);
                let want = (0..2500).fold(0.0, |sum, p| b[p].mul_add(a[p], sum));
                assert_eq!(c[i * 50 + j], want, "{level:?}");
            }
        }
    }
}

#[test]
#[should_panic(expected = "b must be [3, 4]")]
fn lengths_are_checked() {
    nt(&[0.0; 8], &[0.0; 11], None, &mut [0.0; 6], [2, 3, 4]);
}
