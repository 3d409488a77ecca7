//! The audit of a run's labels: which of them are probably wrong, and what they should be.
//!
//! - [`samples`] reads the labels with their images, [`history`] what training has left about each of them.
//! - [`score`] makes a suspicion of it and decides which labels to flag; [`roc`] measures that where true labels are
//!   known.
//! - [`table`] and [`npy`] write it for programs, [`sheet`] and [`plot`] for eyes; [`text`] draws letters.

pub mod history;
pub mod npy;
pub mod plot;
pub mod roc;
pub mod samples;
pub mod score;
pub mod sheet;
pub mod table;
pub mod text;
