//! Values on their way across the device's border: converted and put in its order, straight from one memory to the
//! other.

use super::layout::{Way, permute};
use super::real::Real;
use crate::device::{HostSlice, HostVec};
use crate::error::{Error, Result};
use crate::tape::Meta;

/// A tensor of the device that the host writes.
pub(super) struct Entry<'a> {
    /// `input` or `state`, for errors.
    pub kind: &'static str,
    pub name: &'a str,
    pub meta: &'a Meta,
    pub branches: usize,
}

impl Entry<'_> {
    fn error(&self, rest: std::fmt::Arguments<'_>) -> Error {
        Error::Device { device: "cpu".into(), what: format!("{} {} {rest}", self.kind, self.name) }
    }

    fn write<A: Copy, E>(&self, values: &[A], to: &mut [E], convert: impl Fn(A) -> E) -> Result<()> {
        if values.len() != to.len() {
            let (meta, want, have) = (self.meta, to.len(), values.len());
            return Err(self.error(format_args!("is {meta}, {want} values in all, and was given {have}")));
        }
        permute(self.meta, self.branches, Way::In, values, to, convert);
        Ok(())
    }

    /// Converts and writes reals.
    ///
    /// # Errors
    /// [`Error::Device`] for labels and for a wrong number of values.
    pub fn write_reals<T: Real>(&self, values: HostSlice<'_>, to: &mut [T]) -> Result<()> {
        match values {
            HostSlice::F32(v) => self.write(v, to, |x| T::of(f64::from(x))),
            HostSlice::F64(v) => self.write(v, to, T::of),
            HostSlice::I32(_) => Err(self.error(format_args!("takes reals"))),
        }
    }

    /// Writes labels.
    ///
    /// # Errors
    /// [`Error::Device`] for reals and for a wrong number of values.
    pub fn write_indices(&self, values: HostSlice<'_>, to: &mut [i32]) -> Result<()> {
        match values {
            HostSlice::I32(v) => self.write(v, to, |x| x),
            _ => Err(self.error(format_args!("takes indices"))),
        }
    }
}

/// Values of the device, in its order.
pub(super) struct Values<'a, T> {
    pub meta: Meta,
    pub branches: usize,
    pub data: Data<'a, T>,
}

/// The two kinds of values.
pub(super) enum Data<'a, T> {
    Reals(&'a [T]),
    Indices(&'a [i32]),
}

impl<T: Real + Default> Values<'_, T> {
    fn copy<A: Copy, B: Clone + Default>(&self, data: &[A], to: &mut Vec<B>, convert: impl Fn(A) -> B) {
        to.resize(data.len(), B::default());
        permute(&self.meta, self.branches, Way::Out, data, to, convert);
    }

    /// A copy in the precision in which they are held.
    pub fn to_host(&self) -> HostVec {
        match self.data {
            Data::Reals(data) => {
                let mut values = Vec::new();
                self.copy(data, &mut values, |x| x);
                T::into_host(values)
            }
            Data::Indices(data) => {
                let mut values = Vec::new();
                self.copy(data, &mut values, |x| x);
                HostVec::I32(values)
            }
        }
    }

    /// Replaces what `to` holds; allocates only while it is too small.
    pub fn to_f64(&self, to: &mut Vec<f64>) {
        match self.data {
            Data::Reals(data) => self.copy(data, to, T::f64),
            Data::Indices(data) => self.copy(data, to, f64::from),
        }
    }
}
