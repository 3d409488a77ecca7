//! Batch norm.
use super::Lowering;
use crate::error::Result;
use crate::plan::Args;

pub(super) fn forward(_: &mut Lowering<'_>, _relu: bool, _: &Args) -> Result<()> {
    unimplemented!()
}
pub(super) fn eval(_: &mut Lowering<'_>, _relu: bool, _: &Args) -> Result<()> {
    unimplemented!()
}
pub(super) fn backward(_: &mut Lowering<'_>, _relu: bool, _: &Args) -> Result<()> {
    unimplemented!()
}
pub(super) fn double_backward(_: &mut Lowering<'_>, _relu: bool, _: &Args) -> Result<()> {
    unimplemented!()
}
