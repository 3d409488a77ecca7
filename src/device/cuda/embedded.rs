//! The kernels that the build put into this program, and which of their images a card can run.
//!
//! `build.rs` compiles each `kernels/NAME.cu` into a module NAME with one image per architecture. Without nvcc there
//! are no modules; the list of kernels is read from the sources and is always there. With a C++20 compiler the same
//! kernels are in the program once more, as functions for the SIMT host machine.

#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_void};

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// What an image was compiled for. Numbers are 10·major + minor of the compute capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    /// Machine code: runs on cards of the same major and of the same or a later minor capability.
    Sm(u32),
    /// Machine code with instructions of one generation alone (`sm_90a`): runs on exactly this capability.
    SmOnly(u32),
    /// PTX, compiled by the driver: runs on cards of this capability and all later ones.
    Ptx(u32),
}

impl Arch {
    /// Whether a card of compute capability `(major, minor)` runs it. The rules are those of the CUDA C++ programming
    /// guide, "Binary compatibility", "PTX compatibility" and "Architecture-specific features".
    pub fn runs_on(self, capability: (u32, u32)) -> bool {
        let (major, minor) = capability;
        match self {
            Arch::Sm(number) => number / 10 == major && number % 10 <= minor,
            Arch::SmOnly(number) => (number / 10, number % 10) == capability,
            Arch::Ptx(number) => (number / 10, number % 10) <= capability,
        }
    }

    /// Orders the images that a card can run: machine code before PTX, later before earlier.
    fn rank(self) -> (bool, u32) {
        match self {
            Arch::Ptx(number) => (false, number),
            Arch::Sm(number) | Arch::SmOnly(number) => (true, number),
        }
    }
}

impl std::fmt::Display for Arch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Arch::Sm(number) => write!(f, "sm_{number}"),
            Arch::SmOnly(number) => write!(f, "sm_{number}a"),
            Arch::Ptx(number) => write!(f, "PTX of compute_{number}"),
        }
    }
}

/// One source file compiled for one architecture.
#[derive(Debug)]
pub struct EmbeddedModule {
    /// Name of the source file without `.cu`.
    pub name: &'static str,
    /// What it was compiled for.
    pub arch: Arch,
    /// A cubin, or PTX that ends with a NUL, as the driver takes them; starts at a multiple of 16 bytes.
    pub image: &'static [u8],
}

/// One kernel, as its source declares it.
#[derive(Debug)]
pub struct EmbeddedKernel {
    /// `operation_variant_dtype`.
    pub name: &'static str,
    /// The module that holds it.
    pub module: &'static str,
    /// Its parameter struct, which stands in the same file.
    pub params: &'static str,
    /// The most threads a block may have.
    pub threads: u32,
    /// It exists for cards of compute capability 9.0 alone.
    pub sm_90a: bool,
}

impl EmbeddedKernel {
    /// Whether cards of compute capability `(major, minor)` are to have it.
    pub fn is_for(&self, capability: (u32, u32)) -> bool {
        !self.sm_90a || Arch::SmOnly(90).runs_on(capability)
    }
}

/// A kernel on the SIMT host machine: `simt::Kernel` of `kernels/simt/simt.h`.
#[repr(C)]
#[derive(Debug)]
pub struct SimtKernel {
    /// The kernel's name as a C string.
    pub name: *const c_char,
    /// Runs one thread.
    pub body: unsafe extern "C" fn(params: *const c_void),
    /// Size of the parameter struct in bytes.
    pub params_size: u32,
    /// The most threads a block may have.
    pub most_threads: u32,
}

/// `mlnt_simt_launch` of `kernels/simt/machine.cpp`: runs blocks `block_from..block_to` of a launch on the calling
/// thread; 0, or an error in words in `error`.
pub type SimtLaunch = unsafe extern "C" fn(
    kernel: *const SimtKernel,
    params: *const c_void,
    params_size: usize,
    grid: *const u32,
    threads: u32,
    shared_bytes: usize,
    block_from: u64,
    block_to: u64,
    seed: u64,
    error: *mut c_char,
    error_size: usize,
) -> c_int;

/// `simt::BankUse` of `kernels/simt/simt.h`: how accesses of 16 bytes to shared memory meet in its banks.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BankUse {
    /// Phases of eight lanes each.
    pub phases: u64,
    /// Wavefronts beyond the first of a phase.
    pub conflicts: u64,
    /// Most wavefronts of a phase.
    pub most: u64,
}

impl BankUse {
    /// Adds what others have counted.
    pub fn add(&mut self, other: BankUse) {
        self.phases += other.phases;
        self.conflicts += other.conflicts;
        self.most = self.most.max(other.most);
    }
}

/// `mlnt_simt_banks` of `kernels/simt/machine.cpp`: what the launches on the calling thread have counted since it last asked, of rows
/// of matrices, of stores and of copies.
pub type SimtBanks = unsafe extern "C" fn(banks: *mut [BankUse; 3]);

// SAFETY: descriptors are constants, and what they point to is never written.
unsafe impl Sync for SimtKernel {}

#[cfg(mlnt_simt)]
unsafe extern "C" {
    /// Written by `build.rs`, in the order of `ALL_KERNELS`. A null pointer follows.
    static mlnt_simt_kernels: [&'static SimtKernel; ALL_KERNELS.len()];

    /// `kernels/simt/machine.cpp`.
    fn mlnt_simt_launch(
        kernel: *const SimtKernel,
        params: *const c_void,
        params_size: usize,
        grid: *const u32,
        threads: u32,
        shared_bytes: usize,
        block_from: u64,
        block_to: u64,
        seed: u64,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;

    /// `kernels/simt/machine.cpp`.
    fn mlnt_simt_banks(banks: *mut [BankUse; 3]);
}

/// Puts an image where machine words can be read from it, as nvcc's own embedding does.
#[allow(dead_code, reason = "a build without nvcc has no images")]
#[repr(C, align(16))]
struct Aligned<T>(T);

/// The release of nvcc that made the modules, for instance `13.0.88`; None if the program was built without nvcc.
pub fn nvcc_version() -> Option<&'static str> {
    NVCC
}

/// All kernels in the order of their files and lines.
pub fn kernels() -> &'static [EmbeddedKernel] {
    ALL_KERNELS
}

/// All modules for all architectures.
pub fn modules() -> &'static [EmbeddedModule] {
    ALL_MODULES
}

/// Of each module the image that suits a card of compute capability `(major, minor)` best: machine code if there is
/// some for it, else PTX. Empty if the program was built without nvcc, or if the card is older than all images.
pub fn modules_for(capability: (u32, u32)) -> Vec<&'static EmbeddedModule> {
    best_of(ALL_MODULES, capability)
}

/// Whether the program was built with the SIMT host machine, that is with a C++20 compiler.
pub fn has_simt() -> bool {
    cfg!(mlnt_simt)
}

/// The kernel `name` on the SIMT host machine; None if there is no such kernel or no such machine.
pub fn simt_kernel(name: &str) -> Option<&'static SimtKernel> {
    let index = ALL_KERNELS.iter().position(|kernel| kernel.name == name)?;
    simt_kernels().get(index).copied()
}

/// All kernels on the SIMT host machine, in the order of [`kernels`]; none without such a machine.
#[cfg(mlnt_simt)]
pub fn simt_kernels() -> &'static [&'static SimtKernel] {
    // SAFETY: the table has an entry for each kernel, a pointer to a constant of the library that this program holds.
    unsafe { &*std::ptr::addr_of!(mlnt_simt_kernels) }
}

/// All kernels on the SIMT host machine, in the order of [`kernels`]; none without such a machine.
#[cfg(not(mlnt_simt))]
pub fn simt_kernels() -> &'static [&'static SimtKernel] {
    &[]
}

/// The entry of the SIMT host machine, if there is one.
#[cfg(mlnt_simt)]
pub fn simt_launch() -> Option<SimtLaunch> {
    Some(mlnt_simt_launch)
}

/// The entry of the SIMT host machine, if there is one.
#[cfg(not(mlnt_simt))]
pub fn simt_launch() -> Option<SimtLaunch> {
    None
}

/// What tells of the banks of the SIMT host machine, if there is one.
#[cfg(mlnt_simt)]
pub fn simt_banks() -> Option<SimtBanks> {
    Some(mlnt_simt_banks)
}

/// What tells of the banks of the SIMT host machine, if there is one.
#[cfg(not(mlnt_simt))]
pub fn simt_banks() -> Option<SimtBanks> {
    None
}

fn best_of(modules: &[EmbeddedModule], capability: (u32, u32)) -> Vec<&EmbeddedModule> {
    let mut best: Vec<&EmbeddedModule> = Vec::new();
    for module in modules.iter().filter(|module| module.arch.runs_on(capability)) {
        match best.iter_mut().find(|other| other.name == module.name) {
            Some(other) if other.arch.rank() < module.arch.rank() => *other = module,
            Some(_) => {}
            None => best.push(module),
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUILT: [Arch; 5] = [Arch::Sm(80), Arch::Sm(86), Arch::Sm(89), Arch::SmOnly(90), Arch::Ptx(80)];

    #[test]
    fn machine_code_runs_within_a_generation_and_upwards() {
        let capabilities = [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0)];
        let runs = |arch: Arch| capabilities.map(|capability| u8::from(arch.runs_on(capability)));
        assert_eq!(runs(Arch::Sm(80)), [0, 1, 1, 1, 1, 0, 0, 0]);
        assert_eq!(runs(Arch::Sm(86)), [0, 0, 1, 1, 1, 0, 0, 0]);
        assert_eq!(runs(Arch::Sm(89)), [0, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(runs(Arch::SmOnly(90)), [0, 0, 0, 0, 0, 1, 0, 0]);
        assert_eq!(runs(Arch::Ptx(80)), [0, 1, 1, 1, 1, 1, 1, 1]);
        assert!(!Arch::SmOnly(90).runs_on((9, 1)), "code of one generation alone does not move upwards");
    }

    #[test]
    fn the_best_image_is_the_latest_machine_code_then_ptx() {
        let modules: Vec<EmbeddedModule> = ["bn", "conv"]
            .iter()
            .flat_map(|name| BUILT.map(|arch| EmbeddedModule { name, arch, image: &[] }))
            .collect();
        let best = |capability| -> Vec<(&str, Arch)> {
            best_of(&modules, capability).iter().map(|module| (module.name, module.arch)).collect()
        };
        for (capability, arch) in [
            ((8, 0), Arch::Sm(80)),
            ((8, 6), Arch::Sm(86)),
            ((8, 7), Arch::Sm(86)),
            ((8, 9), Arch::Sm(89)),
            ((9, 0), Arch::SmOnly(90)),
            ((10, 0), Arch::Ptx(80)),
            ((12, 1), Arch::Ptx(80)),
        ] {
            assert_eq!(best(capability), [("bn", arch), ("conv", arch)], "{capability:?}");
        }
        assert_eq!(best((7, 5)), []);
    }

    #[test]
    fn every_kernel_has_an_image_for_every_card_that_is_to_have_it() {
        for kernel in kernels() {
            for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)] {
                let found = modules_for(capability).iter().any(|module| module.name == kernel.module);
                let wanted = nvcc_version().is_some() && kernel.is_for(capability);
                assert_eq!(found, wanted, "{} on {capability:?}", kernel.name);
            }
        }
        assert!(kernels().iter().any(|k| k.sm_90a) && kernels().iter().any(|k| !k.sm_90a));
        for module in modules() {
            let starts = if matches!(module.arch, Arch::Ptx(_)) { b"//".as_slice() } else { b"\x7fELF" };
            assert!(module.image.starts_with(starts), "{} {:?}", module.name, module.arch);
            assert_eq!(module.image.as_ptr() as usize % 16, 0);
            assert!(!matches!(module.arch, Arch::Ptx(_)) || module.image.ends_with(&[0]), "{}: PTX ends", module.name);
        }
    }

    #[test]
    fn the_host_machine_has_every_kernel_under_its_name() {
        for kernel in kernels() {
            let Some(found) = simt_kernel(kernel.name) else {
                assert!(!has_simt(), "{} is missing", kernel.name);
                continue;
            };
            // SAFETY: a C string constant of the library.
            let name = unsafe { std::ffi::CStr::from_ptr(found.name) };
            assert_eq!((name.to_str(), found.most_threads), (Ok(kernel.name), kernel.threads));
        }
        assert!(simt_kernel("no_such_kernel_f32").is_none());
    }
}
