//! A matrix of labels as a heat map.

use maud::Markup;
use plotters::element::{Rectangle, Text};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color, FontTransform};

use super::labels::Matrix;
use super::svg::{GRID, HEAT, INK, ON_HEAT, draw, plot_error, px, text};
use crate::error::Result;

/// Width of the plot, pixels.
const WIDTH: u32 = 420;
/// Room for a character of a name.
const CHARACTER: f64 = 6.6;
/// Room for the words beside and below the names.
const WORDS: f64 = 20.0;
/// Up to so many classes have their share written in the cell.
const WITH_NUMBERS: usize = 14;
/// Up to so many classes have their names beside the cells.
const WITH_NAMES: usize = 30;

/// The first characters of a name, as many as there is room for.
fn short(name: &str) -> String {
    const MOST: usize = 13;
    match name.chars().count() > MOST {
        true => name.chars().take(MOST - 1).chain(['…']).collect(),
        false => name.to_string(),
    }
}

/// Rows are given labels, columns the labels that `columns` names; a cell's colour is its share of the row.
///
/// # Errors
/// When the plotting crate fails.
pub fn heat_map(matrix: &Matrix, title: &str, columns: &str) -> Result<Markup> {
    let n = matrix.names.len();
    let longest = matrix.names.iter().map(|name| short(name).chars().count()).max().unwrap_or(0);
    // The same beside the rows and below the columns.
    let names = if n <= WITH_NAMES { 8.0 + CHARACTER * longest as f64 } else { 8.0 };
    let left = WORDS + names;
    let side = f64::from(WIDTH) - left - 2.0;
    let cell = side / n.max(1) as f64;
    let size = [WIDTH, (side + names + WORDS + 4.0).ceil() as u32];
    let description = format!(
        "Heat map of {n} by {n} classes. Rows: given label. Columns: {columns}. {} of {} labels agree.",
        matrix.agreeing(),
        matrix.total()
    );
    draw(size, "plot", title, &description, |root| {
        let put = |words: &str, x: f64, y: f64, style| {
            root.draw(&Text::new(words.to_string(), (px(x), px(y)), style)).map_err(plot_error)
        };
        for (i, name) in matrix.names.iter().enumerate() {
            let centre = (i as f64 + 0.5) * cell;
            if n <= WITH_NAMES {
                let size = cell.clamp(8.0, 11.0);
                let style = text(size, INK).pos(Pos::new(HPos::Right, VPos::Center));
                put(&short(name), left - 5.0, 1.0 + centre, style.clone())?;
                put(&short(name), left + centre, side + 7.0, style.transform(FontTransform::Rotate270))?;
            }
            for j in 0..n {
                let share = matrix.share(i, j);
                let at = |j: usize, i: usize| (px(left + j as f64 * cell), px(1.0 + i as f64 * cell));
                let corners = [at(j, i), at(j + 1, i + 1)];
                if share > 0.0 {
                    root.draw(&Rectangle::new(corners, HEAT.mix(share).filled())).map_err(plot_error)?;
                }
                if n <= WITH_NUMBERS && share >= 0.005 {
                    let ink = if share > 0.5 { ON_HEAT } else { INK };
                    let style = text(10.5, ink).pos(Pos::new(HPos::Center, VPos::Center));
                    put(&format!("{:.0}", 100.0 * share), left + (j as f64 + 0.5) * cell, 1.0 + centre, style)?;
                }
            }
        }
        let frame = [(px(left), px(1.0)), (px(left + side), px(1.0 + side))];
        root.draw(&Rectangle::new(frame, GRID.stroke_width(px(1.0) as u32))).map_err(plot_error)?;
        let middle = text(12.0, INK).pos(Pos::new(HPos::Center, VPos::Center));
        put(columns, left + side / 2.0, side + names + WORDS - 6.0, middle.clone())?;
        put("given label", 8.0, side / 2.0, middle.transform(FontTransform::Rotate270))
    })
}
