//! Single fused convolutions for tests.

pub mod case;
pub mod plan;
