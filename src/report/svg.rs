//! What all plots share: sizes, colours, and the way from the plotting crate's SVG to one inside a page.

use maud::{Markup, PreEscaped, html};
use plotters::coord::Shift;
use plotters::drawing::DrawingArea;
use plotters::prelude::{IntoDrawingArea, RGBColor, SVGBackend};
use plotters::style::{IntoFont, TextStyle};

use crate::error::{Error, Result};

/// Units of the drawing per pixel of the page: the crate draws at whole units, and half a pixel shows in a curve.
const SCALE: u32 = 4;

/// `n` pixels of the page, in units of the drawing.
pub(super) fn px(n: f64) -> i32 {
    (n * f64::from(SCALE)).round() as i32
}

/// Text and ticks; the style sheet replaces it, as it does all of these, by what suits a light or a dark page.
pub(super) const INK: RGBColor = RGBColor(0x55, 0x55, 0x55);
/// Grid lines.
pub(super) const GRID: RGBColor = RGBColor(0xDD, 0xDD, 0xDD);
/// Marks and reference lines.
pub(super) const MARK: RGBColor = RGBColor(0x88, 0x88, 0x88);
/// Cells of a heat map, more or less opaque.
pub(super) const HEAT: RGBColor = RGBColor(0x00, 0x72, 0xB2);
/// Numbers on an opaque cell.
pub(super) const ON_HEAT: RGBColor = RGBColor(0xFF, 0xFF, 0xFF);

/// Colours of curves on a light and on a dark page, told apart by colour-blind readers too (after Okabe and Ito).
pub(super) const PALETTE: [[&str; 2]; 7] = [
    ["#C44E00", "#F28E52"],
    ["#008A63", "#35C79C"],
    ["#0069B4", "#62B3F0"],
    ["#A8518A", "#DC94C4"],
    ["#7A6A00", "#D6C440"],
    ["#3D3DA8", "#9C9CF5"],
    ["#5B5B5B", "#B5B5B5"],
];

/// Colour number `i` of the palette, that of a light page.
pub(super) fn colour(i: usize) -> RGBColor {
    let hex = PALETTE[i % PALETTE.len()][0];
    let part = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap_or(0);
    RGBColor(part(1), part(3), part(5))
}

/// The rules that give curves and their keys the palette's colours.
pub(super) fn palette_css() -> String {
    let rules = |mode: usize| -> String {
        let rule = |(i, pair): (usize, &[&str; 2])| {
            let (drawn, shown) = (pair[0], pair[mode]);
            format!(
                ".c{i}{{--c:{shown}}}svg [stroke=\"{drawn}\"]{{stroke:{shown}}}svg [fill=\"{drawn}\"]{{fill:{shown}}}"
            )
        };
        PALETTE.iter().enumerate().map(rule).collect()
    };
    format!("{}\n@media (prefers-color-scheme:dark){{{}}}\n", rules(0), rules(1))
}

/// Text of `size` pixels.
pub(super) fn text(size: f64, colour: RGBColor) -> TextStyle<'static> {
    // The crate writes the size of a font of its own times 1/1.24.
    use plotters::style::Color;
    ("sans-serif", size * 1.24 * f64::from(SCALE)).into_font().color(&colour.to_rgba())
}

/// Anything the crate may complain about.
pub(super) fn plot_error(error: impl std::fmt::Display) -> Error {
    Error::usage(format_args!("report: plot: {error}"))
}

/// Draws into an area of `width`×`height` pixels and gives the plot as markup with a title and a description for those
/// who do not see it. `class` is for the style sheet.
pub(super) fn draw(
    [width, height]: [u32; 2],
    class: &str,
    title: &str,
    description: &str,
    paint: impl FnOnce(&DrawingArea<SVGBackend<'_>, Shift>) -> Result<()>,
) -> Result<Markup> {
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, (width * SCALE, height * SCALE)).into_drawing_area();
        paint(&root)?;
        root.present().map_err(plot_error)?;
    }
    // The element itself is written anew: a size that fits the page, and no name space, which HTML does not need.
    let inner = text.split_once('>').map_or("", |(_, rest)| rest).trim_end().trim_end_matches("</svg>");
    let view = format!("0 0 {} {}", width * SCALE, height * SCALE);
    let limit = format!("max-width:{width}px");
    Ok(html! {
        svg class=(class) viewBox=(view) style=(limit) role="img" aria-label=(title) {
            title { (title) }
            desc { (description) }
            (PreEscaped(inner))
        }
    })
}
