//! Results as bars: one panel for every group and unit.

use super::report::{Line, Report};
use anyhow::{Context, anyhow, bail, ensure};
use clap::Args;
use plotters::{
    coord::Shift,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};
use std::path::{Path, PathBuf};

const FONT: &str = "sans-serif";
const INK: RGBColor = RGBColor(40, 40, 40);
/// Okabe and Ito's blue, orange and green, which people of all kinds of colour vision can tell apart.
const COLORS: [RGBColor; 3] = [RGBColor(0, 114, 178), RGBColor(230, 159, 0), RGBColor(0, 158, 115)];
const LIMIT: RGBColor = RGBColor(213, 94, 0);
/// In pixels: the picture's width, where bars begin, how long the longest is, heights.
const WIDTH: u32 = 1480;
const LEFT: i32 = 430;
const LENGTH: f64 = 640.0;
const ROW: i32 = 40;
const TITLE: i32 = 64;
const MARGIN: i32 = 24;

/// `onpolicy bench plot`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Files of results, as --json writes them
    #[arg(required = true, value_name = "RESULTS.json")]
    results: Vec<PathBuf>,
    /// The picture (.svg or .png)
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
}

/// Draws files of results.
///
/// # Errors
/// A file cannot be read or written.
pub fn run(arguments: &Arguments) -> Result<(), anyhow::Error> {
    let named = |path: &PathBuf| {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Ok((name, Report::read(path)?))
    };
    let reports: Vec<_> =
        arguments.results.iter().map(named).collect::<Result<_, anyhow::Error>>()?;
    draw(&reports, &arguments.out)?;
    println!("{}", arguments.out.display());
    Ok(())
}

/// Bars that compare with each other.
#[derive(Debug, PartialEq)]
struct Panel<'a> {
    title: String,
    unit: &'a str,
    /// What each is called, and which report it is from.
    bars: Vec<(String, usize, &'a Line)>,
}

/// Draws reports, each with a name that tells them apart; the extension of `path` names the format.
///
/// # Errors
/// Nothing to draw, another extension, or a file that cannot be written.
pub fn draw(reports: &[(String, Report)], path: &Path) -> Result<(), anyhow::Error> {
    let panels = panels(reports);
    ensure!(!panels.is_empty(), "there are no results to draw");
    let font = epaint_default_fonts::UBUNTU_LIGHT;
    plotters::style::register_font(FONT, FontStyle::Normal, font)
        .map_err(|_| anyhow!("the built-in font is broken"))?;
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let height: i32 = panels.iter().map(Panel::height).sum::<i32>() + 2 * MARGIN;
    let size = (WIDTH, height as u32);
    let drawn = match path.extension().and_then(|extension| extension.to_str()) {
        Some("svg") => paint(SVGBackend::new(path, size), &panels),
        Some("png") => paint(BitMapBackend::new(path, size), &panels),
        _ => bail!("{}: the name must end in .svg or .png", path.display()),
    };
    drawn.map_err(anyhow::Error::msg).with_context(|| format!("cannot draw {}", path.display()))
}

fn panels(reports: &[(String, Report)]) -> Vec<Panel<'_>> {
    let mut panels: Vec<Panel<'_>> = Vec::new();
    for (number, (_, report)) in reports.iter().enumerate() {
        for line in &report.lines {
            let title = format!("{} - {}", report.bench, line.group);
            let bar = (line.name.clone(), number, line);
            match panels.iter_mut().find(|p| p.title == title && p.unit == line.unit) {
                Some(panel) => panel.bars.push(bar),
                None => panels.push(Panel { title, unit: &line.unit, bars: vec![bar] }),
            }
        }
    }
    // Where results of several files meet, each says which it is from.
    for panel in &mut panels {
        if panel.bars.iter().any(|bar| bar.1 != panel.bars[0].1) {
            let bars = panel.bars.iter_mut();
            bars.for_each(|(name, number, _)| *name += &format!(" ({})", reports[*number].0));
        }
    }
    panels
}

type Area<DB> = DrawingArea<DB, Shift>;
type Drawn<DB> = Result<(), DrawingAreaErrorKind<<DB as DrawingBackend>::ErrorType>>;

fn paint<DB: DrawingBackend>(backend: DB, panels: &[Panel<'_>]) -> Result<(), String> {
    let area = backend.into_drawing_area();
    let fault = |error: DrawingAreaErrorKind<DB::ErrorType>| error.to_string();
    area.fill(&WHITE).map_err(fault)?;
    let mut top = MARGIN;
    for panel in panels {
        panel.paint(&area, top).map_err(fault)?;
        top += panel.height();
    }
    area.present().map_err(fault)
}

impl Panel<'_> {
    fn height(&self) -> i32 {
        TITLE + ROW * self.bars.len() as i32 + MARGIN
    }

    fn paint<DB: DrawingBackend>(&self, area: &Area<DB>, top: i32) -> Drawn<DB> {
        area.draw_text(&self.title, &text(24, HPos::Left), (MARGIN, top + 16))?;
        let limits = self.bars.iter().filter_map(|(_, _, line)| Some(line.roofline?.value));
        let values = self.bars.iter().map(|(_, _, line)| line.max);
        let largest = limits.chain(values).filter(|v| v.is_finite()).fold(0.0, f64::max);
        let x = |value: f64| LEFT + (LENGTH * value / largest.max(f64::MIN_POSITIVE)) as i32;
        for (row, (name, report, line)) in self.bars.iter().enumerate() {
            let middle = top + TITLE + ROW * row as i32 + ROW / 2;
            area.draw_text(name, &text(20, HPos::Right), (LEFT - 12, middle))?;
            let bar = [(LEFT, middle - 12), (x(line.median), middle + 12)];
            let color = COLORS[report % COLORS.len()];
            area.draw(&Rectangle::new(bar, color.filled()))?;
            let spread = vec![(x(line.min), middle), (x(line.max), middle)];
            area.draw(&PathElement::new(spread, INK.stroke_width(2)))?;
            let mut end = x(line.max.max(line.median));
            let mut says = format!("{} {}", written(line.median), self.unit);
            if let Some(roofline) = &line.roofline {
                let limit = x(roofline.value);
                let tick = vec![(limit, middle - 16), (limit, middle + 16)];
                area.draw(&PathElement::new(tick, LIMIT.stroke_width(3)))?;
                end = end.max(limit);
                says += &format!(", {:.0} % of the roofline", 100.0 * roofline.reached);
            }
            area.draw_text(&says, &text(20, HPos::Left), (end + 12, middle))?;
        }
        Ok(())
    }
}

fn text(size: u32, side: HPos) -> TextStyle<'static> {
    (FONT, size).into_font().color(&INK).pos(Pos::new(side, VPos::Center))
}

fn written(value: f64) -> String {
    let decimals = if value >= 100.0 {
        0
    } else if value >= 1.0 {
        1
    } else {
        3
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::super::{report::Unit, roofline::Need};
    use super::*;

    fn report(values: [f64; 2]) -> Report {
        let need = Some(Need { seconds: 0.5, ..Need::default() });
        let unit = Unit::PerSecond(100.0, "tokens");
        let lines = vec![
            Line::times("W2", "in process", unit, &[values[0], 2.0], need),
            Line::times("W2", "HTTP", unit, &[values[1]], None),
            Line::values("W2", "peak memory", "MiB", vec![800.0]),
        ];
        Report { bench: "rollout".into(), lines, ..Report::default() }
    }

    #[test]
    fn bars_of_one_group_and_unit_share_a_panel() {
        let one = [("a".to_string(), report([1.0, 3.0]))];
        let panels = super::panels(&one);
        assert_eq!(panels.iter().map(|panel| panel.bars.len()).collect::<Vec<_>>(), [2, 1]);
        assert_eq!(panels[0].bars[1].0, "HTTP");
        let two = [("a".to_string(), report([1.0, 3.0])), ("b".to_string(), report([2.0, 4.0]))];
        let panels = super::panels(&two);
        assert_eq!(panels.len(), 2);
        let other = Report { bench: "train".into(), ..report([1.0, 2.0]) };
        let apart = [two[0].clone(), ("c".to_string(), other)];
        assert!(super::panels(&apart).iter().all(|panel| !panel.bars[0].0.contains('(')));
        let names: Vec<&str> = panels[0].bars.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(names, ["in process (a)", "HTTP (a)", "in process (b)", "HTTP (b)"]);
    }

    #[test]
    fn pictures_say_what_was_measured() {
        let dir = tempfile::tempdir().expect("a folder");
        let reports = [("a".to_string(), report([1.0, 3.0]))];
        let svg = dir.path().join("new/bars.svg");
        draw(&reports, &svg).expect("drawn");
        let svg = std::fs::read_to_string(svg).expect("a picture");
        for text in ["rollout - W2", "in process", "800 MiB", "of the roofline"] {
            assert!(svg.contains(text), "{text} is missing");
        }
        let png = dir.path().join("bars.png");
        draw(&reports, &png).expect("drawn");
        assert_eq!(&std::fs::read(png).expect("a picture")[..4], b"\x89PNG");
        let refused = |reports: &[(String, Report)], name: &str| {
            draw(reports, &dir.path().join(name)).expect_err("refused").to_string()
        };
        assert!(refused(&reports, "bars.jpg").contains(".svg or .png"));
        assert!(refused(&[], "bars.png").contains("no results"));
    }
}
