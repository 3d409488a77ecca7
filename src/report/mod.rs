//! The report: run directories as one HTML page that needs nothing but a browser.
//!
//! [`read`] takes the files as they are, those of older and unfinished runs too; [`curves`] puts runs of the same
//! setting together; [`labels`] counts given against suggested or true labels; [`chart`] and [`heat`] draw; `page`
//! writes. The same files give the same page. [`compare`] sums up a comparison of methods.

pub mod chart;
pub mod compare;
pub mod curves;
pub mod heat;
pub mod labels;
mod page;
pub mod read;
mod svg;
mod tables;

use std::path::PathBuf;

use crate::error::Result;

/// The page about the runs in `paths`, as text of an HTML file. A folder that is named twice counts once.
///
/// # Errors
/// [`Error::File`](crate::Error::File) for a folder that is no run or a file of one that cannot be understood,
/// [`Error::Io`](crate::Error::Io) for one that cannot be read.
pub fn html(paths: &[PathBuf]) -> Result<String> {
    page::page(&curves::groups(read::open_all(paths)?))
}
