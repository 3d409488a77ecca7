//! What the benchmarks share: their command line, the roof, a step on a device, and the table of results.
//!
//! Criterion decides how often a thing is run and compares with the run before; what it runs is timed by the device's
//! own clock. Its command line has no room for a device, so that the arguments here are the benchmarks' own.
#![allow(dead_code)]

pub mod args;
pub mod results;
pub mod roof;
pub mod step;
