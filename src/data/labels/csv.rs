//! Labels as CSV, the form that `mlnt` writes itself.
//!
//! ```text
//! # dataset: cifar-10
//! # noise: symmetric
//! # nominal rate: 0.5
//! # seed: 1
//! # realised rate: 0.4503
//! index,label,true_label
//! 0,6,6
//! 1,3,9
//! ```
//!
//! The comment lines may be missing, as in a file of human labels, and so may the columns `index` and `true_label`.
//! Another column than `label` can be chosen as the set of labels.

use std::fmt::Write;

use super::super::dataset::Dataset;
use super::super::noise::disagreement;
use super::{Format, Found, Places, Provenance};
use crate::error::{Error, Result};

const INDEX: &str = "index";
const LABEL: &str = "label";
const TRUTH: &str = "true_label";

/// Labels of `data` as text in UTF-8, below comment lines of the data set's name, `comments` and the realised rate.
///
/// # Errors
/// [`Error::Usage`] if there are not as many labels as samples.
pub fn write(data: &Dataset, labels: &[u16], comments: &[(&str, String)]) -> Result<Vec<u8>> {
    if labels.len() != data.len() {
        return Err(Error::usage(format!("{} labels for the {} samples of {}", labels.len(), data.len(), data.name)));
    }
    let mut text = String::new();
    let first = [("dataset", data.name.clone())];
    let last = [("realised rate", disagreement(labels, data.labels()).to_string())];
    for (key, value) in first.iter().chain(comments).chain(&last) {
        let value: String = value.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# {key}: {value}");
    }
    let _ = writeln!(text, "{INDEX},{LABEL},{TRUTH}");
    for (i, (label, truth)) in labels.iter().zip(data.labels()).enumerate() {
        let _ = writeln!(text, "{},{label},{truth}", data.original(i));
    }
    Ok(text.into_bytes())
}

/// Reads the columns; `set` is the column of labels.
pub(super) fn read(bytes: &[u8], set: Option<&str>) -> std::result::Result<Found, String> {
    let text = std::str::from_utf8(bytes).map_err(|e| match bytes.first() {
        Some(0x80) => "a bare pickle; labels are read from CSV, JSON, .npy, and .pt files that are zip archives".into(),
        _ => format!("no format known here, and not text in UTF-8 from byte {} on", e.valid_up_to()),
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let provenance = provenance(text)?;
    let mut reader = csv::ReaderBuilder::new()
        .comment(Some(b'#'))
        .has_headers(false)
        .flexible(true)
        .trim(csv::Trim::All)
        .from_reader(text.as_bytes());
    let wanted = set.unwrap_or(LABEL);
    let mut header = csv::StringRecord::new();
    let mut record = csv::StringRecord::new();
    reader.read_record(&mut header).map_err(|e| e.to_string())?;
    let column = |name: &str| header.iter().position(|column| column == name);
    let label = column(wanted).ok_or_else(|| match set {
        Some(name) => format!("no column `{name}`"),
        None => format!("no header line with a column `{LABEL}`, such as `{INDEX},{LABEL},{TRUTH}`"),
    })?;
    let mut columns =
        [(wanted, Some(label)), (INDEX, column(INDEX)), (TRUTH, column(TRUTH))].map(|(n, c)| (n, c, Vec::new()));
    let mut lines = Vec::new();
    while reader.read_record(&mut record).map_err(|e| e.to_string())? {
        let line = record.position().map_or(0, csv::Position::line);
        if record.len() != header.len() {
            return Err(format!("line {line}: {} fields, expected {}", record.len(), header.len()));
        }
        lines.push(u32::try_from(line).unwrap_or(u32::MAX));
        for (name, column, values) in &mut columns {
            let Some(column) = *column else { continue };
            let field = &record[column];
            let value = field.parse().ok().filter(|value: &i64| *value >= 0);
            values.push(value.ok_or_else(|| {
                let (name, field) = (name.escape_debug(), field.escape_debug());
                format!("line {line}: {name} `{field}` is not a whole number in range")
            })?);
        }
    }
    let [(_, _, labels), index, truth] = columns;
    let optional = |(_, column, values): (&str, Option<usize>, Vec<i64>)| column.map(|_| values);
    let places = Places::Lines(lines);
    Ok(Found { format: Format::Csv, labels, truth: optional(truth), index: optional(index), places, provenance })
}

/// Reads the comment lines at the start of the file; `None` if they do not name a noise.
fn provenance(text: &str) -> std::result::Result<Option<Provenance>, String> {
    let comments = || text.lines().map_while(|line| line.strip_prefix('#'));
    let find = |key: &str| {
        comments().filter_map(|line| line.split_once(':')).find(|(k, _)| k.trim() == key).map(|(_, value)| value.trim())
    };
    let Some(noise) = find("noise") else { return Ok(None) };
    let need = |key: &str| find(key).ok_or_else(|| format!("no comment line `# {key}: …`"));
    let bad = |key: &str, value: &str| format!("comment line `# {key}: {}` cannot be read", value.escape_debug());
    let (nominal, seed) = (need("nominal rate")?, need("seed")?);
    Ok(Some(Provenance {
        dataset: need("dataset")?.to_string(),
        kind: noise.parse().map_err(|_| bad("noise", noise))?,
        nominal: nominal
            .parse()
            .ok()
            .filter(|rate| (0.0..=1.0).contains(rate))
            .ok_or_else(|| bad("nominal rate", nominal))?,
        seed: seed.parse().map_err(|_| bad("seed", seed))?,
    }))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::super::noise::{NoiseKind, NoisyLabels, inject};
    use super::super::super::sample;
    use super::super::read;
    use super::*;

    fn small() -> Dataset {
        sample::load().unwrap().test.subset(&(0..20).collect::<Vec<u32>>()).unwrap()
    }

    fn written(data: &Dataset) -> (NoisyLabels, String) {
        let noisy = inject(data, NoiseKind::SymmetricExclusive, 0.35, 4).unwrap();
        let text = String::from_utf8(write(data, &noisy.labels, &noisy.comments()).unwrap()).unwrap();
        (noisy, text)
    }

    fn parse(text: &str, set: Option<&str>) -> Result<super::super::LabelFile> {
        read(Path::new("l.csv"), text.as_bytes(), set, &small())
    }

    fn error(text: &str) -> String {
        parse(text, None).unwrap_err().to_string()
    }

    #[test]
    fn round_trip() {
        let data = small();
        let (noisy, text) = written(&data);
        let file = parse(&text, None).unwrap();
        assert_eq!((&file.labels, file.realised_rate, file.had_truth), (&noisy.labels, noisy.realised_rate, true));
        assert_eq!(file.covered, (0..20).collect::<Vec<u32>>());
        let dataset = "fashion-mnist-sample".to_string();
        assert_eq!(
            file.provenance,
            Some(Provenance { dataset, kind: NoiseKind::SymmetricExclusive, nominal: 0.35, seed: 4 })
        );
        // As an editor on another system may leave it: byte order mark, CRLF, no comments.
        let bare: String = text.lines().filter(|l| !l.starts_with('#')).map(|l| format!("{l}\r\n")).collect();
        let file = parse(&format!("\u{feff}{bare}"), None).unwrap();
        assert_eq!((file.labels, file.provenance), (noisy.labels, None));
    }

    #[test]
    fn columns_may_be_missing_chosen_and_in_any_order() {
        let file = parse("label\n3\n4\n", None).unwrap();
        assert_eq!((file.covered, file.labels, file.had_truth), (vec![0, 1], vec![3, 4], false));
        let text = "first,index,second\n1,2,5\n9,19,6\n";
        let file = parse(text, Some("second")).unwrap();
        assert_eq!((file.covered, file.labels), (vec![2, 19], vec![5, 6]));
        assert_eq!(parse(text, Some("first")).unwrap().labels, [1, 9]);
        assert_eq!(parse(text, Some("third")).unwrap_err().to_string(), "l.csv: no column `third`");
        assert_eq!(error("label\n"), "l.csv: no labels");
    }

    #[test]
    fn every_defect_is_named() {
        let data = small();
        let (_, text) = written(&data);
        let truth = data.label(19);
        let last = text.lines().last().unwrap();
        let with = |line: &str| error(&text.replace(last, line));
        assert_eq!(with(&format!("19,10,{truth}")), "l.csv: line 26: label 10 is outside 0..=9");
        assert_eq!(with("18,1,0"), "l.csv: line 26: index 18 after 18: indices have to grow");
        assert_eq!(with("19,1"), "l.csv: line 26: 2 fields, expected 3");
        assert_eq!(with("19,x,0"), "l.csv: line 26: label `x` is not a whole number in range");
        assert_eq!(with("19,-1,0"), "l.csv: line 26: label `-1` is not a whole number in range");
        let lie = (truth + 1) % 10;
        let lie_error = format!("l.csv: line 26: true label {lie}, but sample 19 of fashion-mnist-sample has {truth}");
        assert_eq!(with(&format!("19,0,{lie}")), lie_error);
        let more = with(&format!("{last}\n20,0,0"));
        assert_eq!(more, "l.csv: line 27: index 20, but fashion-mnist-sample has 20 samples");
        let no_header = "l.csv: no header line with a column `label`, such as `index,label,true_label`";
        assert_eq!(error(""), no_header);
        assert_eq!(error("0,1,1\n"), no_header);
        let edit = |from, to| error(&text.replace(from, to));
        assert_eq!(edit("# seed: 4", "# seed: four"), "l.csv: comment line `# seed: four` cannot be read");
        assert_eq!(edit("# seed: 4\n", ""), "l.csv: no comment line `# seed: …`");
        assert_eq!(edit("rate: 0.35", "rate: 35"), "l.csv: comment line `# nominal rate: 35` cannot be read");
        assert_eq!(edit("exclusive", "wild"), "l.csv: comment line `# noise: symmetric-wild` cannot be read");
        let error = |bytes: &[u8]| read(Path::new("l.csv"), bytes, None, &data).unwrap_err().to_string();
        assert_eq!(error(b"lab\xff"), "l.csv: no format known here, and not text in UTF-8 from byte 3 on");
        assert!(error(b"\x80\x02}.").starts_with("l.csv: a bare pickle; labels are read from CSV"));
        let error = write(&data, &[0], &[]).unwrap_err().to_string();
        assert_eq!(error, "1 labels for the 20 samples of fashion-mnist-sample");
    }
}
