//! Draws panels, two beside each other.

use super::{
    PlotError,
    axis::Axis,
    panel::{Layer, Panel, Point, Shape},
};
use plotters::{
    coord::{
        Shift,
        ranged1d::{KeyPointHint, NoDefaultFormatting, ValueFormatter},
    },
    element::DashedPathElement,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};
use std::{ops::Range, path::Path, sync::OnceLock};

/// Size of one panel, in pixels.
const PANEL: (u32, u32) = (900, 600);
const FONT: &str = "sans-serif";
const INK: RGBColor = RGBColor(40, 40, 40);
const GRID: RGBColor = RGBColor(226, 226, 226);
/// With more points than this, a line has no markers.
const MARKED: usize = 40;
/// Left edge of title and legend, in pixels.
const LEFT: i32 = 24;
/// Top of the legend and height of its rows, in pixels.
const LEGEND_TOP: i32 = 58;
const LEGEND_ROW: i32 = 30;
/// Width of the sample of a line in the legend, in pixels.
const SWATCH: i32 = 34;

type Area<'a, DB> = DrawingArea<DB, Shift>;
type Coord = Cartesian2d<Axis, Axis>;

/// Draws the panels into a file; its extension names the format.
pub(super) fn save(panels: &[Panel], path: &Path) -> Result<(), PlotError> {
    let failed = |reason: String| PlotError::Draw { path: path.into(), reason };
    register_font().map_err(|reason| failed(reason.into()))?;
    let size = (2 * PANEL.0, PANEL.1 * panels.len().div_ceil(2) as u32);
    let extension = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
    match extension.as_deref() {
        Some("svg") => draw(SVGBackend::new(path, size), panels).map_err(failed),
        Some("png") => draw(BitMapBackend::new(path, size), panels).map_err(failed),
        _ => Err(PlotError::Format(path.into())),
    }
}

/// Gives plotters a font of our own, once.
fn register_font() -> Result<(), &'static str> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    let font = epaint_default_fonts::UBUNTU_LIGHT;
    let done = || plotters::style::register_font(FONT, FontStyle::Normal, font).is_ok();
    if *REGISTERED.get_or_init(done) { Ok(()) } else { Err("the built-in font is broken") }
}

fn draw<DB: DrawingBackend>(backend: DB, panels: &[Panel]) -> Result<(), String> {
    let root = backend.into_drawing_area();
    let fault = |e: DrawingAreaErrorKind<DB::ErrorType>| e.to_string();
    root.fill(&WHITE).map_err(fault)?;
    let areas = root.split_evenly((panels.len().div_ceil(2), 2));
    for (area, panel) in areas.iter().zip(panels) {
        draw_panel(area, panel).map_err(fault)?;
    }
    root.present().map_err(fault)
}

type Drawn<DB> = Result<(), DrawingAreaErrorKind<<DB as DrawingBackend>::ErrorType>>;

fn draw_panel<DB: DrawingBackend>(area: &Area<DB>, panel: &Panel) -> Drawn<DB> {
    area.draw_text(&panel.title, &font(32), (LEFT, 16))?;
    let legend_end = draw_legend(area, &panel.layers)?;
    let (_, chart_area) = area.split_vertically(legend_end);
    let right = panel.right.as_ref().unwrap_or(&panel.y);
    let mut chart = ChartBuilder::on(&chart_area)
        .margin_top(12)
        .margin_bottom(10)
        .margin_right(30)
        .margin_left(16)
        .x_label_area_size(62)
        .y_label_area_size(92)
        .right_y_label_area_size(if panel.right.is_some() { 92 } else { 0 })
        .build_cartesian_2d(panel.x.clone(), panel.y.clone())?
        .set_secondary_coord(panel.x.clone(), right.clone());
    chart
        .configure_mesh()
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(INK)
        .label_style(font(20))
        .axis_desc_style(font(22))
        .x_desc(&panel.x.label)
        .y_desc(&panel.y.label)
        .draw()?;
    if let Some(right) = &panel.right {
        chart
            .configure_secondary_axes()
            .axis_style(INK)
            .label_style(font(20))
            .axis_desc_style(font(22))
            .y_desc(&right.label)
            .draw()?;
    }
    let (left, right) = (chart.plotting_area(), chart.secondary_plotting_area());
    for layer in &panel.layers {
        draw_layer(if layer.right { right } else { left }, layer)?;
    }
    if panel.layers.iter().all(Layer::is_empty) { draw_note(&chart_area, panel) } else { Ok(()) }
}

/// Says in the middle of an empty chart why it is empty.
fn draw_note<DB: DrawingBackend>(area: &Area<DB>, panel: &Panel) -> Drawn<DB> {
    let (width, height) = area.dim_in_pixel();
    let center = font(24).pos(Pos::new(HPos::Center, VPos::Center));
    area.draw_text(&panel.if_empty, &center, (width as i32 / 2, height as i32 / 2))
}

fn draw_layer<DB: DrawingBackend>(area: &DrawingArea<DB, Coord>, layer: &Layer) -> Drawn<DB> {
    let stroke = layer.color.stroke_width(3);
    match &layer.shape {
        Shape::Line(points) => {
            area.draw(&PathElement::new(points.clone(), stroke))?;
            if points.len() <= MARKED { draw_dots(area, points, layer.color) } else { Ok(()) }
        }
        Shape::Dashed(points) => {
            area.draw(&DashedPathElement::new(points.iter().copied(), 10, 7, stroke))?;
            // A single point has no dashes: draw a ring, which shows a dot under it.
            match points[..] {
                [only] => area.draw(&Circle::new(only, 9, stroke)),
                _ => Ok(()),
            }
        }
        Shape::Dots(points) => draw_dots(area, points, layer.color),
        Shape::Bars(bars) => bars.iter().try_for_each(|&(low, high)| {
            area.draw(&Rectangle::new([low, high], layer.color.filled()))
        }),
    }
}

fn draw_dots<DB: DrawingBackend>(
    area: &DrawingArea<DB, Coord>,
    points: &[Point],
    color: RGBColor,
) -> Drawn<DB> {
    points.iter().try_for_each(|&point| area.draw(&Circle::new(point, 5, color.filled())))
}

/// Draws the legend in rows above the chart, where it covers nothing; returns the row it ends in.
fn draw_legend<DB: DrawingBackend>(
    area: &Area<DB>,
    layers: &[Layer],
) -> Result<i32, DrawingAreaErrorKind<DB::ErrorType>> {
    let width = area.dim_in_pixel().0 as i32;
    let (mut x, mut y) = (LEFT, LEGEND_TOP);
    for layer in layers {
        let label = font(21).pos(Pos::new(HPos::Left, VPos::Center));
        let needed = SWATCH + 10 + area.estimate_text_size(&layer.label, &label)?.0 as i32 + 26;
        if x > LEFT && x + needed > width {
            (x, y) = (LEFT, y + LEGEND_ROW);
        }
        draw_swatch(area, layer, (x, y + 10))?;
        area.draw_text(&layer.label, &label, (x + SWATCH + 10, y + 10))?;
        x += needed;
    }
    Ok(y + LEGEND_ROW)
}

fn draw_swatch<DB: DrawingBackend>(
    area: &Area<DB>,
    layer: &Layer,
    (x, y): (i32, i32),
) -> Drawn<DB> {
    let line = |from, to| PathElement::new([(from, y), (to, y)], layer.color.stroke_width(3));
    match layer.shape {
        Shape::Line(_) => area.draw(&line(x, x + SWATCH)),
        Shape::Dashed(_) => {
            area.draw(&line(x, x + SWATCH * 2 / 5))?;
            area.draw(&line(x + SWATCH * 3 / 5, x + SWATCH))
        }
        Shape::Dots(_) => area.draw(&Circle::new((x + SWATCH / 2, y), 6, layer.color.filled())),
        Shape::Bars(_) => {
            area.draw(&Rectangle::new([(x, y - 8), (x + SWATCH, y + 8)], layer.color.filled()))
        }
    }
}

fn font(size: u32) -> TextStyle<'static> {
    (FONT, size).into_font().color(&INK)
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        let share = (value - self.range.start) / (self.range.end - self.range.start);
        from + (share * f64::from(to - from)).round() as i32
    }

    fn key_points<H: KeyPointHint>(&self, hint: H) -> Vec<f64> {
        if hint.weight().allow_light_points() { Vec::new() } else { self.ticks.clone() }
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        self.format(*value)
    }
}
