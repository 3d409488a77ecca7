//! Training: what a run is asked to do ([`config`]), what it leaves behind ([`run_dir`], [`checkpoint`],
//! [`metrics`]) and how it is summed up ([`table`]).

pub mod checkpoint;
pub mod choice;
pub mod config;
pub mod metrics;
pub mod preset;
pub mod run_dir;
pub mod schedule;
pub mod table;
mod tensor_file;
mod toml_file;
mod validate;
