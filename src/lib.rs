//! `mlnt`: training of image classifiers on noisy labels with an exact second-order meta-gradient.
//!
//! Data flows one way: [`model`] → [`tape`] → [`plan`] → [`device`]. Nothing lower imports anything higher;
//! `docs/architecture.md` walks one batch through the house.

#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod cli;
pub mod data;
pub mod error;
pub mod fs;
pub mod train;

pub use error::{Error, Result};
