//! Training: what a run is asked to do ([`config`]), the data it reads ([`prepare`]), the networks on their device
//! ([`engine`], [`evaluation`]), what a method does ([`method`], [`by_logits`]) and remembers ([`memory`]), the loop ([`run`]), what iterations hand on ([`filter`],
//! [`snapshot`]), what it leaves behind ([`run_dir`], [`checkpoint`], [`metrics`], [`event_file`]) and how it is summed
//! up ([`summary`], [`table`]); and several runs side by side ([`compare`]). Benchmarks time a step outside a run ([`timed_step`]).

pub mod by_logits;
pub mod checkpoint;
pub mod choice;
pub mod compare;
pub mod config;
pub mod engine;
pub mod evaluation;
pub mod event_file;
pub mod feed;
pub mod filter;
pub mod given;
pub mod group;
mod loss_scale;
pub mod memory;
pub mod method;
pub mod metrics;
pub mod open_device;
pub mod prepare;
pub mod preset;
pub mod progress;
pub mod run;
pub mod run_dir;
pub mod schedule;
pub mod snapshot;
pub mod summary;
pub mod table;
mod tensor_file;
pub mod timed_step;
mod toml_file;
mod validate;
