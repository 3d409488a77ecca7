//! `mlnt`: training of image classifiers on noisy labels with an exact second-order meta-gradient.
//!
//! Data flows one way: [`model`] → [`tape`] → [`plan`] → [`device`]. Nothing lower imports anything higher;
//! `docs/architecture.md` walks one batch through the house.

#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod audit;
pub mod cases;
pub mod check;
pub mod cli;
pub mod data;
pub mod device;
pub mod error;
pub mod fs;
pub mod mlnt;
pub mod model;
pub mod ops;
pub mod plan;
pub mod report;
pub mod rng;
pub mod tape;
pub mod train;

pub use error::{Error, Result};
