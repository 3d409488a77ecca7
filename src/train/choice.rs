//! The settings that take one of a few names. The name is the same on the command line and in TOML.

use crate::mlnt::golden::TOLERANCE_F64;
use clap::ValueEnum;
use clap::builder::PossibleValue;
use serde::{Deserialize, Serialize};

/// How a run trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// MLNT: a feature network, then iterations of meta-learning.
    Mlnt,
    /// MLNT without the second-order term, as --first-order.
    MlntFirstOrder,
    /// Cross entropy alone.
    Ce,
    /// Iterations of cross entropy with a teacher, without the meta loss: filter and mentor as in MLNT.
    IterativeCe,
    /// Joint optimisation of network and labels (Tanaka et al., CVPR 2018): predictions become the labels.
    JointOpt,
    /// Early-learning regularisation (Liu et al., NeurIPS 2020): a pull towards each sample's earlier predictions.
    Elr,
    /// Co-teaching (Han et al., NeurIPS 2018): two networks choose the samples of small loss for each other.
    CoTeaching,
}

impl Method {
    /// Whether it may have several iterations, each led by the best network of the one before.
    pub fn has_mentor(self) -> bool {
        matches!(self, Method::Mlnt | Method::MlntFirstOrder | Method::IterativeCe)
    }
}

/// How the meta gradient and the classification gradient share a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Recipe {
    /// Two updates in turn, the meta one first; KL divided by k (the paper's text).
    Paper,
    /// One update with both gradients; KL divided by k times the classes (the authors' code).
    Released,
}

/// Augmentation of training images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Augment {
    /// Images as they are.
    None,
    /// Pad with zeros, crop at random back to the image size, flip half of the images.
    PadCropFlip,
}

/// Where the computation runs: `auto`, `cpu`, `cuda`, `cuda:N` or `simt`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceKind {
    /// A GPU if one works, kernels for it are in the binary and it computes in the precision asked for; else the processor.
    Auto,
    /// The processor.
    Cpu,
    /// The NVIDIA card of this number, in the driver's order.
    Cuda(usize),
    /// The CUDA kernels, emulated thread by thread on the processor: slow, for checking them.
    Simt,
}

impl std::str::FromStr for DeviceKind {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "auto" => Ok(DeviceKind::Auto),
            "cpu" => Ok(DeviceKind::Cpu),
            "cuda" => Ok(DeviceKind::Cuda(0)),
            "simt" => Ok(DeviceKind::Simt),
            _ => name
                .strip_prefix("cuda:")
                .and_then(|n| n.parse().ok())
                .map(DeviceKind::Cuda)
                .ok_or_else(|| format!("no device is called {name:?}; possible are auto, cpu, cuda, cuda:N, simt")),
        }
    }
}

impl TryFrom<String> for DeviceKind {
    type Error = String;
    fn try_from(name: String) -> Result<Self, String> {
        name.parse()
    }
}

impl From<DeviceKind> for String {
    fn from(kind: DeviceKind) -> String {
        kind.to_string()
    }
}

impl std::fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DeviceKind::Auto => f.write_str("auto"),
            DeviceKind::Cpu => f.write_str("cpu"),
            DeviceKind::Cuda(0) => f.write_str("cuda"),
            DeviceKind::Cuda(n) => write!(f, "cuda:{n}"),
            DeviceKind::Simt => f.write_str("simt"),
        }
    }
}

/// Which CUDA kernels run, where there are several for one purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "kebab-case")]
pub enum KernelChoice {
    /// Those that the card runs best; without a card the portable ones.
    #[default]
    Auto,
    /// Those that every card runs.
    Portable,
    /// Those for compute capability 9.0 alone.
    Hopper,
}

/// Floating-point type of activations, weights and gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// 32-bit floats.
    F32,
    /// 64-bit floats; on the processor only.
    F64,
    /// 32-bit floats; convolutions with operands of 10 bits of mantissa. CUDA only.
    Tf32,
    /// IEEE half precision for activations, their cotangents and operands of convolutions; cotangents scaled by powers of two.
    /// CUDA only.
    F16,
    /// bfloat16 for activations, their cotangents and operands of convolutions. CUDA only.
    Bf16,
}

impl Precision {
    /// Largest relative error of a group of a golden step: in double precision against the file, in every other one
    /// against double precision with the same decisions of ReLUs and max-pools. A few times what rounding alone makes
    /// of the meta-gradient of a trained network.
    pub fn tolerance(self) -> f64 {
        match self {
            Precision::F32 => 1e-5,
            Precision::F64 => TOLERANCE_F64,
            Precision::Tf32 | Precision::F16 => 3e-3,
            Precision::Bf16 => 3e-2,
        }
    }
}

/// The floating-point type that somebody names, or leaves to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum PrecisionChoice {
    /// What [`PrecisionChoice::on`] says of the device.
    Auto,
    /// This one.
    Of(Precision),
}

impl PrecisionChoice {
    /// The type in which a device of this kind computes. Left open it is f16 on a card, for every card that the kernels are
    /// compiled for has tensor cores; f32 on the processor, and on the SIMT host machine, which is there to check kernels.
    /// [`DeviceKind::Auto`] counts as the processor.
    pub fn on(self, device: DeviceKind) -> Precision {
        match (self, device) {
            (PrecisionChoice::Of(precision), _) => precision,
            (PrecisionChoice::Auto, DeviceKind::Cuda(_)) => Precision::F16,
            (PrecisionChoice::Auto, DeviceKind::Auto | DeviceKind::Cpu | DeviceKind::Simt) => Precision::F32,
        }
    }
}

impl From<Precision> for PrecisionChoice {
    fn from(precision: Precision) -> Self {
        PrecisionChoice::Of(precision)
    }
}

impl ValueEnum for PrecisionChoice {
    fn value_variants<'a>() -> &'a [Self] {
        use PrecisionChoice::{Auto, Of};
        &[Auto, Of(Precision::F32), Of(Precision::F64), Of(Precision::Tf32), Of(Precision::F16), Of(Precision::Bf16)]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        match self {
            PrecisionChoice::Auto => Some(PossibleValue::new("auto").help("f16 on a card, f32 on cpu and simt")),
            PrecisionChoice::Of(precision) => precision.to_possible_value(),
        }
    }
}

impl TryFrom<String> for PrecisionChoice {
    type Error = String;
    fn try_from(name: String) -> Result<Self, String> {
        let names = || Self::value_variants().iter().map(Self::to_string).collect::<Vec<_>>().join(", ");
        <Self as ValueEnum>::from_str(&name, false)
            .map_err(|_| format!("no precision is called {name:?}; possible are {}", names()))
    }
}

impl From<PrecisionChoice> for String {
    fn from(choice: PrecisionChoice) -> String {
        choice.to_string()
    }
}

/// The name of a choice, as it stands on the command line and in TOML.
macro_rules! display_by_name {
    ($($choice:ty),*) => {$(
        impl std::fmt::Display for $choice {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match self.to_possible_value() {
                    Some(value) => f.write_str(value.get_name()),
                    None => write!(f, "{self:?}"),
                }
            }
        }
    )*};
}
display_by_name!(Method, Recipe, Augment, Precision, PrecisionChoice);
