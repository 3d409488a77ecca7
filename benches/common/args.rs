//! The command line of the benchmarks.

use super::roof::Roof;
use mlnt::device::Device;
use mlnt::train::choice::{DeviceKind, Precision, PrecisionChoice};
use mlnt::train::open_device::open_device;
use std::path::PathBuf;

/// What every benchmark takes: `cargo bench --bench NAME -- [FILTER] --device cuda --precision f16 --out FILE`.
#[derive(Clone, Debug, clap::Args)]
pub struct Common {
    /// Only benchmarks whose name matches this regular expression.
    pub filter: Option<String>,
    /// Where to compute: auto, cpu, cuda, cuda:N or simt.
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    pub device: DeviceKind,
    /// Floating-point types of the computation [default: the device's own, f16 on a card, else f32]
    #[arg(long, value_name = "TYPE,…", value_delimiter = ',')]
    pub precision: Vec<Precision>,
    /// Threads of the CPU; 0 = one per core.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Write all results to this JSON file.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Where `baseline/torch_roof.py` has left a library's roof of this card, a file *roof.json.
    #[arg(long, value_name = "FOLDER", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/results"))]
    pub roofs: PathBuf,
    /// Passed by cargo bench.
    #[arg(long, hide = true)]
    pub bench: bool,
}

impl Common {
    /// The floating-point types to measure in.
    pub fn precisions(&self) -> Vec<Precision> {
        match self.precision[..] {
            [] => vec![PrecisionChoice::Auto.on(self.device)],
            ref named => named.to_vec(),
        }
    }

    /// What percentages are of, measured on a device of its own, which gives its memory back.
    pub fn roof(&self, precision: Precision) -> Roof {
        Roof::find(&self.roofs, self.device, &precision.to_string(), &mut *self.open(precision))
    }

    /// The device, or the end of the program with the reason why there is none.
    pub fn open(&self, precision: Precision) -> Box<dyn Device> {
        match open_device(self.device, precision, self.threads) {
            Ok(opened) => opened.device,
            Err(error) => {
                eprintln!("error: {error}");
                std::process::exit(1);
            }
        }
    }
}
