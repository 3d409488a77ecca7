//! The element types of the CPU device.

use super::microkernel::Kernels;
use crate::device::HostVec;

/// `f32` or `f64`.
pub trait Real:
    Kernels + num_traits::Float + num_traits::NumAssign + bytemuck::Pod + std::iter::Sum + Send + Sync + std::fmt::Debug
{
    /// Its name on the command line.
    const NAME: &'static str;
    /// Nearest value to `x`.
    fn of(x: f64) -> Self;
    /// Exact value of `self`.
    fn f64(self) -> f64;
    /// Values to hand to the host.
    fn into_host(values: Vec<Self>) -> HostVec;
}

macro_rules! real {
    ($t:ty, $name:literal, $variant:ident) => {
        impl Real for $t {
            const NAME: &'static str = $name;
            #[inline(always)]
            fn of(x: f64) -> Self {
                x as $t
            }
            #[inline(always)]
            fn f64(self) -> f64 {
                f64::from(self)
            }
            fn into_host(values: Vec<Self>) -> HostVec {
                HostVec::$variant(values)
            }
        }
    };
}

real!(f32, "f32", F32);
real!(f64, "f64", F64);
