//! `mlnt noise`.

use std::path::PathBuf;

use comfy_table::{CellAlignment, Table, presets::ASCII_MARKDOWN};

use super::console::say;
use crate::data::labels::{Format, json, npy};
use crate::data::{Dataset, NoiseKind, open};
use crate::error::{Error, Result};
use crate::fs::write_atomic;
use crate::train::config::Config;
use crate::train::given::Given;
use crate::train::preset::Preset;

/// The help above the arguments.
pub(super) const LONG_ABOUT: &str = "\
Write a label file: the noisy labels that `train` would use.

The labels are those that `train` injects with the same --data, --train-size, --noise, --noise-rate and --seed, and \
`train --labels FILE` trains on them. Prints nominal and realised rate, and which labels each class got.";

/// The help below the arguments.
const EXAMPLES: &str = "\
Examples:
  mlnt noise --noise instance --noise-rate 0.4 --out labels.csv
  mlnt noise --data DIR --noise asymmetric --noise-rate 0.4 --seed 3 --format json --out cifar10-asym-0.4.json
  mlnt noise --train-size 1500 --noise symmetric --noise-rate 0.5 --out small.csv    what `mlnt train` uses

CSV says for each label which image it is of. JSON (as DivideMix has it) and NumPy files are bare lists: label i is \
that of training image i, so that they are written for the whole training set only.";

/// The arguments of `mlnt noise`.
#[derive(Clone, Debug, PartialEq, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct NoiseArgs {
    /// Images: "sample", or a folder of CIFAR-10, CIFAR-100 or IDX files.
    #[arg(long, value_name = "sample|DIR", default_value = "sample")]
    pub data: String,
    /// Training images to use, the same number of each class, as in `train`; 0 = all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub train_size: usize,
    /// Label noise to inject.
    #[arg(long, value_name = "KIND")]
    pub noise: NoiseKind,
    /// Part of the labels that the noise touches, in [0, 1].
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub noise_rate: f64,
    /// Seed of the noise, that of the run.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// File to write; an old one is replaced.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// How to write it.
    #[arg(long, value_name = "FORMAT", default_value = "csv")]
    pub format: Format,
}

/// Runs `mlnt noise`.
///
/// # Errors
/// [`Error::Usage`] for settings that do not fit the data or the format; those of reading data and writing the file.
pub(super) fn run(args: &NoiseArgs) -> Result<u8> {
    let config = Config {
        data: args.data.clone(),
        train_size: args.train_size,
        noise: args.noise,
        noise_rate: args.noise_rate,
        seed: args.seed,
        ..Preset::default().config()
    };
    config.validate()?;
    let given = Given::new(&config, open(&args.data)?.train)?;
    let bytes = content(&given, args.format)?;
    write_atomic(&args.out, &bytes)?;
    let (count, name) = (given.labels.len(), &given.images.name);
    let (nominal, realised) = (100.0 * given.nominal.unwrap_or(0.0), 100.0 * given.realised);
    say(format_args!("{}: {count} labels of {name}", args.out.display()))?;
    say(format_args!(
        "noise: {}, nominal rate {nominal:.2} %, realised {realised:.2} % of the labels are wrong",
        args.noise
    ))?;
    say(format_args!("\n{}", transitions(&given.images, &given.labels)))?;
    Ok(0)
}

/// The bytes of the file.
fn content(given: &Given, format: Format) -> Result<Vec<u8>> {
    let images = &given.images;
    let bare = (0..images.len()).all(|i| images.original(i) as usize == i);
    match format {
        Format::Csv => Ok(given.csv.clone()),
        Format::Json if bare => Ok(json::write(&given.labels)),
        Format::Npy if bare => Ok(npy::write(&given.labels)),
        _ => Err(Error::usage(format_args!(
            "a {format} cannot say which images its labels are of, and --train-size takes {} of all: write CSV, or labels \
             for all images",
            images.len()
        ))),
    }
}

/// Most classes for a table with a column each.
const MAX_COLUMNS: usize = 12;

/// How many per cent of each class got which label: a row for each true class, with a column for each label where
/// that fits and the most frequent wrong label otherwise.
fn transitions(images: &Dataset, labels: &[u16]) -> String {
    let classes = images.classes;
    let mut counts = vec![vec![0usize; classes]; classes];
    images.labels().iter().zip(labels).for_each(|(&t, &l)| counts[usize::from(t)][usize::from(l)] += 1);
    let percent = |count: usize, row: &[usize]| match row.iter().sum() {
        0 => "-".to_string(),
        sum => format!("{:.1}", 100.0 * count as f64 / sum as f64),
    };
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN);
    let wide = classes <= MAX_COLUMNS;
    let first = ["true class, % labelled".to_string()].into_iter();
    match wide {
        true => table.set_header(first.chain((0..classes).map(|class| class.to_string()))),
        false => table.set_header(first.chain(["itself", "most often otherwise"].map(String::from))),
    };
    for (class, row) in counts.iter().enumerate() {
        let name = match &images.class_names[class] {
            name if *name == class.to_string() => name.clone(),
            name => format!("{class} {name}"),
        };
        if wide {
            table.add_row(std::iter::once(name).chain(row.iter().map(|&count| percent(count, row))));
            continue;
        }
        let wrong = (0..classes).filter(|&label| label != class).max_by_key(|&label| (row[label], classes - label));
        let wrong = wrong.filter(|&label| row[label] > 0);
        let wrong = wrong.map_or("-".to_string(), |label| format!("{label}: {}", percent(row[label], row)));
        table.add_row([name, percent(row[class], row), wrong]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}
