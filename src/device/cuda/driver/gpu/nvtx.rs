//! Named ranges for profilers, by the protocol of NVTX 3.
//!
//! A profiler names a library in `NVTX_INJECTION64_PATH`; a program loads it and calls its `InitializeInjectionNvtx2`
//! with a function that gives access to tables of function pointers, which the profiler fills. The protocol and its
//! numbers are those of NVTX's header `nvtxTypes.h`. The header itself would need a C compiler in every build, and
//! NVIDIA's crate needs libclang besides; libnvToolsExt, which cudarc loads, is no longer part of CUDA 13.
//!
//! Without a profiler a range costs one load of an atomic.

#![allow(unsafe_code)]

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::ptr::null;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Entries of a table, the first of which is unused, for the modules core, CUDA, OpenCL, CUDA runtime, core2 and sync.
const SIZES: [usize; 6] = [16, 9, 15, 7, 16, 7];
const MOST: usize = 16;

/// Position of `nvtxRangePushA` and `nvtxRangePop` in the table of the core module.
const CORE: usize = 0;
const RANGE_PUSH_A: usize = 9;
const RANGE_POP: usize = 11;

/// What the profiler wants called; null where it does not care.
static SLOTS: [[AtomicPtr<c_void>; MOST]; 6] = [const { [const { AtomicPtr::new(std::ptr::null_mut()) }; MOST] }; 6];

/// Tables of pointers to the slots, as the profiler sees them; a null ends each.
static TABLES: [[AtomicPtr<AtomicPtr<c_void>>; MOST + 1]; 6] =
    [const { [const { AtomicPtr::new(std::ptr::null_mut()) }; MOST + 1] }; 6];

type ExportTable = extern "C" fn(u32) -> *const c_void;
type Initialize = unsafe extern "C" fn(ExportTable) -> c_int;

/// `NvtxExportTableCallbacks`.
#[repr(C)]
struct Callbacks {
    bytes: usize,
    module_table: extern "C" fn(c_int, *mut *mut c_void, *mut c_uint) -> c_int,
}

/// `NvtxExportTableVersionInfo`.
#[repr(C)]
struct Version {
    bytes: usize,
    version: u32,
    reserved: u32,
    set_injection_version: extern "C" fn(u32),
}

static CALLBACKS: Callbacks = Callbacks { bytes: size_of::<Callbacks>(), module_table };
static VERSION: Version =
    Version { bytes: size_of::<Version>(), version: 3, reserved: 0, set_injection_version: ignore_version };

extern "C" fn ignore_version(_: u32) {}

extern "C" fn export_table(id: u32) -> *const c_void {
    match id {
        1 => (&raw const CALLBACKS).cast(),
        3 => (&raw const VERSION).cast(),
        _ => null(),
    }
}

extern "C" fn module_table(module: c_int, table: *mut *mut c_void, size: *mut c_uint) -> c_int {
    let index = usize::try_from(module).unwrap_or(0).wrapping_sub(1);
    let Some(entries) = SIZES.get(index) else { return 0 };
    // SAFETY: the profiler passes null, or a place for the answer.
    unsafe {
        if !size.is_null() {
            *size = *entries as c_uint;
        }
        if !table.is_null() {
            *table = TABLES[index].as_ptr().cast_mut().cast();
        }
    }
    1
}

/// Lets a profiler fill the tables; false if it does not want to.
fn attach(initialize: Initialize) -> bool {
    for ((table, slots), entries) in TABLES.iter().zip(&SLOTS).zip(SIZES) {
        for (entry, slot) in table.iter().zip(slots).take(entries).skip(1) {
            entry.store((&raw const *slot).cast_mut(), Ordering::Release);
        }
    }
    // SAFETY: the profiler's entry point, called once with what the protocol says; tables and slots live as long as
    // the program, and are atomics: the profiler may write them at any time.
    unsafe { initialize(export_table) != 0 }
}

/// Whether a profiler listens; asked once.
fn is_attached() -> bool {
    static ATTACHED: OnceLock<bool> = OnceLock::new();
    *ATTACHED.get_or_init(|| {
        let Some(path) = std::env::var_os("NVTX_INJECTION64_PATH") else { return false };
        // SAFETY: the library that the user's profiler names; loading it is what the variable asks for.
        let Ok(library) = (unsafe { libloading::Library::new(path) }) else { return false };
        // SAFETY: the protocol gives the symbol this type.
        let Ok(initialize) = (unsafe { library.get::<Initialize>(b"InitializeInjectionNvtx2") }).map(|symbol| *symbol)
        else {
            return false;
        };
        let attached = attach(initialize);
        if attached {
            // Its functions may be called until the program ends.
            std::mem::forget(library);
        }
        attached
    })
}

/// Opens a range on this thread.
pub(super) fn push(name: &str) {
    if is_attached() {
        push_to_profiler(name);
    }
}

fn push_to_profiler(name: &str) {
    let function = SLOTS[CORE][RANGE_PUSH_A].load(Ordering::Acquire);
    if function.is_null() {
        return;
    }
    let name = CString::new(name.replace('\0', " ")).unwrap_or_default();
    // SAFETY: the protocol gives this slot this type; the profiler copies the text.
    unsafe { std::mem::transmute::<*mut c_void, extern "C" fn(*const c_char) -> c_int>(function)(name.as_ptr()) };
}

/// Closes the range that this thread opened last.
pub(super) fn pop() {
    if is_attached() {
        pop_from_profiler();
    }
}

fn pop_from_profiler() {
    let function = SLOTS[CORE][RANGE_POP].load(Ordering::Acquire);
    if !function.is_null() {
        // SAFETY: the protocol gives this slot this type.
        unsafe { std::mem::transmute::<*mut c_void, extern "C" fn() -> c_int>(function)() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;
    use std::ptr::null_mut;
    use std::sync::Mutex;

    static HEARD: Mutex<Vec<String>> = Mutex::new(Vec::new());

    extern "C" fn hear_push(name: *const c_char) -> c_int {
        // SAFETY: ranges have C strings as names.
        HEARD.lock().unwrap().push(unsafe { CStr::from_ptr(name) }.to_string_lossy().into());
        0
    }

    extern "C" fn hear_pop() -> c_int {
        HEARD.lock().unwrap().push("end".into());
        0
    }

    /// Does what a profiler does, with the types of the protocol.
    unsafe extern "C" fn profiler(export_table: ExportTable) -> c_int {
        assert!(export_table(0).is_null() && export_table(2).is_null());
        // SAFETY: table 1 has this type.
        let callbacks = unsafe { &*export_table(1).cast::<Callbacks>() };
        assert_eq!(callbacks.bytes, 16);
        assert_eq!((callbacks.module_table)(0, null_mut(), null_mut()), 0);
        assert_eq!((callbacks.module_table)(7, null_mut(), null_mut()), 0);
        for (module, entries) in (1..).zip(SIZES) {
            let (mut table, mut size) = (null_mut::<c_void>(), 0);
            assert_eq!((callbacks.module_table)(module, &raw mut table, &raw mut size), 1);
            assert_eq!(size as usize, entries);
            let table = table.cast::<*mut *mut c_void>();
            // SAFETY: a table has as many entries as is said, and a null behind them.
            let entries = unsafe { std::slice::from_raw_parts(table, size as usize + 1) };
            assert!(entries[0].is_null() && entries[size as usize].is_null());
            assert!(entries[1..size as usize].iter().all(|entry| !entry.is_null()));
            if module == 1 {
                // SAFETY: an entry points to a place for a function.
                unsafe {
                    *entries[9] = hear_push as *mut c_void;
                    *entries[11] = hear_pop as *mut c_void;
                }
            }
        }
        1
    }

    #[test]
    fn a_profiler_hears_ranges() {
        push_to_profiler("before");
        assert!(attach(profiler));
        push_to_profiler("step");
        push_to_profiler("with\0nul");
        pop_from_profiler();
        pop_from_profiler();
        assert_eq!(*HEARD.lock().unwrap(), ["step", "with nul", "end", "end"]);
    }
}
