//! Convolutions.
use super::Lowering;
use crate::error::Result;
use crate::ops::Conv;
use crate::plan::Args;

pub(super) fn conv(_: &mut Lowering<'_>, _: &Conv, _: &Args) -> Result<()> {
    unimplemented!()
}
