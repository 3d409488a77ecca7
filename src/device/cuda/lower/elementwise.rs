//! Elementwise operations and channel sums.
use super::Lowering;
use crate::error::Result;
use crate::ops::{Fill, LinComb};
use crate::plan::Args;

pub(super) fn lin_comb(_: &mut Lowering<'_>, _: &LinComb, _sets: &[Args]) -> Result<()> {
    unimplemented!()
}
pub(super) fn fill(_: &mut Lowering<'_>, _: &Fill, _: &Args) -> Result<()> {
    unimplemented!()
}
pub(super) fn relu(_: &mut Lowering<'_>, _: &Args) -> Result<()> {
    unimplemented!()
}
pub(super) fn mask(_: &mut Lowering<'_>, _: &Args) -> Result<()> {
    unimplemented!()
}
pub(super) fn channel_sum(_: &mut Lowering<'_>, _: &Args) -> Result<()> {
    unimplemented!()
}
pub(super) fn channel_broadcast(_: &mut Lowering<'_>, _: &Args) -> Result<()> {
    unimplemented!()
}
