//! Pooling.
use super::Lowering;
use crate::error::Result;
use crate::ops::Window;
use crate::plan::Args;

pub(super) fn average(_: &mut Lowering<'_>, _: &Args) -> Result<()> {
    unimplemented!()
}
pub(super) fn average_backward(_: &mut Lowering<'_>, _: &Args) -> Result<()> {
    unimplemented!()
}
pub(super) fn max_index(_: &mut Lowering<'_>, _: &Window, _: &Args) -> Result<()> {
    unimplemented!()
}
pub(super) fn gather(_: &mut Lowering<'_>, _: &Window, _: &Args) -> Result<()> {
    unimplemented!()
}
pub(super) fn scatter(_: &mut Lowering<'_>, _: &Window, _: &Args) -> Result<()> {
    unimplemented!()
}
