//! The method: the training step as a tape, synthetic labels, and golden steps to check it against, free and replayed.

mod ce;
pub mod golden;
mod names;
pub mod replay;
mod scaling;
mod step;
mod synthetic;

pub use ce::{CeSpec, record_ce_step, record_eval, record_filtered_ce_step};
pub use names::{StateKind, state_name};
pub use scaling::Scales;
pub use step::{KlScale, Recipe, Report, StepScalars, StepSpec, Synthetic, record_step};
pub use synthetic::draw_ranks;
