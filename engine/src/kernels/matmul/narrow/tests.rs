use super::super::nt_at;
use super::*;
use half::{bf16, f16};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const FORMATS: [Format; 3] = [Format::F16, Format::Bf16, Format::Int8];

/// Numbers of very different sizes, as weights and activations are.
fn numbers(rng: &mut StdRng, len: usize) -> Vec<f32> {
    (0..len).map(|_| (rng.random::<f32>() * 2.0 - 1.0).powi(5)).collect()
}

/// What a row of weights is rounded to, and its scale.
fn rounded(format: Format, row: &[f32]) -> (Vec<f32>, f32) {
    match format {
        Format::F16 => (row.iter().map(|&x| f16::from_f32(x).to_f32()).collect(), 1.0),
        Format::Bf16 => (row.iter().map(|&x| bf16::from_f32(x).to_f32()).collect(), 1.0),
        Format::Int8 => {
            let most = row.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let inverse = if most == 0.0 { 0.0 } else { 127.0 / most };
            (row.iter().map(|x| (x * inverse).round_ties_even()).collect(), most / 127.0)
        }
    }
}

/// A weight, its bias, and a batch.
struct Case {
    shape: [usize; 3],
    x: Vec<f32>,
    weights: Vec<f32>,
    bias: Vec<f32>,
}

impl Case {
    fn new([m, n, k]: [usize; 3]) -> Self {
        let mut rng = StdRng::seed_from_u64((m * 1_000_003 + n * 1009 + k) as u64);
        Self {
            shape: [m, n, k],
            x: numbers(&mut rng, m * k),
            weights: numbers(&mut rng, n * k),
            bias: numbers(&mut rng, n),
        }
    }

    fn packed(&self, level: Level, format: Format) -> Narrow {
        let mut weight = Narrow::new_at(level, format, [self.shape[1], self.shape[2]]);
        weight.pack(&self.weights);
        weight
    }

    fn product(&self, weight: &Narrow) -> Vec<f32> {
        let mut y = vec![f32::NAN; self.shape[0] * self.shape[1]];
        weight.multiply(&self.x, Some(&self.bias), &mut y);
        y
    }

    fn assert(&self, level: Level, format: Format) {
        let [m, n, k] = self.shape;
        let y = self.product(&self.packed(level, format));
        for j in 0..n {
            let (row, scale) = rounded(format, &self.weights[j * k..(j + 1) * k]);
            for i in 0..m {
                let products = self.x[i * k..(i + 1) * k].iter().zip(&row);
                let products = products.map(|(&x, &w)| f64::from(x) * f64::from(w));
                let (sum, size) = products.fold((0.0, 0.0), |(a, b), p| (a + p, b + p.abs()));
                let (scale, bias) = (f64::from(scale), f64::from(self.bias[j]));
                let want = sum * scale + bias;
                // Rounding errors add up like a random walk.
                let bound = 6e-8 * (size * scale + bias.abs()) * (2.0 + (k as f64).sqrt());
                let got = f64::from(y[i * n + j]);
                let what = format!("{format:?} {:?} at {level:?}, ({i}, {j})", self.shape);
                assert!((got - want).abs() <= bound, "{what}: {got} for {want}");
            }
        }
    }
}

#[test]
fn products_of_rounded_weights() {
    let sizes = [[1, 1], [15, 17], [16, 16], [33, 100], [63, 64], [65, 31], [192, 48], [100, 576]];
    for format in FORMATS {
        for m in [1, 2, 3, 5, 7, 8, 12, 13, 17, 65] {
            for [n, k] in sizes {
                for level in Level::available() {
                    Case::new([m, n, k]).assert(level, format);
                }
            }
        }
        // Several chunks of rows, several depths of a widened panel.
        Case::new([200, 70, 2500]).assert(Level::best(), format);
        Case::new([17, 130, 1025]).assert(Level::best(), format);
    }
}

#[test]
fn sums_are_those_of_f32_products_bitwise() {
    for level in Level::available() {
        for format in FORMATS {
            for [m, n, k] in [[1, 80, 1500], [9, 576, 576], [40, 100, 2100]] {
                let case = Case::new([m, n, k]);
                let mut weights = Vec::new();
                let mut scales = Vec::new();
                for row in case.weights.chunks(k) {
                    let (row, scale) = rounded(format, row);
                    weights.extend(row);
                    scales.push(scale);
                }
                let mut sums = vec![0.0; m * n];
                nt_at(level, [&case.x, &weights], None, &mut sums, [m, n, k]);
                let mut y = vec![0.0; m * n];
                case.packed(level, format).multiply(&case.x, None, &mut y);
                let want = sums.iter().enumerate().map(|(i, sum)| sum * scales[i % n]);
                assert!(want.eq(y.iter().copied()), "{format:?} {:?} at {level:?}", case.shape);
            }
        }
    }
}

#[test]
fn rows_do_not_depend_on_the_batch() {
    for format in FORMATS {
        for [n, k] in [[576, 576], [100, 1537], [49, 64]] {
            let all = Case::new([300, n, k]);
            for level in Level::available() {
                let weight = all.packed(level, format);
                let want = all.product(&weight);
                for rows in [0..1, 7..9, 3..6, 5..12, 40..53, 17..34, 10..75, 0..299] {
                    let mut y = vec![0.0; rows.len() * n];
                    let x = &all.x[rows.start * k..rows.end * k];
                    weight.multiply(x, Some(&all.bias), &mut y);
                    let same = y == want[rows.start * n..rows.end * n];
                    assert!(same, "{format:?} {rows:?} of [300, {n}, {k}] at {level:?}");
                }
            }
        }
    }
}

#[test]
fn packing_again_replaces_every_weight() {
    for format in FORMATS {
        let (old, new) = (Case::new([4, 90, 130]), Case::new([5, 90, 130]));
        let mut weight = old.packed(Level::best(), format);
        weight.pack(&new.weights);
        assert_eq!(new.product(&weight), new.product(&new.packed(Level::best(), format)));
    }
}

#[test]
fn what_is_not_finite_shows() {
    for format in FORMATS {
        for level in Level::available() {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut case = Case::new([2, 40, 70]);
                case.weights[13 * 70 + 5] = bad;
                let y = case.product(&case.packed(level, format));
                for (i, y) in y.iter().enumerate() {
                    assert_eq!(y.is_finite(), i % 40 != 13, "{format:?} at {level:?}: {bad}");
                }
            }
        }
    }
}

#[test]
fn rows_of_zeros_and_of_tiny_weights() {
    for level in Level::available() {
        let mut case = Case::new([3, 20, 33]);
        case.weights[..33].fill(0.0);
        case.weights[33..66].iter_mut().for_each(|w| *w *= 1e-30);
        case.weights[66..99].fill(1e-42);
        for format in FORMATS {
            let y = case.product(&case.packed(level, format));
            for i in 0..3 {
                assert_eq!(y[i * 20], case.bias[0], "{format:?} at {level:?}");
                assert_eq!(y[i * 20 + 1..i * 20 + 3], case.bias[1..3], "{format:?} at {level:?}");
            }
        }
    }
}

#[test]
fn nothing_to_compute() {
    for format in FORMATS {
        for shape in [[0, 5, 7], [5, 0, 7], [0, 0, 0]] {
            let case = Case::new(shape);
            assert!(case.product(&case.packed(Level::best(), format)).is_empty());
        }
        let case = Case::new([2, 20, 0]);
        let y = case.product(&case.packed(Level::best(), format));
        assert_eq!(y, [&case.bias[..], &case.bias].concat());
    }
}

#[test]
fn bytes_are_those_of_the_format() {
    let bytes = |format| Narrow::new(format, [576, 100]).bytes();
    let scales = 4 * 576;
    assert_eq!(FORMATS.map(bytes), [115_200 + scales, 115_200 + scales, 57_600 + scales]);
}

#[test]
#[should_panic(expected = "x and y must be [m, 4] and [m, 3]")]
fn lengths_are_checked() {
    Narrow::new(Format::F16, [3, 4]).multiply(&[0.0; 9], None, &mut [0.0; 6]);
}
