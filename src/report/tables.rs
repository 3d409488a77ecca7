//! The tables of the page.

use maud::{Markup, html};

use super::curves::{Group, Method, phase_name, spread};
use super::read::{Run, Timing, plain};
use crate::data::split::validation_split;

/// A fraction in per cent; a dash for none.
pub(super) fn percent(fraction: Option<f64>) -> String {
    fraction.map_or_else(|| "–".to_string(), |f| format!("{:.2}", 100.0 * f))
}

/// Fractions as mean ± sample standard deviation in per cent.
pub(super) fn percent_spread(values: &[f64]) -> String {
    match spread(values) {
        None => "–".to_string(),
        Some(s) => match s.std {
            Some(std) => format!("{:.2} ± {:.2}", 100.0 * s.mean, 100.0 * std),
            None => format!("{:.2}", 100.0 * s.mean),
        },
    }
}

/// Columns that hold words rather than numbers.
const TEXT_COLUMNS: [&str; 8] =
    ["network", "run", "part", "setting", "mentor of the next", "given label", "suggested label", "true label"];

/// A table that scrolls by itself where the page is too narrow for it.
pub(super) fn table(head: &[&str], body: &Markup) -> Markup {
    html! {
        div.scroll tabindex="0" {
            table {
                thead { tr { @for cell in head { th.text[TEXT_COLUMNS.contains(cell)] scope="col" { (cell) } } } }
                tbody { (body) }
            }
        }
    }
}

/// Best and last test accuracy of every network in every run, and their means.
pub(super) fn summary(group: &Group) -> Markup {
    let several = group.runs.len() > 1;
    let iterations = |m: &Method| -> Vec<usize> {
        let mut all: Vec<usize> = m.curves.iter().flat_map(|c| c.summary()).map(|(i, _)| i).collect();
        all.sort_unstable();
        all.dedup();
        all
    };
    let most = group.methods.iter().flat_map(iterations).max().unwrap_or(1);
    let rows = html! {
        @for method in &group.methods {
            @for iteration in iterations(method) {
                @let found: Vec<_> = method.curves.iter().flat_map(|c| {
                    c.summary().into_iter().filter(|(i, _)| *i == iteration).map(|(_, row)| (c.run, row))
                }).collect();
                @let name = if iterations(method).len() > 1 || iteration > 1 {
                    format!("{}, iteration {iteration}", method.label)
                } else {
                    method.label.clone()
                };
                @if several && found.len() > 1 {
                    @let of = |score: fn(&crate::train::table::SummaryRow) -> f64| {
                        percent_spread(&found.iter().map(|(_, row)| score(row)).collect::<Vec<_>>())
                    };
                    tr.mean {
                        th scope="row" { (name) }
                        td.text { "mean ± std of " (found.len()) }
                        td { (of(|r| r.best_test)) } td {}
                        td { (of(|r| r.last_test)) }
                        td { (of(|r| r.test_at_best_val)) } td {}
                    }
                }
                @for (run, row) in &found {
                    tr {
                        @if several && found.len() > 1 { td {} } @else { th scope="row" { (name) } }
                        @if several { td.text { (group.runs[*run].name) } }
                        td { (percent(Some(row.best_test))) } td.aside { (row.best_epoch) }
                        td { (percent(Some(row.last_test))) }
                        td { (percent(Some(row.test_at_best_val))) } td.aside { (row.best_val_epoch) }
                    }
                }
            }
        }
    };
    let mut head = vec!["network"];
    if several {
        head.push("run");
    }
    head.extend(["best", "epoch", "last", "at best validation", "epoch"]);
    let about = match most {
        1 => "Test accuracy in per cent.",
        _ => "Test accuracy in per cent; epochs count from the beginning of each iteration.",
    };
    html! {
        p.note {
            (about) " “At best validation” is the test accuracy at the epoch that is best on the validation \
            images: what one gets without looking at the test images."
            @if several { " ± is the sample standard deviation over runs." }
        }
        (table(&head, &rows))
    }
}

/// The numbers of the accuracy curves, epoch by epoch.
pub(super) fn epochs(group: &Group) -> Markup {
    let methods: Vec<&Method> = group.methods.iter().filter(|m| !m.mean(|p| p.test).is_empty()).collect();
    type Means = Vec<(usize, super::curves::Spread)>;
    let means: Vec<[Means; 2]> = methods.iter().map(|m| [m.mean(|p| p.test), m.mean(|p| p.val)]).collect();
    let last = means.iter().flatten().flatten().map(|(x, _)| *x).max().unwrap_or(0);
    let at = |column: &Means, x: usize| percent(column.iter().find(|(at, _)| *at == x).map(|(_, s)| s.mean));
    let heads: Vec<String> =
        methods.iter().flat_map(|m| [format!("{}, test", m.label), format!("{}, validation", m.label)]).collect();
    let head: Vec<&str> = std::iter::once("epoch").chain(heads.iter().map(String::as_str)).collect();
    let rows = html! {
        @for x in 1..=last {
            tr { th scope="row" { (x) } @for column in means.iter().flatten() { td { (at(column, x)) } } }
        }
    };
    html! {
        details {
            summary { "The numbers of these curves" @if group.runs.len() > 1 { " (means over runs)" } }
            (table(&head, &rows))
        }
    }
}

/// What the filter kept and dropped in each iteration.
pub(super) fn filter(group: &Group) -> Markup {
    let any = group.runs.iter().any(|run| !run.iterations.is_empty());
    let filtered = group.runs.iter().flat_map(|run| &run.iterations).any(|i| i.kept.is_some());
    if !any {
        return html! {
            p.none { "No finished iteration is recorded (iterations.jsonl is not there or empty)." }
        };
    }
    let several = group.runs.len() > 1;
    let count = |n: Option<usize>| n.map_or_else(|| "–".to_string(), |n| n.to_string());
    let rows = html! {
        @for run in &group.runs {
            @for i in &run.iterations {
                tr {
                    @if several { th scope="row" { (run.name) } }
                    td { (i.iteration) }
                    td { (count(i.kept)) }
                    td { (count(i.dropped)) }
                    td { (percent(i.precision)) }
                    td { (percent(i.recall)) }
                    @match &i.mentor {
                        Some(m) => {
                            td.text { (m.network) ", epoch " (m.epoch) }
                            td { (percent(m.val_accuracy)) }
                        }
                        None => { td {} td {} }
                    }
                }
            }
        }
    };
    let mut head =
        vec!["iteration", "kept", "dropped", "precision, %", "recall, %", "mentor of the next", "its validation, %"];
    if several {
        head.insert(0, "run");
    }
    html! {
        @if !filtered {
            p.note { "No iteration had a filter: the first one trains on all samples." }
        } @else {
            p.note {
                "The filter drops training samples whose given label the mentor finds improbable. Precision: part of \
                the dropped labels that are wrong. Recall: part of the wrong labels that were dropped."
            }
        }
        (table(&head, &rows))
    }
}

/// The number of training images that an epoch visits: whole batches of what the validation split leaves.
fn images_per_epoch(run: &Run) -> Option<usize> {
    let labels = run.labels.as_ref()?;
    let (fraction, seed) = (run.number("val-fraction")?, run.config.get("seed")?.as_integer()?);
    let split = validation_split(&labels.given, labels.classes, fraction, u64::try_from(seed).ok()?).ok()?;
    let batch = run.number("batch").filter(|b| *b >= 1.0)? as usize;
    Some(split.train.len() / batch * batch)
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    (n > 0).then(|| (values[(n - 1) / 2] + values[n / 2]) / 2.0)
}

/// Seconds as hours, minutes and seconds.
fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, _) => format!("{seconds:.1} s"),
        (0, m, s) => format!("{m} min {s:02} s"),
        (h, m, _) => format!("{h} h {m:02} min"),
    }
}

/// Seconds per epoch and images per second of every part of every run.
pub(super) fn throughput(group: &Group) -> Markup {
    let several = group.runs.len() > 1;
    let parts = |run: &Run| -> Vec<(String, Vec<Timing>)> {
        let again = |t: &Timing| run.timing.iter().any(|o| o.phase == t.phase && o.iteration > Some(1));
        let mut parts: Vec<(String, Vec<Timing>)> = Vec::new();
        for t in &run.timing {
            let name = match t.iteration {
                Some(i) if again(t) => format!("{}, iteration {i}", phase_name(&t.phase)),
                _ => phase_name(&t.phase).to_string(),
            };
            match parts.iter_mut().find(|(known, _)| *known == name) {
                Some((_, list)) => list.push(t.clone()),
                None => parts.push((name, vec![t.clone()])),
            }
        }
        parts
    };
    if group.runs.iter().all(|run| run.timing.is_empty()) {
        return html! { p.none { "No clock times are recorded (timing.jsonl is not there or empty)." } };
    }
    let seconds = |s: Option<f64>| s.map_or_else(|| "–".to_string(), |s| format!("{s:.2}"));
    let rows = html! {
        @for run in &group.runs {
            @for (name, list) in parts(run) {
                @let train = median(list.iter().map(|t| t.train_seconds).collect());
                @let rate = train.filter(|s| *s > 0.0).and_then(|s| Some(images_per_epoch(run)? as f64 / s));
                tr {
                    @if several { td.text { (run.name) } }
                    th scope="row" { (name) }
                    td { (list.len()) }
                    td { (seconds(train)) }
                    td { (seconds(median(list.iter().map(|t| t.eval_seconds).collect()))) }
                    td { (rate.map_or_else(|| "–".to_string(), |r| format!("{r:.0}"))) }
                    td { (duration(list.iter().map(|t| t.train_seconds + t.eval_seconds).sum())) }
                }
            }
        }
    };
    let mut head =
        vec!["part", "epochs", "training, s per epoch", "evaluation, s per epoch", "training images per s", "in all"];
    if several {
        head.insert(0, "run");
    }
    html! {
        p.note {
            "Medians over epochs, clock time of this machine at that time. An epoch in which a run was interrupted \
            counts from where it was resumed."
        }
        (table(&head, &rows))
    }
}

/// All settings: those that the runs share, and a table of those that differ.
pub(super) fn configuration(group: &Group) -> Markup {
    let mut keys: Vec<&String> = Vec::new();
    for key in group.runs.iter().flat_map(|run| run.config.keys()) {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    let first = &group.runs[0];
    let (shared, differing): (Vec<&String>, Vec<&String>) =
        keys.into_iter().partition(|key| group.runs.iter().all(|run| run.config.get(*key) == first.config.get(*key)));
    let head: Vec<&str> = std::iter::once("setting").chain(group.runs.iter().map(|run| run.name.as_str())).collect();
    let rows = html! {
        @for key in &differing {
            tr { th scope="row" { code { (key) } } @for run in &group.runs { td { (run.setting(key)) } } }
        }
    };
    html! {
        @if !differing.is_empty() {
            p.note { "Settings that differ:" }
            (table(&head, &rows))
            p.note { "Settings of all these runs:" }
        }
        dl.settings {
            @for key in &shared {
                div { dt { code { (key) } } dd { (first.config.get(*key).map_or_else(String::new, plain)) } }
            }
        }
    }
}
