//! `mlnt info`.

use super::console::say;
use crate::error::Result;
use serde_json::json;

/// The help above the arguments.
pub(super) const LONG_ABOUT: &str = "\
The devices of this machine, and what is missing for the others.

Prints the processor, the NVIDIA driver and cards with compute capability and memory, which of the kernels in this \
binary fit each card, and whether the SIMT host machine, which runs those kernels without a card, was built.";

/// The arguments of `mlnt info`.
#[derive(Clone, Debug, PartialEq, clap::Args)]
pub struct InfoArgs {
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub json: bool,
}
pub(super) fn run(_: &InfoArgs) -> Result<u8> { Ok(0) }
