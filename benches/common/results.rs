//! Rows of results: printed as a table, written as JSON.

use super::args::Common;
use super::roof::Roof;
use serde::Serialize;
use serde_json::{Value, json};
use std::cell::RefCell;
use std::time::Duration;

/// Times of single runs, seconds.
#[derive(Default)]
pub struct Samples(RefCell<Vec<f64>>);

impl Samples {
    /// Runs `once`, which returns the seconds of one run, so many times, and keeps their times.
    pub fn run(&self, times: u64, mut once: impl FnMut() -> f64) -> Duration {
        let fresh: Vec<f64> = (0..times).map(|_| once()).collect();
        let sum = fresh.iter().sum();
        self.0.borrow_mut().extend(fresh);
        Duration::from_secs_f64(sum)
    }

    /// Adds the time of one run.
    pub fn push(&self, seconds: f64) {
        self.0.borrow_mut().push(seconds);
    }

    /// Quartiles of all but the first fifth of the runs, which warm up; `None` without runs.
    fn quartiles(&self) -> Option<[f64; 3]> {
        let all = self.0.borrow();
        let mut times = all[all.len() / 5..].to_vec();
        times.sort_by(f64::total_cmp);
        (!times.is_empty()).then(|| [1, 2, 3].map(|q| times[(times.len() - 1) * q / 4]))
    }
}

/// One thing that was timed.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What it is.
    pub name: String,
    /// Operand type of convolutions.
    pub precision: String,
    /// How often a step does it; 1 for what is no part of a step.
    pub count: usize,
    /// Median, first and third quartile of a run's seconds.
    pub seconds: f64,
    pub first_quartile: f64,
    pub third_quartile: f64,
    /// Floating-point operations and bytes, each operand counted once.
    pub flops: u64,
    pub bytes: u64,
    pub tflop_per_second: f64,
    pub gb_per_second: f64,
    /// Time at the lower of the two roofs over the time taken, per cent; more than 100 where a cache spares memory, or a library's
    /// product was slower.
    pub percent_of_roof: f64,
}

/// All results of a benchmark.
pub struct Results {
    bench: &'static str,
    common: Common,
    device: String,
    roofs: Vec<(String, Roof)>,
    rows: Vec<Row>,
}

impl Results {
    pub fn new(bench: &'static str, common: &Common) -> Self {
        Results { bench, common: common.clone(), device: String::new(), roofs: Vec::new(), rows: Vec::new() }
    }

    /// From here on rows are of this device in this precision.
    pub fn begin(&mut self, device: String, precision: String, roof: Roof) {
        println!("{device}");
        println!("{}\n", roof.text());
        self.device = device;
        self.roofs.push((precision, roof));
    }

    /// Adds what was timed, if it was.
    pub fn add(&mut self, name: String, count: usize, (flops, bytes): (u64, u64), samples: &Samples) {
        let Some([first_quartile, seconds, third_quartile]) = samples.quartiles() else { return };
        let Some((precision, roof)) = self.roofs.last_mut() else { return };
        roof.raise(flops as f64 / seconds, || name.clone());
        self.rows.push(Row {
            name,
            precision: precision.clone(),
            count,
            seconds,
            first_quartile,
            third_quartile,
            flops,
            bytes,
            tflop_per_second: flops as f64 / seconds / 1e12,
            gb_per_second: bytes as f64 / seconds / 1e9,
            percent_of_roof: f64::NAN, // when all that can raise the roof is known
        });
    }

    /// The rows so far, to be put in another order.
    pub fn rows_mut(&mut self) -> &mut Vec<Row> {
        &mut self.rows
    }

    /// Writes the file that was asked for, with `more` beside the rows, and prints the table.
    pub fn finish(&mut self, more: Value) {
        for row in &mut self.rows {
            let Some((_, roof)) = self.roofs.iter().find(|(precision, _)| *precision == row.precision) else {
                continue;
            };
            let at_roof = (row.flops as f64 / roof.flops).max(row.bytes as f64 / roof.bytes);
            row.percent_of_roof = 100.0 * at_roof / row.seconds;
        }
        self.write(more);
        for (precision, roof) in &self.roofs {
            println!("\n{precision}: {}", roof.text());
        }
        let columns = ["ms", "quartiles", "TFLOP/s", "GB/s", "% of roof"];
        let [ms, quartiles, tflops, gbps, roof] = columns;
        println!("\n{ms:>10} {quartiles:>21} {tflops:>9} {gbps:>9} {roof:>9}  count  what");
        for r in &self.rows {
            let quartiles = format!("{:.4}-{:.4}", 1e3 * r.first_quartile, 1e3 * r.third_quartile);
            println!(
                "{:>10.4} {quartiles:>21} {:>9.3} {:>9.1} {:>9.1} {:>6}  {} {}",
                1e3 * r.seconds,
                r.tflop_per_second,
                r.gb_per_second,
                r.percent_of_roof,
                r.count,
                r.name,
                r.precision
            );
        }
    }

    fn write(&self, more: Value) {
        let Some(out) = &self.common.out else { return };
        let roof = |(precision, roof): &(String, Roof)| {
            json!({ "precision": precision, "flop_per_second": roof.flops, "bytes_per_second": roof.bytes,
            "library": roof.library, "best": roof.best })
        };
        let mut report = json!({
            "bench": self.bench,
            "device": self.device,
            "version": env!("CARGO_PKG_VERSION"),
            "commit": option_env!("MLNT_COMMIT"),
            "nvcc": mlnt::device::cuda::embedded::nvcc_version(),
            "roofs": self.roofs.iter().map(roof).collect::<Vec<Value>>(),
            "rows": self.rows,
        });
        if let (Value::Object(report), Value::Object(more)) = (&mut report, more) {
            report.extend(more);
        }
        match std::fs::write(out, format!("{report:#}\n")) {
            Ok(()) => println!("\nwritten: {}", out.display()),
            Err(error) => {
                eprintln!("error: {}: {error}", out.display());
                std::process::exit(1);
            }
        }
    }
}
