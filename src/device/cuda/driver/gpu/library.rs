//! The driver's library: whether it is there, what it can do, and which cards it finds.
//!
//! cudarc looks every function up at its first call, and panics when the library or the function is missing. So both
//! are asked for here, before any call; only [`library`] may be called without it.

#![allow(unsafe_code)]

use super::handles::{Call, Context, check};
use crate::error::{Error, Result};
use cudarc::driver::sys::{self, CUdevice_attribute, CUresult};
use std::ffi::{CStr, c_char};
use std::fmt;
use std::sync::OnceLock;

/// The oldest driver, as CUDA writes versions: 1000·major + 10·minor.
const OLDEST: i32 = 12_000;

/// Every function of the driver that this folder calls without asking for it first.
const FUNCTIONS: [&str; 44] = [
    "cuGetErrorName",
    "cuGetErrorString",
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGet",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceTotalMem_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuMemGetInfo_v2",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemsetD8Async",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuEventElapsedTime",
    "cuEventDestroy_v2",
    "cuModuleLoadDataEx",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuLaunchKernel",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
];

/// Why no card can be used at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missing {
    /// There is no driver.
    Library,
    /// The driver is older than CUDA 12.0; the newest CUDA it knows, 1000·major + 10·minor.
    TooOld(i32),
    /// The library has no function of this name.
    Function(&'static str),
    /// The driver does not start; its own words.
    Start(String),
    /// The driver is there and finds no card.
    Card,
}

impl Missing {
    /// The same in a few words, without advice.
    pub fn brief(&self) -> &'static str {
        match self {
            Missing::Library => "no NVIDIA driver",
            Missing::TooOld(_) => "the NVIDIA driver is too old",
            Missing::Function(_) => "the NVIDIA driver is damaged or too old",
            Missing::Start(_) => "the NVIDIA driver does not start",
            Missing::Card => "the NVIDIA driver finds no card",
        }
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Missing::Library => f.write_str(
                "no NVIDIA driver: its library (libcuda.so.1) was not found. A card needs NVIDIA's driver for CUDA \
                 12.0 or later, and one as new as the nvcc that built the kernels; a container must be given access to the driver (for instance docker run --gpus all)",
            ),
            Missing::TooOld(have) => {
                let (major, minor) = split(*have);
                write!(f, "the NVIDIA driver is too old: it knows CUDA up to {major}.{minor}, 12.0 or later is needed")
            }
            Missing::Function(name) => {
                write!(f, "the NVIDIA driver is damaged or too old: its library has no function {name}")
            }
            Missing::Start(why) => write!(f, "the NVIDIA driver does not start: {why}"),
            Missing::Card => f.write_str(
                "the NVIDIA driver is there, but finds no card (nvidia-smi lists them; CUDA_VISIBLE_DEVICES can hide \
                 them)",
            ),
        }
    }
}

impl std::error::Error for Missing {}

/// The driver's library, found, complete and started.
#[derive(Clone, Copy, Debug)]
pub(super) struct Library {
    /// The newest CUDA it knows: (major, minor).
    pub cuda: (u32, u32),
    /// It has `cuFuncGetParamInfo` (CUDA 12.4).
    pub param_info: bool,
    /// It has `cuFuncLoad` (CUDA 12.4).
    pub func_load: bool,
}

fn split(version: i32) -> (u32, u32) {
    let version = version.unsigned_abs();
    (version / 1000, version % 1000 / 10)
}

/// Finds and starts the driver; the answer is kept.
pub(super) fn library() -> std::result::Result<Library, Missing> {
    static FOUND: OnceLock<std::result::Result<Library, Missing>> = OnceLock::new();
    FOUND.get_or_init(find).clone()
}

fn find() -> std::result::Result<Library, Missing> {
    // SAFETY: loads what is installed under the driver's names and unloads it again; its initialisers are NVIDIA's.
    if !unsafe { sys::is_culib_present() } {
        return Err(Missing::Library);
    }
    // SAFETY: as above; it stays loaded. It cannot panic: the same names were found just now.
    let loaded = unsafe { sys::culib() };
    // SAFETY: the symbol is looked for and never used.
    let has = |name: &str| unsafe { loaded.get::<unsafe extern "C" fn()>(name.as_bytes()) }.is_ok();
    let mut version = 0;
    if !has("cuDriverGetVersion") {
        return Err(Missing::Function("cuDriverGetVersion"));
    }
    // SAFETY: the function is there, may be called before cuInit, and writes one int.
    let answer = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    if answer == CUresult::CUDA_SUCCESS && version < OLDEST {
        return Err(Missing::TooOld(version));
    }
    if let Some(name) = FUNCTIONS.into_iter().find(|name| !has(name)) {
        return Err(Missing::Function(name));
    }
    let start = |failure: super::handles::Failure| match failure.code {
        CUresult::CUDA_ERROR_NO_DEVICE => Missing::Card,
        _ => Missing::Start(failure.what),
    };
    check(answer, "cuDriverGetVersion").map_err(start)?;
    // SAFETY: the function is there; its one argument must be 0.
    check(unsafe { sys::cuInit(0) }, "cuInit").map_err(start)?;
    Ok(Library { cuda: split(version), param_info: has("cuFuncGetParamInfo"), func_load: has("cuFuncLoad") })
}

/// A card, as the driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// Its number, as in `cuda:0`.
    pub ordinal: usize,
    /// NVIDIA's name of it.
    pub name: String,
    /// Compute capability: (major, minor).
    pub capability: (u32, u32),
    /// All its memory, bytes.
    pub memory: usize,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
}

impl fmt::Display for Card {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.capability;
        write!(f, "{}, sm_{major}{minor}, {:.0} GB", self.name, self.memory as f64 / 1e9)
    }
}

impl Card {
    /// Its memory that is free now, bytes. Takes a context on the card for that (tenths of a second, some hundred MB
    /// while it lasts), unless this process has one.
    ///
    /// # Errors
    /// When the driver is not there or refuses.
    pub fn free_bytes(&self) -> Result<usize> {
        library().map_err(|missing| Error::usage(format_args!("device cuda:{}: {missing}", self.ordinal)))?;
        let free = || {
            let context = Context::retain(device(self.ordinal)?)?;
            context.free_bytes()
        };
        free().map_err(|failure| failure.on(self.ordinal))
    }
}

/// What a machine has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The newest CUDA that the driver knows: (major, minor).
    pub cuda: (u32, u32),
    /// Its cards; at least one.
    pub cards: Vec<Card>,
}

/// Asks the driver for its version and cards.
pub(super) fn probe() -> std::result::Result<Probe, Missing> {
    let library = library()?;
    let cards = || -> Call<Vec<Card>> { (0..count()?).map(card).collect() };
    match cards() {
        Ok(cards) if cards.is_empty() => Err(Missing::Card),
        Ok(cards) => Ok(Probe { cuda: library.cuda, cards }),
        Err(failure) => Err(Missing::Start(failure.what)),
    }
}

fn count() -> Call<usize> {
    let mut count = 0;
    // SAFETY: writes one int.
    check(unsafe { sys::cuDeviceGetCount(&raw mut count) }, "counting the cards")?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// The driver's handle of a card.
pub(super) fn device(ordinal: usize) -> Call<sys::CUdevice> {
    let mut device = 0;
    let number = i32::try_from(ordinal).unwrap_or(i32::MAX);
    // SAFETY: writes one handle; a number out of range is an error.
    check(unsafe { sys::cuDeviceGet(&raw mut device, number) }, format_args!("opening card {ordinal}"))?;
    Ok(device)
}

/// An attribute of a card; negative values, which none has that is asked for, become 0.
pub(super) fn attribute(device: sys::CUdevice, which: CUdevice_attribute) -> Call<u32> {
    let mut value = 0;
    // SAFETY: `device` comes from [`device`]; writes one int.
    let code = unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) };
    check(code, format_args!("asking the card for {which:?}"))?;
    Ok(u32::try_from(value).unwrap_or(0))
}

fn card(ordinal: usize) -> Call<Card> {
    use CUdevice_attribute as A;
    let device = device(ordinal)?;
    let mut name = [0; 256];
    // SAFETY: writes a C string of at most as many bytes as it is told there are.
    let code = unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast::<c_char>(), name.len() as i32, device) };
    check(code, "asking the card for its name")?;
    let name = CStr::from_bytes_until_nul(&name).map_or_else(|_| "?".into(), |name| name.to_string_lossy().into());
    let mut memory = 0;
    // SAFETY: writes one size.
    check(unsafe { sys::cuDeviceTotalMem_v2(&raw mut memory, device) }, "asking the card for its memory")?;
    let capability = (
        attribute(device, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(device, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    let multiprocessors = attribute(device, A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    Ok(Card { ordinal, name, capability, memory, multiprocessors })
}
