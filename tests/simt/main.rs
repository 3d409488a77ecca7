//! The SIMT host machine finds faults: each broken kernel of `tests/simt/` is caught, and its right twin passes.
//!
//! The kernels and the machine are compiled here, with the system's C++ compiler. Without one the tests are skipped.

mod compilers;
mod conversions;
mod launches;
mod machine;
mod memory;
mod order;
mod tensor_cores;
mod warpgroups;
