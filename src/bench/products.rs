//! `onpolicy bench products`: every way to make the products of a decode step on a CUDA device, of
//! which the engine takes the fastest.

use super::{
    cli::Common,
    report::{Line, Report, Unit},
    roofline::{Rates, Work},
    session::Session,
};
use anyhow::ensure;
use clap::Args;
use onpolicy_engine::{
    cuda::product::choice::Case,
    device::tuning::{Trial, choose_fastest},
    model::decoder::Decoder,
    weights::Weights,
};
use std::collections::BTreeMap;

/// `onpolicy bench products`.
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    common: Common,
}

/// Runs the benchmark.
///
/// # Errors
/// Another device than CUDA's, or a model or configuration that does not work.
pub fn run(arguments: &Arguments) -> Result<(), anyhow::Error> {
    let report = measure(&arguments.common)?;
    arguments.common.publish(&report)
}

fn measure(common: &Common) -> Result<Report, anyhow::Error> {
    let mut session = Session::start(common, |checkpoint| {
        let device = checkpoint.tensors[0].1.device();
        ensure!(
            device.is_cuda(),
            "products are made in several ways on a CUDA device only, not on {device:?}: take --device \
                 cuda"
        );
        Ok(vec!["engine.kv_memory_mb=256".into()])
    })?;
    // As the engine multiplies: without gradients, and parts with the same input together.
    let served = session.served.weights.iter();
    let served = served.map(|(name, tensor)| (name.to_string(), tensor.detach()));
    let decoder = Decoder::new(session.served.model(), &Weights::new(served.collect()));
    let products = decoder.products();
    let mut runs: Vec<Vec<(&str, Case, Trial)>> = Vec::new();
    for round in session.rounds() {
        let mut known = BTreeMap::new();
        let tried = onpolicy_engine::torch::no_grad(|| choose_fastest(&products, &mut known))?;
        if round.counts {
            runs.push(tried.into_iter().map(|one| (one.name, one.case, one.trial)).collect());
        }
    }
    let rates = session.rates();
    let cases = (0..runs[0].len()).flat_map(|case| {
        let trials: Vec<&Trial> = runs.iter().map(|run| &run[case].2).collect();
        let (name, case, _) = &runs[0][case];
        lines(name, case, &trials, &rates)
    });
    let note = "Each is one layer's product, and a norm before it, out of those of all layers in one \
                graph. The engine takes the fastest that it sees at its start, and remembers it.";
    let cases = cases.collect();
    Ok(session.report("products", cases, vec![note.into()]))
}

/// Libtorch's time and those of our kernels, beside what reading the weights takes.
fn lines(name: &str, case: &Case, trials: &[&Trial], rates: &Rates) -> Vec<Line> {
    let (width, depth) = (case.shape.width as f64, case.shape.depth as f64);
    let mut work = Work::default();
    work.add(2.0 * case.rows() as f64 * width * depth, 2.0 * width * depth);
    let need = rates.need(&work);
    let group = format!("{name}: {case}");
    let line = |way: &str, microseconds: Vec<f64>| {
        let seconds: Vec<f64> = microseconds.iter().map(|time| time / 1e6).collect();
        Line::times(&group, way, Unit::Microseconds, &seconds, Some(need))
    };
    let libtorch = line("libtorch", trials.iter().map(|trial| trial.libtorch).collect());
    let own = trials[0].ways.keys().filter_map(|way| {
        let times: Vec<f64> =
            trials.iter().filter_map(|trial| trial.ways.get(way).copied()).collect();
        (times.len() == trials.len()).then(|| line(way, times))
    });
    [libtorch].into_iter().chain(own).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use onpolicy_engine::cuda::{
        Element,
        product::{Output, Shape},
    };

    #[test]
    fn times_stand_beside_the_bytes_of_the_weights() {
        let shape = Shape {
            element: Element::Bf16,
            columns: 64,
            width: 1000,
            depth: 500,
            output: Output::Plain,
        };
        let case = Case { shape, single: false };
        let trial = |libtorch, own: &[(&str, f64)]| Trial {
            libtorch,
            ways: own.iter().map(|&(name, time)| (name.to_string(), time)).collect(),
        };
        let trials = [trial(4.0, &[("a", 2.0), ("b", 9.0)]), trial(8.0, &[("a", 2.0)])];
        let rates = Rates { ours_gflops: 0.0, libtorch_gflops: 1e6, read_gbs: 1000.0 };
        let lines = lines("q, k, v", &case, &[&trials[0], &trials[1]], &rates);
        let seen: Vec<_> = lines.iter().map(|line| (&line.name[..], line.median)).collect();
        // What failed in one run is not shown.
        assert_eq!(seen, [("libtorch", 6.0), ("a", 2.0)]);
        assert_eq!(lines[0].group, "q, k, v: 64 rows by bf16 1000 x 500");
        // 1 MB at 1000 GB/s.
        let reached = lines[1].roofline.expect("bytes are known").reached;
        assert!((reached - 0.5).abs() < 1e-9, "{reached}");
    }
}
