//! A report as a person reads it.

use super::report::{Line, Report};
use std::fmt::{Display, Formatter, Result};

/// Cells of the table's head; the first column is left-aligned, the others right-aligned.
const HEAD: [&str; 9] =
    ["", "median", "min", "max", "", "arithmetic", "memory", "roofline", "reached"];

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        self.heading(f)?;
        let rows: Vec<[String; 9]> = self.lines.iter().map(cells).collect();
        let mut widths = HEAD.map(|text| text.chars().count());
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut group = None;
        for (line, row) in self.lines.iter().zip(&rows) {
            if group != Some(&line.group) {
                group = Some(&line.group);
                writeln!(f, "\n{}", line.group)?;
                write_row(f, &HEAD.map(String::from), &widths)?;
            }
            write_row(f, row, &widths)?;
        }
        if !self.notes.is_empty() {
            writeln!(f)?;
        }
        self.notes.iter().try_for_each(|note| writeln!(f, "{note}"))
    }
}

impl Report {
    fn heading(&self, f: &mut Formatter<'_>) -> Result {
        let Self { model, machine, versions, settings, rates, .. } = self;
        writeln!(
            f,
            "bench {}: {}, {:.1} M parameters, {:.3} GFLOP a token; seed {}, {} runs after {}",
            self.bench,
            model.name,
            model.parameters as f64 / 1e6,
            model.gflop_per_token,
            settings.seed,
            settings.runs,
            settings.warmup,
        )?;
        writeln!(
            f,
            "{}{}, {} cores, {} MiB, Linux {}, load {:.2}; {} threads; onpolicy {}, torch {}, rustc {}",
            machine.gpu.as_ref().map(|gpu| format!("{gpu}; ")).unwrap_or_default(),
            machine.cpu,
            machine.cores,
            machine.memory_mib,
            machine.kernel,
            machine.load,
            settings.threads,
            versions.onpolicy,
            versions.torch.as_deref().unwrap_or("unknown"),
            versions.rustc,
        )?;
        writeln!(
            f,
            "measured in this run: matrix products {:.0} GFLOP/s (ours {:.0}, libtorch's {:.0}), \
             reading memory {:.1} GB/s",
            rates.gflops(),
            rates.ours_gflops,
            rates.libtorch_gflops,
            rates.read_gbs,
        )
    }
}

fn cells(line: &Line) -> [String; 9] {
    let value = |value: f64| number(value);
    let [arithmetic, memory, best, reached] = match &line.roofline {
        None => [(); 4].map(|()| String::new()),
        Some(roofline) => {
            let need = &roofline.need;
            let part = |amount: f64, unit: &str, seconds: f64| {
                format!("{} {unit}, {} s", number(amount), number(seconds))
            };
            [
                part(need.gflop, "GFLOP", need.arithmetic_seconds),
                part(need.gbytes, "GB", need.memory_seconds),
                value(roofline.value),
                format!("{:.1} %", 100.0 * roofline.reached),
            ]
        }
    };
    [
        format!("  {}", line.name),
        value(line.median),
        value(line.min),
        value(line.max),
        line.unit.clone(),
        arithmetic,
        memory,
        best,
        reached,
    ]
}

/// About four digits.
fn number(value: f64) -> String {
    let decimals = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        0.0 => 0,
        _ => 4,
    };
    format!("{value:.decimals$}")
}

fn write_row(f: &mut Formatter<'_>, cells: &[String; 9], widths: &[usize; 9]) -> Result {
    let mut row = format!("{:width$}", cells[0], width = widths[0]);
    for (index, (cell, width)) in cells.iter().zip(widths).enumerate().skip(1) {
        // The unit stands behind its number, left-aligned.
        row += &if index == 4 { format!(" {cell:width$}") } else { format!("  {cell:>width$}") };
    }
    writeln!(f, "{}", row.trim_end())
}

#[cfg(test)]
mod tests {
    use super::super::{report::Unit, roofline::Need};
    use super::*;

    #[test]
    fn groups_columns_and_notes() {
        let need = Need {
            gflop: 1234.5,
            gbytes: 12.0,
            arithmetic_seconds: 2.5,
            memory_seconds: 0.3,
            seconds: 2.5,
        };
        let unit = Unit::PerSecond(1000.0, "tokens");
        let lines = vec![
            Line::times("W2", "in process", unit, &[5.0, 4.0], Some(need)),
            Line::values("W2", "peak memory", "MiB", vec![812.25]),
            Line::times("W9", "other", Unit::Seconds, &[0.01234], None),
        ];
        let notes = vec!["a note".to_string()];
        let report = Report { bench: "rollout".into(), lines, notes, ..Report::default() };
        let text = report.to_string();
        let body = text.split_once("\n\n").expect("a heading").1;
        let want = "\
W2
               median     min     max                   arithmetic             memory  roofline  reached
  in process      225     200     250 tokens/s  1234 GFLOP, 2.50 s  12.0 GB, 0.3000 s       400   55.6 %
  peak memory     812     812     812 MiB

W9
               median     min     max                   arithmetic             memory  roofline  reached
  other        0.0123  0.0123  0.0123 s

a note
";
        assert_eq!(body, want);
    }

    #[test]
    fn numbers_have_about_four_digits() {
        let written = [1234.5, 99.95, 5.0, 0.5, 0.0, 0.00012].map(number);
        assert_eq!(written, ["1234", "100.0", "5.00", "0.5000", "0", "0.0001"]);
    }
}
