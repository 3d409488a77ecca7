//! Kernels on the card: the image of each module that suits it, and the functions in them.
//!
//! All are loaded when the card is opened: nothing is loaded later, least of all while launches are recorded.

#![allow(unsafe_code)]

use super::super::KernelInfo;
use super::handles::{Call, Failure, Module, check};
use super::library::{Card, Library};
use crate::device::cuda::embedded::{self, Arch, EmbeddedModule};
use cudarc::driver::sys::{self, CUfunction_attribute, CUresult};
use std::collections::{BTreeMap, HashMap};

/// A kernel on the card.
pub(super) struct Kernel {
    pub function: sys::CUfunction,
    pub info: KernelInfo,
}

/// All kernels, with the modules that hold them.
pub(super) struct Kernels {
    by_name: HashMap<&'static str, Kernel>,
    #[expect(dead_code, reason = "functions are valid while their modules are loaded")]
    modules: BTreeMap<&'static str, Module>,
}

impl Kernels {
    /// Loads every kernel for `card`, whose context is current; `shared` is the most bytes of shared memory that a
    /// block may have.
    pub fn load(library: Library, card: &Card, images: &[&'static EmbeddedModule], shared: u32) -> Call<Self> {
        let mut modules = BTreeMap::new();
        for image in images {
            let module = Module::load(image.image, image.name).map_err(|failure| explain(failure, library, image))?;
            modules.insert(image.name, module);
        }
        let mut by_name = HashMap::new();
        for kernel in embedded::kernels().iter().filter(|kernel| kernel.is_for(card.capability)) {
            let Some(module) = modules.get(kernel.module) else {
                let what = format!("{card}: no image of module {} for it", kernel.module);
                return Err(Failure { code: CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU, what });
            };
            let function = module.function(kernel.name)?;
            by_name.insert(kernel.name, Kernel::prepare(library, function, kernel.name, kernel.threads, shared)?);
        }
        Ok(Kernels { by_name, modules })
    }

    pub fn get(&self, name: &str) -> Option<&Kernel> {
        self.by_name.get(name)
    }
}

impl Kernel {
    /// Asks for its sizes and allows it all the shared memory there is: the limit is low unless it is raised.
    fn prepare(library: Library, function: sys::CUfunction, name: &str, threads: u32, shared: u32) -> Call<Self> {
        use CUfunction_attribute as A;
        if library.func_load {
            // SAFETY: the driver has this function; the kernel's module is loaded.
            check(unsafe { sys::cuFuncLoad(function) }, format_args!("loading kernel {name}"))?;
        }
        let attribute = |which: A| -> Call<u32> {
            let mut value = 0;
            // SAFETY: the kernel's module is loaded; writes one int.
            let code = unsafe { sys::cuFuncGetAttribute(&raw mut value, which, function) };
            check(code, format_args!("asking kernel {name} for {which:?}"))?;
            Ok(u32::try_from(value).unwrap_or(0))
        };
        let fixed = attribute(A::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        let most = i32::try_from(shared.saturating_sub(fixed)).unwrap_or(i32::MAX);
        let which = A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the kernel's module is loaded; the value is within what the card allows.
        let code = unsafe { sys::cuFuncSetAttribute(function, which, most) };
        check(code, format_args!("allowing kernel {name} {most} bytes of shared memory"))?;
        let threads = threads.min(attribute(A::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?);
        Ok(Kernel { function, info: KernelInfo { params: params_size(library, function, name)?, threads } })
    }
}

/// Bytes of the parameter struct, from the driver, or where it is too old to tell, from the same source compiled for
/// the host.
fn params_size(library: Library, function: sys::CUfunction, name: &str) -> Call<usize> {
    if library.param_info {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: the driver has this function; the kernel's module is loaded; writes two sizes.
        let code = unsafe { sys::cuFuncGetParamInfo(function, 0, &raw mut offset, &raw mut size) };
        check(code, format_args!("asking kernel {name} for its parameters"))?;
        return Ok(size);
    }
    let (major, minor) = library.cuda;
    embedded::simt_kernel(name).map(|kernel| kernel.params_size as usize).ok_or_else(|| Failure {
        code: CUresult::CUDA_ERROR_NOT_SUPPORTED,
        what: format!(
            "the NVIDIA driver is too old: it knows CUDA up to {major}.{minor}; 12.4 or later is needed by a program \
             that was built without a C++20 compiler"
        ),
    })
}

/// The best image of every module for `card`, or why there is none.
pub(super) fn images(card: &Card) -> Result<Vec<&'static EmbeddedModule>, String> {
    let found = embedded::modules_for(card.capability);
    if embedded::nvcc_version().is_some()
        && embedded::kernels()
            .iter()
            .filter(|k| k.is_for(card.capability))
            .all(|k| found.iter().any(|m| m.name == k.module))
    {
        return Ok(found);
    }
    Err(why_none(card, embedded::nvcc_version(), embedded::modules()))
}

fn why_none(card: &Card, nvcc: Option<&str>, modules: &[EmbeddedModule]) -> String {
    let Some(version) = nvcc else {
        return "this program was built without nvcc and has no kernels for cards: run scripts/install_nvcc.sh (or set \
                NVCC to an nvcc of CUDA 12.0 or later) and build it again"
            .into();
    };
    let mut names: Vec<String> = Vec::new();
    for module in modules {
        let name = match module.arch {
            Arch::Sm(number) => format!("sm_{number}"),
            Arch::SmOnly(number) => format!("sm_{number}a"),
            Arch::Ptx(number) => format!("PTX for sm_{number} and later"),
        };
        if !names.contains(&name) {
            names.push(name);
        }
    }
    format!("this program (nvcc {version}) has no kernels for {card}; it has them for {}", names.join(", "))
}

/// Adds to the failure of loading an image what can be done about it.
fn explain(mut failure: Failure, library: Library, image: &EmbeddedModule) -> Failure {
    let Some(nvcc) = embedded::nvcc_version() else { return failure };
    failure.what += &format!(" ({:?}, compiled by nvcc {nvcc})", image.arch);
    if is_newer(nvcc, library.cuda) {
        let (major, minor) = library.cuda;
        failure.what += &format!(
            "; the NVIDIA driver knows CUDA up to {major}.{minor}: update it, or build this program with an nvcc that \
             is not newer"
        );
    }
    failure
}

/// Whether nvcc, by its version such as `13.0.88`, is newer than the CUDA that a driver knows.
fn is_newer(nvcc: &str, cuda: (u32, u32)) -> bool {
    let mut parts = nvcc.split('.').map_while(|part| part.parse().ok());
    matches!((parts.next(), parts.next()), (Some(major), Some(minor)) if (major, minor) > cuda)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(capability: (u32, u32)) -> Card {
        Card { ordinal: 0, name: "Card".into(), capability, memory: 16_000_000_000, multiprocessors: 40 }
    }

    #[test]
    fn a_card_without_kernels_is_told_what_there_is_and_what_to_do() {
        let none = why_none(&card((9, 0)), None, &[]);
        assert!(none.contains("scripts/install_nvcc.sh") && none.contains("NVCC"), "{none}");
        let archs = [Arch::Sm(80), Arch::SmOnly(90), Arch::Ptx(80)];
        let modules: Vec<EmbeddedModule> =
            ["a", "b"].iter().flat_map(|name| archs.map(|arch| EmbeddedModule { name, arch, image: &[] })).collect();
        assert_eq!(
            why_none(&card((7, 5)), Some("13.0.88"), &modules),
            "this program (nvcc 13.0.88) has no kernels for Card, sm_75, 16 GB; it has them for sm_80, sm_90a, PTX for \
             sm_80 and later"
        );
    }

    #[test]
    fn images_are_there_for_every_card_of_capability_8_and_later_if_nvcc_was() {
        for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)] {
            let found = images(&card(capability));
            assert_eq!(found.is_ok(), embedded::nvcc_version().is_some(), "{capability:?} {found:?}");
        }
    }

    #[test]
    fn a_driver_is_told_to_be_older_than_nvcc() {
        assert!(is_newer("13.0.88", (12, 4)) && is_newer("12.8.61", (12, 4)) && is_newer("13.1.0", (13, 0)));
        assert!(!is_newer("12.4.99", (12, 4)) && !is_newer("12.9.1", (13, 0)) && !is_newer("unknown", (12, 0)));
    }
}
