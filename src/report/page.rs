//! The page.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::chart::{Chart, Line};
use super::curves::{Group, Method, Network, Point, iteration_starts, phase_name, spread};
use super::heat::heat_map;
use super::labels::Matrix;
use super::read::Run;
use super::svg::palette_css;
use super::tables;
use crate::error::Result;

/// A curve's number from an epoch.
type Score = fn(&Point) -> Option<f64>;

/// The sections of a group: anchor and title.
const SECTIONS: [(&str, &str); 7] = [
    ("summary", "Summary"),
    ("accuracy", "Accuracy"),
    ("losses", "Losses"),
    ("confusion", "Labels"),
    ("filter", "Filter"),
    ("throughput", "Throughput"),
    ("configuration", "Configuration"),
];

/// The whole page.
///
/// # Errors
/// When the plotting crate fails.
pub(super) fn page(groups: &[Group]) -> Result<String> {
    let runs: usize = groups.iter().map(|group| group.runs.len()).sum();
    let title = match groups {
        [group] => format!("{}: {}", data_name(group), noise(group)),
        _ => format!("{runs} runs on {} settings of data and noise", groups.len()),
    };
    let mut articles = Vec::new();
    for (i, group) in groups.iter().enumerate() {
        articles.push(article(group, &format!("g{}-", i + 1), groups.len() > 1)?);
    }
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                // Even if a name got past the escaping: nothing is fetched, nothing is run.
                meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'";
                meta name="color-scheme" content="light dark";
                title { "mlnt report: " (title) }
                style { (PreEscaped(palette_css())) (PreEscaped(include_str!("style.css"))) }
            }
            body {
                header {
                    p.eyebrow { "mlnt report" }
                    h1 { (title) }
                    @if let [group] = groups { (about(group)) }
                    (contents(groups))
                }
                main { @for article in &articles { (article) } }
                footer {
                    p {
                        "Written by mlnt " (env!("CARGO_PKG_VERSION")) " from "
                        @for (i, run) in groups.iter().flat_map(|g| &g.runs).enumerate() {
                            @if i > 0 { ", " }
                            code { (run.path.display()) }
                        }
                        "."
                    }
                }
            }
        }
    };
    Ok(page.into_string())
}

fn contents(groups: &[Group]) -> Markup {
    html! {
        nav aria-label="Contents" {
            @for (i, group) in groups.iter().enumerate() {
                p {
                    @if groups.len() > 1 { a.group href=(format!("#g{}-", i + 1)) { (data_name(group)) ": " (noise(group)) } }
                    @for (id, name) in SECTIONS { a href=(format!("#g{}-{id}", i + 1)) { (name) } }
                }
            }
        }
    }
}

/// What the runs of a group read: the data's name without the folders above it.
fn data_name(group: &Group) -> String {
    let data = group.runs[0].setting("data");
    let name = data.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    match name {
        "" => "data unknown".to_string(),
        "sample" => "embedded sample".to_string(),
        name => name.to_string(),
    }
}

/// The realised share of wrong labels of the runs, as text.
fn realised(group: &Group) -> Option<String> {
    let rates: Vec<f64> = group.runs.iter().filter_map(|run| run.labels.as_ref()?.realised()).collect();
    let (low, high) = (rates.iter().copied().reduce(f64::min)?, rates.iter().copied().reduce(f64::max)?);
    let [low, high] = [low, high].map(|rate| format!("{:.1}", 100.0 * rate));
    Some(if low == high { format!("{low}\u{a0}%") } else { format!("{low} to {high}\u{a0}%") })
}

/// Kind and level of noise.
fn noise(group: &Group) -> String {
    let run = &group.runs[0];
    let wrong = match realised(group) {
        Some(text) => format!("{text} of the labels wrong"),
        None => "realised level unknown (no labels.csv)".to_string(),
    };
    match run.setting("noise").as_str() {
        "" => format!("noise unknown, {wrong}"),
        "none" => format!("labels as given, {wrong}"),
        kind => {
            let nominal = run
                .number("noise-rate")
                .map_or_else(String::new, |rate| format!(" nominal {}\u{a0}%,", short(100.0 * rate)));
            format!("{kind} noise,{nominal} {wrong}")
        }
    }
}

/// A number without needless digits.
fn short(number: f64) -> String {
    let text = format!("{number:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

/// The runs in a line, and what is missing of those that are not complete.
fn about(group: &Group) -> Markup {
    html! {
        p.about {
            @for (i, run) in group.runs.iter().enumerate() {
                @if i > 0 { " · " }
                b { (run.name) }
                @let seed = run.setting("seed");
                @if !seed.is_empty() { " (seed " (seed) ")" }
            }
        }
        @for run in group.runs.iter().filter(|run| !run.complete) {
            p.warning {
                b { "Not complete: " } (run.name) " "
                @match run.epochs.last() {
                    Some(last) => {
                        "stands after epoch " (last.epoch) " of " (phase_name(&last.phase))
                        @if let Some(i) = last.iteration.filter(|i| *i > 1) { ", iteration " (i) }
                        "."
                    }
                    None => { "has no finished epoch yet." }
                }
                " The page shows what there is; "
                code { "mlnt train --resume " (run.path.display()) }
                " goes on."
            }
        }
    }
}

fn article(group: &Group, anchor: &str, titled: bool) -> Result<Markup> {
    let bodies = [
        summary(group),
        accuracy(group)?,
        losses(group)?,
        confusion(group)?,
        tables::filter(group),
        tables::throughput(group),
        tables::configuration(group),
    ];
    let anchored = |id: &str| format!("{anchor}{id}");
    Ok(html! {
        article id=(anchor) {
            @if titled { h2.group { (data_name(group)) ": " (noise(group)) } (about(group)) }
            @for ((id, name), body) in SECTIONS.iter().zip(&bodies) {
                section id=(anchored(id)) {
                    @if titled { h3 { (name) } } @else { h2 { (name) } }
                    (body)
                }
            }
        }
    })
}

fn no_epoch() -> Markup {
    html! { p.none { "No finished epoch is recorded (metrics.jsonl is not there or empty)." } }
}

fn summary(group: &Group) -> Markup {
    let any = group.methods.iter().flat_map(|m| &m.curves).any(|c| !c.summary().is_empty());
    if any { tables::summary(group) } else { no_epoch() }
}

/// The mean over runs as a line, in units of `scale`.
fn line(method: &Method, colour: usize, dashed: bool, label: String, scale: f64, score: Score) -> Option<Line> {
    let mean = method.mean(score);
    let band = |std: Option<f64>| if dashed { 0.0 } else { scale * std.unwrap_or(0.0) };
    let points: Vec<_> = mean.iter().map(|(x, s)| (*x as f64, scale * s.mean, band(s.std))).collect();
    (!points.is_empty()).then_some(Line { label, colour, dashed, points })
}

/// Methods with a colour each: the first of a network has the network's own, if there are colours enough; further ones
/// get what is left.
fn coloured(group: &Group) -> Vec<(usize, &Method)> {
    let own = |m: &Method| Network::ALL.iter().position(|n| *n == m.network).unwrap_or(0);
    let kept: Vec<usize> = group.methods.iter().map(own).collect();
    let count = super::svg::PALETTE.len();
    let mut free = (0..count).filter(|i| !kept.contains(i)).collect::<Vec<_>>().into_iter().chain((0..count).cycle());
    let colour = |(i, m): (usize, &Method)| match own(m) >= count || kept[..i].contains(&own(m)) {
        true => free.next().unwrap_or(0),
        false => own(m),
    };
    group.methods.iter().enumerate().map(colour).zip(&group.methods).collect()
}

/// A curve in words: where it begins and ends.
fn in_words(lines: &[Line], unit: &str) -> String {
    let words = |line: &Line| {
        let (first, last) = (line.points.first()?, line.points.last()?);
        Some(format!("{}: from {:.2} to {:.2}{unit} after {} epochs.", line.label, first.1, last.1, last.0))
    };
    lines.iter().filter_map(words).collect::<Vec<_>>().join(" ")
}

fn chart(group: &Group, title: String, y_label: &str, lines: Vec<Line>, level: Option<(f64, String)>) -> Chart {
    let methods: Vec<&Method> = group.methods.iter().collect();
    let starts = iteration_starts(&methods);
    Chart { description: in_words(&lines, ""), title, y_label: y_label.to_string(), lines, starts, level }
}

fn validation_words(group: &Group) -> &'static str {
    match group.runs[0].setting("val-labels").as_str() {
        "clean" => "validation (clean labels)",
        "noisy" => "validation (noisy labels)",
        _ => "validation",
    }
}

fn accuracy(group: &Group) -> Result<Markup> {
    let shown: Vec<(usize, &Method)> =
        coloured(group).into_iter().filter(|(_, m)| !m.mean(|p| p.test.or(p.val)).is_empty()).collect();
    let both = |(i, m): &(usize, &Method)| {
        let test = line(m, *i, false, format!("{}, test", m.label), 100.0, |p| p.test);
        let val = line(m, *i, true, format!("{}, {}", m.label, validation_words(group)), 100.0, |p| p.val);
        [test, val]
    };
    let lines: Vec<Line> = shown.iter().flat_map(both).flatten().collect();
    if lines.is_empty() {
        return Ok(no_epoch());
    }
    let fit = |(i, m): &(usize, &Method)| line(m, *i, false, m.label.clone(), 100.0, |p| p.fit);
    let fits: Vec<Line> = shown.iter().filter_map(fit).collect();
    let rates: Vec<f64> = group.runs.iter().filter_map(|run| run.labels.as_ref()?.realised()).collect();
    let level = spread(&rates).map(|rate| {
        let right = 100.0 * (1.0 - rate.mean);
        (right, format!("right labels: {right:.1}\u{a0}%"))
    });
    let several = group.methods.iter().any(|m| m.curves.len() > 1);
    let title = format!("Accuracy on test and validation images, {}", noise(group));
    let fit_title = format!("Accuracy on the given training labels, {}", noise(group));
    let bands = if several { "Lines are means over runs, bands one standard deviation to either side." } else { "" };
    Ok(html! {
        figure {
            figcaption { (title) }
            (chart(group, title.clone(), "accuracy, %", lines, None).full()?)
        }
        p.note { (bands) }
        @if !fits.is_empty() {
            figure {
                figcaption { (fit_title) }
                (chart(group, fit_title.clone(), "accuracy, %", fits, level).full()?)
            }
            p.note {
                "A network that fits more of the given labels than are right has learnt wrong ones by heart."
            }
        }
        (tables::epochs(group))
    })
}

fn losses(group: &Group) -> Result<Markup> {
    let lines = |score: Score| -> Vec<Line> {
        coloured(group).into_iter().filter_map(|(i, m)| line(m, i, false, m.label.clone(), 1.0, score)).collect()
    };
    let (loss, meta) = (lines(|p| p.loss), lines(|p| p.meta));
    if loss.is_empty() && meta.is_empty() {
        return Ok(no_epoch());
    }
    let plots = [("Cross entropy on the given training labels", loss), ("Consistency loss (meta loss)", meta)];
    let mut figures = Vec::new();
    for (title, lines) in plots {
        if !lines.is_empty() {
            figures.push((title, chart(group, title.to_string(), "nats", lines, None).half()?));
        }
    }
    Ok(html! {
        div.pair {
            @for (title, plot) in &figures { figure { figcaption { (title) } (plot) } }
        }
    })
}

/// The matrices of the runs that have one, summed; with their number.
fn summed<'a>(group: &'a Group, matrix: impl Fn(&'a Run) -> Option<&'a Matrix>) -> Option<(Matrix, usize)> {
    let all: Vec<&Matrix> = group.runs.iter().filter_map(matrix).filter(|m| m.total() > 0).collect();
    Some((Matrix::sum(all.iter().copied())?, all.len()))
}

fn confusion(group: &Group) -> Result<Markup> {
    let audit = summed(group, |run| run.audit.as_ref());
    let truth = summed(group, |run| Some(&run.labels.as_ref()?.truth));
    let mut figures = Vec::new();
    let kinds = [
        (&audit, "suggested label", "Given against suggested labels"),
        (&truth, "true label", "Given against true labels"),
    ];
    for (found, columns, title) in kinds {
        if let Some((matrix, runs)) = found {
            figures.push((title, heat_map(matrix, title, columns)?, moves(matrix, columns), matrix, *runs));
        }
    }
    let how = html! { "mlnt audit " (group.runs[0].path.display()) };
    Ok(html! {
        @if audit.is_none() {
            p.none {
                "No suggested labels here: " code { (how) } " writes them, then write the report again."
                @if truth.is_some() { " Until then, the true labels of labels.csv show which classes the noise mixes." }
                @else { " Nor are there true labels (labels.csv is not there)." }
            }
        }
        @if !figures.is_empty() {
            p.note {
                "Numbers and colours are per cent of the row: of the samples given this label."
            }
            div.pair {
                @for (title, plot, moves, matrix, runs) in &figures {
                    figure {
                        figcaption {
                            (title) ": " (matrix.total() - matrix.agreeing()) " of " (matrix.total()) " differ"
                            @if *runs > 1 { " (sum of " (runs) " runs)" }
                        }
                        (plot)
                        @if figures.len() > 1 { (moves) }
                    }
                }
                @if let [(_, _, moves, ..)] = &figures[..] { div { (moves) } }
            }
        }
    })
}

/// The pairs of labels that are confused most.
fn moves(matrix: &Matrix, columns: &str) -> Markup {
    let top = matrix.top(8);
    let rows = html! {
        @for (i, j, count) in &top {
            tr { td.text { (matrix.names[*i]) } td.text { (matrix.names[*j]) } td { (count) } }
        }
    };
    html! {
        @if !top.is_empty() {
            p.note { "Most frequent differences:" }
            (tables::table(&["given label", columns, "samples"], &rows))
        }
    }
}
