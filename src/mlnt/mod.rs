//! The method: the training step as a tape, synthetic labels, and golden steps to check it against, free and replayed.
//! And what it is compared with: cross entropy, and methods whose losses are computed on the host ([`losses`]).

mod ce;
pub mod golden;
mod logits;
pub mod losses;
mod names;
pub mod replay;
mod step;
mod synthetic;

pub use ce::{CeSpec, record_ce_step, record_eval, record_filtered_ce_step};
pub use logits::{gradient_name, logits_name, record_descent, record_logits};
pub use names::{StateKind, state_name};
pub use step::{KlScale, Recipe, Report, StepScalars, StepSpec, Synthetic, record_step};
pub use synthetic::draw_ranks;
