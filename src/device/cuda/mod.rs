//! The CUDA device.

pub mod embedded;
