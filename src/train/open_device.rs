//! From the device and precision asked for to a device, with the reason in words.

use super::choice::{DeviceKind, KernelChoice, Precision, PrecisionChoice};
use crate::device::Device;
use crate::device::cpu::Cpu;
use crate::device::cuda::driver::gpu::Gpu;
use crate::device::cuda::driver::simt::Simt;
use crate::device::cuda::driver::{Driver, Generation};
use crate::device::cuda::{self, Cuda, KernelCost, Mode, Operands};
use crate::error::{Error, Result};
use crate::plan::{Machine, Plan, PlanOptions};

/// Order in which the SIMT host machine takes its threads. Results do not depend on it; tests try others.
const SIMT_SEED: u64 = 1;

/// A device, what it is, and why it was taken.
pub struct Opened {
    /// The device.
    pub device: Box<dyn Device>,
    /// Which it is: never [`DeviceKind::Auto`].
    pub kind: DeviceKind,
    /// What it computes in.
    pub precision: Precision,
    /// `device: NAME: WHY`, the first line of a run.
    pub text: String,
}

/// The device that `kind` asks for, computing in `precision`, if that is left open in what suits the device, with `threads`
/// threads on the host; 0 takes one per core.
///
/// # Errors
/// When it cannot be had, or does not compute in that precision.
pub fn open_device(kind: DeviceKind, precision: impl Into<PrecisionChoice>, threads: usize) -> Result<Opened> {
    open_device_with(kind, precision, threads, KernelChoice::Auto)
}

/// As [`open_device`], with these kernels on a device that runs kernels.
///
/// # Errors
/// As [`open_device`], and when the card is not one for these kernels.
pub fn open_device_with(
    kind: DeviceKind,
    precision: impl Into<PrecisionChoice>,
    threads: usize,
    kernels: KernelChoice,
) -> Result<Opened> {
    let asked: PrecisionChoice = precision.into();
    // Batches are filled by the process's own pool, beside the device's; the first to ask decides its size.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    let (device, kind, why) = match kind {
        DeviceKind::Cpu => (cpu(asked.on(kind), threads)?, kind, "asked for".to_string()),
        DeviceKind::Cuda(_) | DeviceKind::Simt => {
            (open_kernels(kind, asked.on(kind), Mode::Graph, kernels)?, kind, "asked for".to_string())
        }
        DeviceKind::Auto if asked == Precision::F64.into() => {
            (cpu(Precision::F64, threads)?, DeviceKind::Cpu, "the only one that computes in f64".to_string())
        }
        DeviceKind::Auto => match working_gpu() {
            Ok(gpu) => {
                let kind = DeviceKind::Cuda(0);
                (cuda(with(gpu, kernels)?, asked.on(kind), Mode::Graph)?, kind, "the GPU works".to_string())
            }
            Err(why) => (cpu(asked.on(DeviceKind::Cpu), threads)?, DeviceKind::Cpu, why),
        },
    };
    let text = format!("device: {}: {why}", device.describe());
    Ok(Opened { device, kind, precision: asked.on(kind), text })
}

/// The first card, or in words why not.
fn working_gpu() -> std::result::Result<Gpu, String> {
    Gpu::probe().map_err(|missing| format!("{} (mlnt info says more)", missing.brief()))?;
    Gpu::open(0).map_err(|why| format!("no GPU is used: {why}"))
}

fn cpu(precision: Precision, threads: usize) -> Result<Box<dyn Device>> {
    cpu_computes(precision)?;
    match precision {
        Precision::F64 => Ok(Box::new(Cpu::<f64>::new(threads)?)),
        _ => Ok(Box::new(Cpu::<f32>::new(threads)?)),
    }
}

/// Refuses what the CPU does not compute in.
fn cpu_computes(precision: Precision) -> Result<()> {
    match precision {
        Precision::F32 | Precision::F64 => Ok(()),
        Precision::Tf32 | Precision::F16 | Precision::Bf16 => Err(Error::usage(format_args!(
            "the CPU computes in f32 and f64; {precision} is for --device cuda, or --device simt to check kernels"
        ))),
    }
}

/// The operand type of convolutions that stands for `precision` on CUDA devices.
///
/// # Errors
/// For f64.
pub fn operands(precision: Precision) -> Result<Operands> {
    match precision {
        Precision::F32 => Ok(Operands::F32),
        Precision::Tf32 => Ok(Operands::Tf32),
        Precision::F16 => Ok(Operands::F16),
        Precision::Bf16 => Ok(Operands::Bf16),
        Precision::F64 => Err(Error::usage(
            "the CUDA kernels, on a GPU or simulated, compute in f32, tf32, f16 and bf16; f64 is for --device cpu",
        )),
    }
}

/// The kernels that a choice means where there is no card.
pub fn without_a_card(kernels: KernelChoice) -> Generation {
    match kernels {
        KernelChoice::Auto | KernelChoice::Portable => Generation::Portable,
        KernelChoice::Hopper => Generation::Hopper,
    }
}

/// The card with these kernels.
fn with(gpu: Gpu, kernels: KernelChoice) -> Result<Gpu> {
    match kernels {
        KernelChoice::Auto => Ok(gpu),
        KernelChoice::Portable => gpu.like(Generation::Portable),
        KernelChoice::Hopper => gpu.like(Generation::Hopper),
    }
}

fn cuda(driver: impl Driver + 'static, precision: Precision, mode: Mode) -> Result<Box<dyn Device>> {
    Ok(Box::new(Cuda::new(Box::new(driver), operands(precision)?, mode)))
}

/// A device that runs the CUDA kernels, launched as `mode` says: a GPU or the SIMT host machine.
///
/// # Errors
/// As [`open_device_with`], and for a `kind` that names neither.
pub fn open_kernels(
    kind: DeviceKind,
    precision: Precision,
    mode: Mode,
    kernels: KernelChoice,
) -> Result<Box<dyn Device>> {
    match kind {
        DeviceKind::Cuda(n) => cuda(with(Gpu::open(n)?, kernels)?, precision, mode),
        DeviceKind::Simt => cuda(Simt::open(SIMT_SEED)?.like(without_a_card(kernels)), precision, mode),
        DeviceKind::Auto | DeviceKind::Cpu => Err(Error::usage(format_args!(
            "device {kind} is not one that runs the CUDA kernels; those are cuda, cuda:N and simt"
        ))),
    }
}

/// What the default for branch groups goes by on a device of this kind, without one; see [`Device::machine`].
///
/// # Errors
/// When the device does not compute in `precision`.
pub fn machine(kind: DeviceKind, precision: Precision) -> Result<Option<Machine>> {
    match kind {
        DeviceKind::Cuda(_) | DeviceKind::Simt => Ok(Some(cuda::machine(operands(precision)?))),
        DeviceKind::Auto | DeviceKind::Cpu => Ok(None),
    }
}

/// What the CUDA kernels of a plan take in `precision` on a card of this generation, without a machine.
///
/// # Errors
/// When the kernels cannot take a size of the plan or do not compute in `precision`.
pub fn kernel_cost(plan: &Plan, precision: Precision, generation: Generation) -> Result<KernelCost> {
    KernelCost::of(plan, operands(precision)?, generation)
}

/// How the device `kind` has its plans built, without opening it; [`DeviceKind::Auto`] counts as the processor.
///
/// # Errors
/// When its kernels do not compute in `precision`.
pub fn plan_options(kind: DeviceKind, precision: Precision) -> Result<PlanOptions> {
    match kind {
        DeviceKind::Cuda(_) | DeviceKind::Simt => Ok(Cuda::plan_options_for(operands(precision)?)),
        DeviceKind::Auto | DeviceKind::Cpu => cpu_computes(precision).map(|()| PlanOptions::default()),
    }
}
