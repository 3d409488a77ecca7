//! Curves over epochs.

use maud::{Markup, html};
use plotters::chart::ChartBuilder;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::element::{PathElement, Polygon, Text};
use plotters::series::{DashedLineSeries, LineSeries};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color, ShapeStyle};

use super::svg::{GRID, INK, MARK, colour, draw, plot_error, px, text};
use crate::error::Result;

/// A curve.
#[derive(Clone, Debug)]
pub struct Line {
    /// What the key calls it.
    pub label: String,
    /// Number of its colour.
    pub colour: usize,
    /// Dashed rather than solid.
    pub dashed: bool,
    /// x, y, and how far a band reaches to either side of y.
    pub points: Vec<(f64, f64, f64)>,
}

/// Curves over epochs.
#[derive(Clone, Debug)]
pub struct Chart {
    /// What it shows.
    pub title: String,
    /// The same at length, for those who do not see it.
    pub description: String,
    /// Of the vertical axis.
    pub y_label: String,
    /// The curves.
    pub lines: Vec<Line>,
    /// Where later iterations begin, with their numbers.
    pub starts: Vec<(usize, usize)>,
    /// A horizontal line and its words.
    pub level: Option<(f64, String)>,
}

/// Size and class of a plot that takes the page's width on a wide screen.
const WIDE: ([u32; 2], &str) = ([880, 400], "plot wide");
/// Its stand-in on a narrow screen.
const NARROW: ([u32; 2], &str) = ([380, 300], "plot narrow");
/// A plot that shares the width with another one.
const HALF: ([u32; 2], &str) = ([420, 290], "plot");

/// Round numbers from at or below `low` to at or above `high`, about `wanted` of them, and the decimals that they need.
fn ticks(low: f64, high: f64, wanted: f64) -> (Vec<f64>, usize) {
    let raw = ((high - low) / wanted).max(1e-9);
    let ten = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0].into_iter().map(|n| n * ten).find(|step| *step >= raw).unwrap_or(10.0 * ten);
    let (from, to) = ((low / step + 1e-9).floor() as i64, (high / step - 1e-9).ceil() as i64);
    let decimals = (-(step.log10() + 1e-9).floor()).max(0.0) as usize;
    ((from..=to.max(from + 1)).map(|n| n as f64 * step).collect(), decimals)
}

/// An axis from one end to the other, with ticks at given places.
struct Axis([f64; 2], Vec<f64>);

impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        let [low, high] = self.0;
        from + (f64::from(to - from) * (value - low) / (high - low)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.1.clone()
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.0[0]..self.0[1]
    }
}

impl Chart {
    /// The plot with its key, in one size for wide screens and one for narrow ones.
    ///
    /// # Errors
    /// When the plotting crate fails.
    pub fn full(&self) -> Result<Markup> {
        Ok(html! { (self.key()) (self.svg(WIDE)?) (self.svg(NARROW)?) })
    }

    /// The plot with its key, of half the width.
    ///
    /// # Errors
    /// When the plotting crate fails.
    pub fn half(&self) -> Result<Markup> {
        Ok(html! { (self.key()) (self.svg(HALF)?) })
    }

    /// Which curve is which.
    fn key(&self) -> Markup {
        html! {
            ul.key {
                @for line in &self.lines {
                    @let class = format!("c{}{}", line.colour, if line.dashed { " dashed" } else { "" });
                    li class=(class) { (line.label) }
                }
            }
        }
    }

    fn svg(&self, ([width, height], class): ([u32; 2], &str)) -> Result<Markup> {
        let points = || self.lines.iter().flat_map(|line| &line.points);
        let last = points().map(|p| p.0).fold(2.0, f64::max);
        let low = points().map(|p| p.1 - p.2).fold(f64::INFINITY, f64::min);
        let high = points().map(|p| p.1 + p.2).chain(self.level.iter().map(|l| l.0)).fold(f64::NEG_INFINITY, f64::max);
        let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
        let (y_ticks, decimals) = ticks(low, high, if height > 350 { 7.0 } else { 5.0 });
        let (bottom, top) = (y_ticks[0], y_ticks[y_ticks.len() - 1]);
        let x_ticks: Vec<f64> = ticks(1.0, last, if width > 500 { 12.0 } else { 6.0 }).0;
        // The first epoch has a tick, and no other so near that their numbers touch.
        let near = (x_ticks[1] - x_ticks[0]) * 0.7;
        let fits = |x: &f64| *x >= 1.0 + near && *x <= last && x.fract() == 0.0;
        let x_ticks: Vec<f64> = std::iter::once(1.0).chain(x_ticks.into_iter().filter(fits)).collect();
        draw([width, height], class, &self.title, &self.description, |root| {
            let mut chart = ChartBuilder::on(root)
                .margin_top(px(18.0))
                .margin_right(px(14.0))
                .x_label_area_size(px(40.0))
                .y_label_area_size(px(52.0))
                .build_cartesian_2d(Axis([1.0, last], x_ticks.clone()), Axis([bottom, top], y_ticks.clone()))
                .map_err(plot_error)?;
            chart
                .configure_mesh()
                .disable_x_mesh()
                .bold_line_style(stroke(GRID.to_rgba(), 1.0))
                .light_line_style(GRID.mix(0.0))
                .axis_style(stroke(MARK.to_rgba(), 1.0))
                .set_all_tick_mark_size(px(4.0))
                .x_labels(x_ticks.len())
                .y_labels(y_ticks.len())
                .x_label_formatter(&|x| format!("{x:.0}"))
                .y_label_formatter(&|y| format!("{y:.decimals$}"))
                .x_desc("epoch")
                .y_desc(&self.y_label)
                .label_style(text(12.0, INK))
                .axis_desc_style(text(12.0, INK))
                .draw()
                .map_err(plot_error)?;
            for (x, iteration) in &self.starts {
                let x = *x as f64 - 0.5;
                let line =
                    DashedLineSeries::new([(x, bottom), (x, top)], px(2.0), px(3.0), stroke(MARK.to_rgba(), 1.0));
                chart.draw_series(line).map_err(plot_error)?;
                let words = format!("iteration {iteration}");
                let style = text(11.0, INK).pos(Pos::new(HPos::Center, VPos::Bottom));
                chart.draw_series([Text::new(words, (x, top), style)]).map_err(plot_error)?;
            }
            if let Some((y, words)) = &self.level {
                chart
                    .draw_series(DashedLineSeries::new(
                        [(1.0, *y), (last, *y)],
                        px(6.0),
                        px(4.0),
                        stroke(MARK.to_rgba(), 1.0),
                    ))
                    .map_err(plot_error)?;
                let style = text(11.0, INK).pos(Pos::new(HPos::Left, VPos::Bottom));
                chart.draw_series([Text::new(format!(" {words}"), (1.0, *y), style)]).map_err(plot_error)?;
            }
            for line in &self.lines {
                let shade = colour(line.colour).mix(0.16).filled();
                let upper = line.points.iter().map(|(x, y, band)| (*x, y + band));
                let lower = line.points.iter().rev().map(|(x, y, band)| (*x, y - band));
                if line.points.iter().any(|p| p.2 > 0.0) {
                    chart
                        .draw_series([Polygon::new(upper.chain(lower).collect::<Vec<_>>(), shade)])
                        .map_err(plot_error)?;
                }
            }
            // Solid lines last: they are what the plot is about.
            let ordered = self.lines.iter().filter(|l| l.dashed).chain(self.lines.iter().filter(|l| !l.dashed));
            for line in ordered {
                let points: Vec<(f64, f64)> = line.points.iter().map(|(x, y, _)| (*x, *y)).collect();
                let style = stroke(colour(line.colour).to_rgba(), if line.dashed { 1.4 } else { 2.2 });
                match line.dashed {
                    true => {
                        chart.draw_series(DashedLineSeries::new(points.clone(), px(5.0), px(4.0), style)).map(|_| ())
                    }
                    false => chart.draw_series([PathElement::new(points.clone(), style)]).map(|_| ()),
                }
                .map_err(plot_error)?;
                if points.len() == 1 {
                    let dot = LineSeries::new(points, style.filled()).point_size(px(3.0) as u32);
                    chart.draw_series(dot).map_err(plot_error)?;
                }
            }
            Ok(())
        })
    }
}

fn stroke(colour: plotters::style::RGBAColor, pixels: f64) -> ShapeStyle {
    ShapeStyle { color: colour, filled: false, stroke_width: px(pixels) as u32 }
}
