//! The ROC curve as a picture in SVG.

use plotters::prelude::*;

use super::roc::Roc;
use crate::error::{Error, Result};

const CURVE: RGBColor = RGBColor(0, 95, 115);
const CALLED: RGBColor = RGBColor(178, 34, 34);

/// The curve with the point that `flagged`, (false positive rate, true positive rate), stands for, and its area.
///
/// # Errors
/// [`Error::Usage`] when it cannot be drawn.
pub fn roc_svg(roc: &Roc, flagged: (f64, f64)) -> Result<String> {
    let mut text = String::new();
    draw(&mut text, roc, flagged).map_err(|e| Error::usage(format_args!("the ROC curve: {e}")))?;
    Ok(text)
}

fn draw(text: &mut String, roc: &Roc, flagged: (f64, f64)) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(text, (520, 520)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(18)
        .caption(format!("Wrong labels found: area {:.3}", roc.auc()), ("sans-serif", 19))
        .x_label_area_size(44)
        .y_label_area_size(54)
        .build_cartesian_2d(0.0..1.0, 0.0..1.0)?;
    let label = ("sans-serif", 14);
    chart
        .configure_mesh()
        .x_desc("right labels called wrong (false positive rate)")
        .y_desc("wrong labels called wrong (recall)")
        .x_labels(6)
        .y_labels(6)
        .x_label_formatter(&|v| format!("{v:.1}"))
        .y_label_formatter(&|v| format!("{v:.1}"))
        .max_light_lines(1)
        .light_line_style(WHITE)
        .axis_desc_style(label)
        .label_style(("sans-serif", 12))
        .draw()?;
    let chance = ShapeStyle { color: BLACK.mix(0.3), filled: false, stroke_width: 1 };
    chart.draw_series(LineSeries::new([(0.0, 0.0), (1.0, 1.0)], chance))?;
    let curve = roc.points.iter().map(|p| (p.false_positive_rate, p.true_positive_rate));
    chart.draw_series(LineSeries::new(curve, CURVE.stroke_width(2)))?;
    chart.draw_series([Circle::new(flagged, 5, CALLED.filled())])?;
    let beside = (flagged.0 + 0.025, flagged.1 - 0.025);
    chart.draw_series([Text::new("flagged", beside, label.into_font().color(&CALLED))])?;
    root.present()?;
    Ok(())
}
