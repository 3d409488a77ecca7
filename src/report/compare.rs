//! The result of a comparison: test accuracies of methods, mean and standard deviation over seeds.

use std::path::{Path, PathBuf};

use comfy_table::{CellAlignment, Table, presets::ASCII_MARKDOWN};
use serde::Deserialize;
use serde_json::{Value, json};

use super::curves::spread;
use super::tables::percent_spread;
use crate::error::{Error, Result};
use crate::train::run_dir::RunDir;
use crate::train::table::SummaryRow;

/// A finished run and what tells it from the others.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Name of its method.
    pub method: String,
    /// Its seed.
    pub seed: u64,
    /// Its networks.
    pub networks: Vec<SummaryRow>,
    /// Where its labels come from.
    pub noise: String,
    /// Part of them that is wrong.
    pub realised_noise: f64,
}

/// What a comparison needs of `summary.json`.
#[derive(Deserialize)]
struct Summary {
    noise: String,
    realised_noise: f64,
    networks: Vec<SummaryRow>,
}

impl Finished {
    /// Reads the run in `path`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] for a directory that is no finished run.
    pub fn read(method: String, seed: u64, path: impl Into<PathBuf>) -> Result<Self> {
        let file = RunDir::open(path)?.summary_json();
        let text = std::fs::read_to_string(&file).map_err(Error::io(&file))?;
        let Summary { noise, realised_noise, networks } =
            serde_json::from_str(&text).map_err(|e| Error::file(&file, e))?;
        Ok(Finished { method, seed, networks, noise, realised_noise })
    }
}

/// A column of the table: its title, its key in JSON and CSV, and its number, a test accuracy as a fraction.
type Column = (&'static str, &'static str, fn(&SummaryRow) -> f64);

const COLUMNS: [Column; 3] = [
    ("at best validation", "test_at_best_val", |row| row.test_at_best_val),
    ("last epoch", "last_test", |row| row.last_test),
    ("best epoch", "best_test", |row| row.best_test),
];

/// A network of a method, over the seeds.
struct Line<'a> {
    method: &'a str,
    network: &'a str,
    rows: Vec<&'a SummaryRow>,
}

/// The finished runs of a comparison.
#[derive(Clone, Debug)]
pub struct Comparison(Vec<Finished>);

impl Comparison {
    /// Of these runs, in the order in which methods and seeds are to be told.
    pub fn new(runs: Vec<Finished>) -> Self {
        Comparison(runs)
    }

    /// The networks, in the order of the runs.
    fn lines(&self) -> Vec<Line<'_>> {
        let mut lines: Vec<Line<'_>> = Vec::new();
        for run in &self.0 {
            for row in &run.networks {
                match lines.iter_mut().find(|line| line.method == run.method && line.network == row.name) {
                    Some(line) => line.rows.push(row),
                    None => lines.push(Line { method: &run.method, network: &row.name, rows: vec![row] }),
                }
            }
        }
        lines
    }

    /// Seeds, and the part of the labels that is wrong with each; methods of one seed have the same labels.
    fn seeds(&self) -> Vec<(u64, f64)> {
        let mut seeds: Vec<(u64, f64)> = Vec::new();
        for run in &self.0 {
            if !seeds.iter().any(|(seed, _)| *seed == run.seed) {
                seeds.push((run.seed, run.realised_noise));
            }
        }
        seeds
    }

    /// The table in Markdown under two lines that say what it holds; accuracies in per cent.
    pub fn markdown(&self) -> String {
        let seeds = self.seeds();
        let several = |one: &str, many: &str| if seeds.len() == 1 { one.to_string() } else { many.to_string() };
        let list = |items: Vec<String>| items.join(", ");
        let noise = self.0.first().map_or("", |run| run.noise.as_str());
        let mut table = Table::new();
        table.load_style(ASCII_MARKDOWN);
        table.set_header(["method", "network"].into_iter().chain(COLUMNS.map(|(title, ..)| title)));
        for line in self.lines() {
            let of =
                |(_, _, score): Column| percent_spread(&line.rows.iter().map(|row| score(row)).collect::<Vec<_>>());
            table.add_row([line.method.to_string(), line.network.to_string()].into_iter().chain(COLUMNS.map(of)));
        }
        for column in table.column_iter_mut().skip(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        format!(
            "Test accuracy in per cent{}, {} {}.\nLabels: {noise}, {} % of them wrong.\n\n{table}\n",
            several("", ", mean ± sample standard deviation"),
            several("seed", "seeds"),
            list(seeds.iter().map(|(seed, _)| seed.to_string()).collect()),
            list(seeds.iter().map(|(_, realised)| format!("{:.1}", 100.0 * realised)).collect()),
        )
    }

    /// The same for programs: fractions, with the value of every seed.
    pub fn json(&self) -> Value {
        let networks: Vec<Value> = self.lines().iter().map(json_line).collect();
        let seeds =
            self.seeds().into_iter().map(|(seed, realised)| json!({ "seed": seed, "realised_noise": realised }));
        let noise = self.0.first().map(|run| &run.noise);
        json!({ "noise": noise, "seeds": seeds.collect::<Vec<_>>(), "networks": networks })
    }

    /// One line per run and network, accuracies as fractions.
    ///
    /// # Errors
    /// [`Error::File`] for `path`, the file that it is meant for.
    pub fn csv(&self, path: &Path) -> Result<Vec<u8>> {
        let fault = |e: csv::Error| Error::file(path, e);
        let mut writer = csv::Writer::from_writer(Vec::new());
        let head = ["method", "seed", "network"].into_iter().chain(COLUMNS.map(|(_, key, _)| key));
        writer.write_record(head.chain(["best_val_epoch", "best_epoch"])).map_err(fault)?;
        for run in &self.0 {
            for row in &run.networks {
                let names = [run.method.clone(), run.seed.to_string(), row.name.clone()];
                let scores = COLUMNS.map(|(_, _, score)| score(row).to_string());
                let epochs = [row.best_val_epoch, row.best_epoch].map(|epoch| epoch.to_string());
                writer.write_record(names.iter().chain(&scores).chain(&epochs)).map_err(fault)?;
            }
        }
        writer.into_inner().map_err(|e| Error::file(path, e.error()))
    }
}

fn json_line(line: &Line<'_>) -> Value {
    let mut object = json!({ "method": line.method, "network": line.network });
    for (_, key, score) in COLUMNS {
        let values: Vec<f64> = line.rows.iter().map(|row| score(row)).collect();
        let (mean, std) = spread(&values).map_or((None, None), |s| (Some(s.mean), s.std));
        object[key] = json!({ "mean": mean, "std": std, "values": values });
    }
    object
}

#[cfg(test)]
mod tests {
    use super::{Comparison, Finished};
    use crate::train::table::SummaryRow;
    use std::path::Path;

    fn run(method: &str, seed: u64, realised_noise: f64, networks: &[(&str, f64, f64)]) -> Finished {
        let row = |(name, chosen, last): &(&str, f64, f64)| SummaryRow {
            name: name.to_string(),
            best_test: chosen.max(*last),
            best_epoch: 4,
            last_test: *last,
            test_at_best_val: *chosen,
            best_val_epoch: 3,
        };
        let networks = networks.iter().map(row).collect();
        Finished { method: method.into(), seed, networks, noise: "symmetric".into(), realised_noise }
    }

    #[test]
    fn one_line_per_network_with_mean_and_sample_deviation() {
        let of = |seed, noise, shift: f64| {
            let both = [("MLNT student", 0.7 + shift, 0.6), ("MLNT teacher", 0.75, 0.65 + shift)];
            [run("mlnt", seed, noise, &both), run("ce", seed, noise, &[("cross entropy", 0.5 + shift, 0.4)])]
        };
        let comparison = Comparison::new([of(1, 0.447, 0.0), of(2, 0.451, 0.02)].concat());
        let text = comparison.markdown();
        let lines: Vec<Vec<&str>> = text.lines().map(|l| l.split('|').map(str::trim).collect()).collect();
        assert_eq!(lines[0], ["Test accuracy in per cent, mean ± sample standard deviation, seeds 1, 2."]);
        assert_eq!(lines[1], ["Labels: symmetric, 44.7, 45.1 % of them wrong."]);
        assert_eq!(lines[3][1..6], ["method", "network", "at best validation", "last epoch", "best epoch"]);
        // Of two values a and a + 0.02 the mean is a + 0.01 and the sample deviation 0.02/√2.
        assert_eq!(lines[5][1..6], ["mlnt", "MLNT student", "71.00 ± 1.41", "60.00 ± 0.00", "71.00 ± 1.41"]);
        assert_eq!(lines[6][1..6], ["mlnt", "MLNT teacher", "75.00 ± 0.00", "66.00 ± 1.41", "75.00 ± 0.00"]);
        assert_eq!(lines[7][1..6], ["ce", "cross entropy", "51.00 ± 1.41", "40.00 ± 0.00", "51.00 ± 1.41"]);
        assert_eq!(lines.len(), 8);

        let json = comparison.json();
        assert_eq!(json["seeds"][1]["realised_noise"], 0.451);
        assert_eq!(json["networks"][2]["test_at_best_val"]["values"], serde_json::json!([0.5, 0.52]));
        assert!((json["networks"][2]["test_at_best_val"]["std"].as_f64().unwrap() - 0.02 / 2f64.sqrt()).abs() < 1e-12);
        let csv = String::from_utf8(comparison.csv(Path::new("compare.csv")).unwrap()).unwrap();
        let head = "method,seed,network,test_at_best_val,last_test,best_test,best_val_epoch,best_epoch\n";
        assert!(csv.starts_with(&format!("{head}mlnt,1,MLNT student,0.7,0.6,0.7,3,4\n")), "{csv}");
        assert_eq!(csv.lines().count(), 1 + 2 * 3);
    }

    #[test]
    fn one_seed_has_no_deviation() {
        let text = Comparison::new(vec![run("ce", 5, 0.2, &[("cross entropy", 0.5, 0.4)])]).markdown();
        assert!(text.starts_with("Test accuracy in per cent, seed 5.\nLabels: symmetric, 20.0 % of them wrong.\n"));
        assert!(!text.contains('±') && text.contains("50.00"), "{text}");
    }
}
