//! The head: softmax and losses.
use super::Lowering;
use crate::error::Result;
use crate::ops::Op;
use crate::plan::Args;

pub(super) fn softmax(_: &mut Lowering<'_>, _: &Args) -> Result<()> {
    unimplemented!()
}
pub(super) fn jvp(_: &mut Lowering<'_>, _: &Args) -> Result<()> {
    unimplemented!()
}
pub(super) fn loss(_: &mut Lowering<'_>, _: &Op, _: &Args) -> Result<()> {
    unimplemented!()
}
pub(super) fn grad(_: &mut Lowering<'_>, _: &Op, _: &Args) -> Result<()> {
    unimplemented!()
}
