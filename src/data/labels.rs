//! The label file: the given labels of a training set as CSV, so that a noisy data set can be kept and exchanged.
//!
//! ```text
//! # dataset: cifar-10
//! # noise: symmetric
//! # nominal rate: 0.5
//! # realised rate: 0.4503
//! # seed: 1
//! index,label,true_label
//! 0,6,6
//! 1,3,9
//! ```
//!
//! The comment lines may be missing, as in a file of human labels; every sample must be there once and in order.

use std::fmt::Write;
use std::path::Path;

use super::dataset::Dataset;
use super::noise::{NoiseKind, NoisyLabels, disagreement};
use crate::error::{Error, Result};

const HEADER: [&str; 3] = ["index", "label", "true_label"];

/// How the labels of a file were made, from its comment lines.
#[derive(Debug, Clone, PartialEq)]
pub struct Provenance {
    /// Name of the data set.
    pub dataset: String,
    /// The rule.
    pub kind: NoiseKind,
    /// The rate asked for.
    pub nominal: f64,
    /// The seed.
    pub seed: u64,
}

/// The content of a label file.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelFile {
    /// The given labels, in sample order.
    pub labels: Vec<u16>,
    /// Share of them that differ from the true ones, counted.
    pub realised_rate: f64,
    /// How they were made, if the file says so.
    pub provenance: Option<Provenance>,
}

/// The label file of `noisy`, which are labels of `data`, as text in UTF-8.
///
/// # Errors
/// [`Error::Usage`] if there are not as many labels as samples.
pub fn to_csv(data: &Dataset, noisy: &NoisyLabels) -> Result<Vec<u8>> {
    if noisy.labels.len() != data.len() {
        return Err(Error::usage(format!(
            "{} labels for the {} samples of {}",
            noisy.labels.len(),
            data.len(),
            data.name
        )));
    }
    let name: String = data.name.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let mut text = format!(
        "# dataset: {name}\n# noise: {}\n# nominal rate: {}\n# realised rate: {}\n# seed: {}\n{}\n",
        noisy.kind,
        noisy.nominal,
        noisy.realised_rate,
        noisy.seed,
        HEADER.join(",")
    );
    for (i, (label, truth)) in noisy.labels.iter().zip(data.labels()).enumerate() {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{},{label},{truth}", data.original(i));
    }
    Ok(text.into_bytes())
}

/// Reads a label file for `data`; `path` is for errors only.
///
/// # Errors
/// [`Error::File`] naming the line: not UTF-8, no header line, a field that is not a number, a sample that is
/// missing, doubled or out of order, a label out of range, a true label that is not the data set's, a count that is
/// not the data set's, a comment that cannot be read.
pub fn parse(path: &Path, text: &[u8], data: &Dataset) -> Result<LabelFile> {
    let text = std::str::from_utf8(text).map_err(|_| Error::file(path, "not UTF-8 text"))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let provenance = provenance(path, text)?;
    let mut reader = csv::ReaderBuilder::new()
        .comment(Some(b'#'))
        .has_headers(false)
        .flexible(true)
        .trim(csv::Trim::All)
        .from_reader(text.as_bytes());
    let mut records = reader.records();
    match records.next() {
        Some(Ok(record)) if record.iter().eq(HEADER) => {}
        _ => return Err(Error::file(path, format!("no header line `{}`", HEADER.join(",")))),
    }
    let mut labels = Vec::new();
    for record in records {
        let record = record.map_err(|e| Error::file(path, e))?;
        let line = record.position().map_or(0, |position| position.line());
        labels
            .push(row(&record, labels.len(), data).map_err(|what| Error::file(path, format!("line {line}: {what}")))?);
    }
    if labels.len() != data.len() {
        return Err(Error::file(
            path,
            format!("{} labels, but {} has {} samples", labels.len(), data.name, data.len()),
        ));
    }
    let realised_rate = disagreement(&labels, data.labels());
    Ok(LabelFile { labels, realised_rate, provenance })
}

/// The given label in the record of sample `i`, or what is wrong with the record.
fn row(record: &csv::StringRecord, i: usize, data: &Dataset) -> std::result::Result<u16, String> {
    if record.len() != HEADER.len() {
        return Err(format!("{} fields, expected {}", record.len(), HEADER.len()));
    }
    let mut fields = [0; 3];
    for ((field, name), text) in fields.iter_mut().zip(HEADER).zip(record) {
        *field = text.parse().map_err(|_| format!("{name} `{text}` is not a whole number in range"))?;
    }
    let [index, label, truth]: [u32; 3] = fields;
    if i >= data.len() {
        return Err(format!("index {index}, but {} has {} samples", data.name, data.len()));
    }
    if index != data.original(i) {
        return Err(format!("index {index}, expected {}", data.original(i)));
    }
    if label as usize >= data.classes {
        return Err(format!("label {label} is outside 0..={}", data.classes - 1));
    }
    if truth as usize != data.label(i) {
        return Err(format!("true label {truth}, but sample {i} of {} has {}", data.name, data.label(i)));
    }
    Ok(label as u16)
}

/// Reads the comment lines at the start of the file; `None` if they do not name a noise.
fn provenance(path: &Path, text: &str) -> Result<Option<Provenance>> {
    let comments = || text.lines().map_while(|line| line.strip_prefix('#'));
    let find = |key: &str| {
        comments().filter_map(|line| line.split_once(':')).find(|(k, _)| k.trim() == key).map(|(_, value)| value.trim())
    };
    let Some(noise) = find("noise") else { return Ok(None) };
    let need = |key: &str| find(key).ok_or_else(|| Error::file(path, format!("no comment line `# {key}: …`")));
    let bad = |key: &str, value: &str| Error::file(path, format!("comment line `# {key}: {value}` cannot be read"));
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
    use super::super::noise::{ClassMap, corrupt};
    use super::super::sample;
    use super::*;
    use crate::rng;

    fn small() -> Dataset {
        sample::load().unwrap().test.subset(&(0..20).collect::<Vec<u32>>()).unwrap()
    }

    fn written(data: &Dataset) -> (NoisyLabels, String) {
        let map = ClassMap::of(data);
        let noisy = corrupt(data.labels(), 10, NoiseKind::SymmetricExclusive, 0.35, 4, &map).unwrap();
        let text = String::from_utf8(to_csv(data, &noisy).unwrap()).unwrap();
        (noisy, text)
    }

    fn error(text: &str) -> String {
        parse(Path::new("l.csv"), text.as_bytes(), &small()).unwrap_err().to_string()
    }

    #[test]
    fn round_trip() {
        let data = small();
        let (noisy, text) = written(&data);
        let read = parse(Path::new("l.csv"), text.as_bytes(), &data).unwrap();
        assert_eq!((&read.labels, read.realised_rate), (&noisy.labels, noisy.realised_rate));
        let dataset = "fashion-mnist-sample".to_string();
        assert_eq!(
            read.provenance,
            Some(Provenance { dataset, kind: NoiseKind::SymmetricExclusive, nominal: 0.35, seed: 4 })
        );
        // As an editor on another system may leave it: byte order mark, CRLF, no comments.
        let bare: String = text.lines().filter(|l| !l.starts_with('#')).map(|l| format!("{l}\r\n")).collect();
        let read = parse(Path::new("l.csv"), format!("\u{feff}{bare}").as_bytes(), &data).unwrap();
        assert_eq!((read.labels, read.provenance), (noisy.labels, None));
    }

    #[test]
    fn every_defect_is_named() {
        let data = small();
        let (_, text) = written(&data);
        let truth = data.label(19);
        let last = text.lines().last().unwrap();
        let with = |line: &str| error(&text.replace(last, line));
        assert_eq!(with("19,10,0"), "l.csv: line 26: label 10 is outside 0..=9");
        assert_eq!(with("18,1,0"), "l.csv: line 26: index 18, expected 19");
        assert_eq!(with("19,1"), "l.csv: line 26: 2 fields, expected 3");
        assert_eq!(with("19,x,0"), "l.csv: line 26: label `x` is not a whole number in range");
        assert_eq!(with("19,-1,0"), "l.csv: line 26: label `-1` is not a whole number in range");
        let lie = format!("19,0,{}", (truth + 1) % 10);
        let lie_error = format!(
            "l.csv: line 26: true label {}, but sample 19 of fashion-mnist-sample has {truth}",
            (truth + 1) % 10
        );
        assert_eq!(with(&lie), lie_error);
        assert_eq!(with(""), "l.csv: 19 labels, but fashion-mnist-sample has 20 samples");
        let more = with(&format!("{last}\n20,0,0"));
        assert_eq!(more, "l.csv: line 27: index 20, but fashion-mnist-sample has 20 samples");
        assert_eq!(error(""), "l.csv: no header line `index,label,true_label`");
        assert_eq!(error("0,1,1\n"), "l.csv: no header line `index,label,true_label`");
        let edit = |from, to| error(&text.replace(from, to));
        assert_eq!(edit("# seed: 4", "# seed: four"), "l.csv: comment line `# seed: four` cannot be read");
        assert_eq!(edit("# seed: 4\n", ""), "l.csv: no comment line `# seed: …`");
        assert_eq!(edit("rate: 0.35", "rate: 35"), "l.csv: comment line `# nominal rate: 35` cannot be read");
        assert_eq!(edit("exclusive", "wild"), "l.csv: comment line `# noise: symmetric-wild` cannot be read");
        assert_eq!(parse(Path::new("l.csv"), b"\xff", &data).unwrap_err().to_string(), "l.csv: not UTF-8 text");
        let noisy = NoisyLabels { labels: vec![0], realised_rate: 0.0, nominal: 0.0, kind: NoiseKind::None, seed: 0 };
        let error = to_csv(&data, &noisy).unwrap_err().to_string();
        assert_eq!(error, "1 labels for the 20 samples of fashion-mnist-sample");
    }

    #[test]
    fn mutations_never_panic() {
        let data = small();
        let text = written(&data).1.into_bytes();
        let mut rng = rng::stream(1, rng::Purpose::Test, 5, 0);
        for _ in 0..20_000 {
            let mut bytes = text.clone();
            for _ in 0..=rng::below(3, &mut rng) {
                let at = rng::below(bytes.len() as u64, &mut rng) as usize;
                bytes[at] = rng::below(256, &mut rng) as u8;
            }
            if rng::below(4, &mut rng) == 0 {
                bytes.truncate(rng::below(bytes.len() as u64, &mut rng) as usize);
            }
            if let Ok(file) = parse(Path::new("l.csv"), &bytes, &data) {
                assert_eq!(file.labels.len(), data.len());
            }
        }
    }
}
