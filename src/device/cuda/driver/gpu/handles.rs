//! What the driver hands out, each given back when it is dropped, and the one place where its errors become words.
//!
//! Everything here but [`Context::retain`] needs its context current on the calling thread, dropping included:
//! [`super::Gpu`] sees to that. All of it holds raw pointers and so stays on the thread that made it.

#![allow(unsafe_code)]

use crate::error::Error;
use cudarc::driver::result::DriverError;
use cudarc::driver::sys::{self, CUresult};
use std::ffi::c_void;
use std::fmt::Display;
use std::ptr::{NonNull, null_mut};

/// A call of the driver that failed.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    /// What the driver answered.
    pub code: CUresult,
    /// What was being done, and the answer's name and description.
    pub what: String,
}

impl Failure {
    /// The error for the user of card `ordinal`.
    pub fn on(self, ordinal: usize) -> Error {
        Error::Device { device: format!("cuda:{ordinal}"), what: self.what }
    }
}

/// What a call of the driver yields.
pub(super) type Call<T> = Result<T, Failure>;

/// Every answer of the driver passes through here; `doing` is formatted only when it is an error.
pub(super) fn check(code: CUresult, doing: impl Display) -> Call<()> {
    if code == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let error = DriverError(code);
    let name = error.error_name().map_or_else(|_| format!("error {}", code as u32), |s| s.to_string_lossy().into());
    let text = error.error_string().map_or_else(|_| "no description".into(), |s| s.to_string_lossy());
    let hint = if is_of_a_kernel(code) {
        "; a kernel queued before has failed: with CUDA_LAUNCH_BLOCKING=1 in the environment and no graphs, the error \
         arises at its launch"
    } else {
        ""
    };
    Err(Failure { code, what: format!("{doing}: {name} ({text}){hint}") })
}

/// Errors of running kernels: they arise at some later call, and the context is lost.
fn is_of_a_kernel(code: CUresult) -> bool {
    matches!(
        code,
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
            | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
            | CUresult::CUDA_ERROR_ASSERT
            | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
            | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUresult::CUDA_ERROR_INVALID_PC
            | CUresult::CUDA_ERROR_LAUNCH_FAILED
    )
}

/// A card's primary context, which all of a process shares.
pub(super) struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
}

impl Context {
    /// Retains the context of `device`, creating it if need be, and makes it current.
    pub fn retain(device: sys::CUdevice) -> Call<Self> {
        let mut raw = null_mut();
        // SAFETY: writes one handle, which `drop` releases once.
        check(unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut raw, device) }, "opening a context on the card")?;
        let context = Context { device, raw };
        context.bind()?;
        Ok(context)
    }

    /// Makes it current on the calling thread. Allowed while a stream is recorded.
    pub fn bind(&self) -> Call<()> {
        // SAFETY: the context is retained until `self` is dropped.
        check(unsafe { sys::cuCtxSetCurrent(self.raw) }, "making the card's context current")
    }

    /// Bytes that can be allocated.
    pub fn free_bytes(&self) -> Call<usize> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is current; writes two sizes.
        check(unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) }, "asking for the free memory")?;
        Ok(free)
    }

    /// Waits for all work in the context.
    pub fn synchronize(&self) -> Call<()> {
        // SAFETY: the context is current.
        check(unsafe { sys::cuCtxSynchronize() }, "waiting for the card")
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once, released once. It must not stay current: nothing keeps it alive any longer. Whoever
        // has another context on this thread makes it current again before every call.
        unsafe {
            let _ = sys::cuCtxSetCurrent(null_mut());
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

/// A stream that does not wait for the default stream.
pub(super) struct Queue(pub sys::CUstream);

impl Queue {
    pub fn new() -> Call<Self> {
        let mut raw = null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: writes one handle.
        check(unsafe { sys::cuStreamCreate(&raw mut raw, flags) }, "creating a stream")?;
        Ok(Queue(raw))
    }

    /// Waits for all its work.
    pub fn synchronize(&self) -> Call<()> {
        // SAFETY: the stream lives.
        check(unsafe { sys::cuStreamSynchronize(self.0) }, "waiting for a stream")
    }

    /// Lets its further work wait for `mark`.
    pub fn wait(&self, mark: &Mark) -> Call<()> {
        // SAFETY: stream and event live; flags must be 0.
        check(unsafe { sys::cuStreamWaitEvent(self.0, mark.0, 0) }, "letting a stream wait for an event")
    }

    /// Starts to record what this thread queues on it. Other threads may go on calling the driver.
    pub fn begin_capture(&self) -> Call<()> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives, and is not the default stream, which cannot be recorded.
        check(unsafe { sys::cuStreamBeginCapture_v2(self.0, mode) }, "starting to record launches")
    }

    /// Ends recording, on the thread that began it.
    pub fn end_capture(&self) -> Call<Recorded> {
        let mut raw = null_mut();
        // SAFETY: the stream lives; writes one handle, null when the recording is of no use.
        let code = unsafe { sys::cuStreamEndCapture(self.0, &raw mut raw) };
        let recorded = Recorded(raw);
        check(code, "recording launches")?;
        Ok(recorded)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once; work still queued runs to its end.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.0) };
    }
}

/// An event.
pub(super) struct Mark(sys::CUevent);

impl Mark {
    /// One that measures time.
    pub fn timing() -> Call<Self> {
        Self::new(sys::CUevent_flags::CU_EVENT_DEFAULT)
    }

    /// One to wait for only, which costs the card less.
    pub fn untimed() -> Call<Self> {
        Self::new(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    fn new(flags: sys::CUevent_flags) -> Call<Self> {
        let mut raw = null_mut();
        // SAFETY: writes one handle.
        check(unsafe { sys::cuEventCreate(&raw mut raw, flags as u32) }, "creating an event")?;
        Ok(Mark(raw))
    }

    /// Moves it to the present end of `queue`.
    pub fn record(&self, queue: &Queue) -> Call<()> {
        // SAFETY: both live, and belong to the one context.
        check(unsafe { sys::cuEventRecord(self.0, queue.0) }, "recording an event")
    }

    /// Whether the work before it is done.
    pub fn is_done(&self) -> Call<bool> {
        // SAFETY: the event lives.
        match unsafe { sys::cuEventQuery(self.0) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => check(code, "asking for an event").map(|()| true),
        }
    }

    /// Waits for the work before it.
    pub fn wait(&self) -> Call<()> {
        // SAFETY: the event lives.
        check(unsafe { sys::cuEventSynchronize(self.0) }, "waiting for queued work")
    }

    /// Milliseconds from `earlier` to here; both must be done.
    pub fn since(&self, earlier: &Mark) -> Call<f32> {
        let mut milliseconds = 0.0;
        // SAFETY: both live; writes one float.
        let code = unsafe { sys::cuEventElapsedTime(&raw mut milliseconds, earlier.0, self.0) };
        check(code, "measuring the time between two events")?;
        Ok(milliseconds)
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once; the driver keeps what pending work needs of it.
        let _ = unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

/// Host memory that the card reads and writes by itself, so that copies need not wait for the host.
pub(super) struct Pinned {
    at: NonNull<u8>,
    bytes: usize,
}

impl Pinned {
    pub fn new(bytes: usize) -> Call<Self> {
        let mut at = null_mut();
        // SAFETY: writes one pointer.
        let code = unsafe { sys::cuMemHostAlloc(&raw mut at, bytes, 0) };
        check(code, format_args!("taking {bytes} bytes of page-locked host memory"))?;
        let no_memory = || Failure { code: CUresult::CUDA_ERROR_OUT_OF_MEMORY, what: "no page-locked memory".into() };
        let at = NonNull::new(at.cast::<u8>()).ok_or_else(no_memory)?;
        // SAFETY: all of it was just given to us; from here on every byte of it has a value.
        unsafe { at.write_bytes(0, bytes) };
        Ok(Pinned { at, bytes })
    }

    /// Its first byte.
    pub fn as_ptr(&self) -> *const c_void {
        self.at.as_ptr().cast()
    }

    /// Its bytes `start..start + len`; none where there are not as many.
    ///
    /// # Safety
    /// The card must neither read nor write them while the slice lives.
    pub unsafe fn slice_mut(&mut self, start: usize, len: usize) -> &mut [u8] {
        assert!(start <= self.bytes && len <= self.bytes - start, "bookkeeping of page-locked memory");
        // SAFETY: inside the allocation, initialised, borrowed with `self`; the caller vouches for the card.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr().add(start), len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated once, freed once; the owner has waited for all copies.
        let _ = unsafe { sys::cuMemFreeHost(self.at.as_ptr().cast()) };
    }
}

/// Code on the card.
pub(super) struct Module(sys::CUmodule);

impl Module {
    /// Loads an image: a cubin, or PTX that ends with a NUL, which the driver compiles.
    pub fn load(image: &'static [u8], name: &str) -> Call<Self> {
        use sys::CUjit_option::{CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES};
        let mut log = vec![0u8; 8192];
        let mut options = [CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
        // A size is passed in place of a pointer to it.
        let mut values = [log.as_mut_ptr().cast::<c_void>(), std::ptr::without_provenance_mut(log.len())];
        let mut raw = null_mut();
        // SAFETY: the image is whole (the build checks its end and alignment), options and values are as many as is
        // said, and the log outlives the call.
        let code = unsafe {
            sys::cuModuleLoadDataEx(
                &raw mut raw,
                image.as_ptr().cast(),
                options.len() as u32,
                options.as_mut_ptr(),
                values.as_mut_ptr(),
            )
        };
        check(code, format_args!("loading the kernels of {name}")).map_err(|mut failure| {
            let end = log.iter().position(|b| *b == 0).unwrap_or(log.len());
            let said = String::from_utf8_lossy(&log[..end]);
            if !said.trim().is_empty() {
                failure.what += &format!("; the driver's compiler says: {}", said.trim());
            }
            failure
        })?;
        Ok(Module(raw))
    }

    /// The kernel `name`; valid while the module lives.
    pub fn function(&self, name: &str) -> Call<sys::CUfunction> {
        let missing = || Failure { code: CUresult::CUDA_ERROR_NOT_FOUND, what: format!("no kernel named {name:?}") };
        let text = std::ffi::CString::new(name).map_err(|_| missing())?;
        let mut raw = null_mut();
        // SAFETY: the module lives, the name is a C string; writes one handle.
        let code = unsafe { sys::cuModuleGetFunction(&raw mut raw, self.0, text.as_ptr()) };
        check(code, format_args!("looking for kernel {name}"))?;
        Ok(raw)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded once, unloaded once; the owner has waited for its kernels.
        let _ = unsafe { sys::cuModuleUnload(self.0) };
    }
}

/// A recorded sequence, not yet ready to run; null where nothing was recorded.
pub(super) struct Recorded(sys::CUgraph);

impl Recorded {
    /// Makes it ready to run.
    pub fn instantiate(&self) -> Call<Replay> {
        let mut raw = null_mut();
        // SAFETY: the graph lives; writes one handle; flags 0 is the default.
        let code = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut raw, self.0, 0) };
        check(code, "making a graph of the recorded launches")?;
        Ok(Replay(raw))
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: given to us once, destroyed once; what was made from it does not need it.
            let _ = unsafe { sys::cuGraphDestroy(self.0) };
        }
    }
}

/// A recorded sequence, ready to run.
pub(super) struct Replay(sys::CUgraphExec);

impl Replay {
    /// Queues it.
    pub fn launch(&self, queue: &Queue) -> Call<()> {
        // SAFETY: both live.
        check(unsafe { sys::cuGraphLaunch(self.0, queue.0) }, "replaying recorded launches")
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once; a run under way is let finish by the driver.
        let _ = unsafe { sys::cuGraphExecDestroy(self.0) };
    }
}
