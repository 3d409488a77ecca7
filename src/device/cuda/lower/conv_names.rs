//! The names of the kernels of convolutions.

use super::Operands;

/// Kernels by operand type.
struct Kernels {
    f32: &'static str,
    tf32: &'static str,
    f16: &'static str,
    bf16: &'static str,
}

/// The kernels `name` of all operand types, or those of 16 bits, which others do not ask for.
macro_rules! kernels {
    ($name:literal) => {
        Kernels {
            f32: concat!($name, "_f32"),
            tf32: concat!($name, "_tf32"),
            f16: concat!($name, "_f16"),
            bf16: concat!($name, "_bf16"),
        }
    };
}

/// Ways to compute a product, with the columns of a tile where there are several.
#[derive(Clone, Copy)]
pub(super) enum Way {
    Gathered,
    Direct(usize),
    /// Taps of a tile instead, of the gradient of the weights.
    Stem(usize),
    Cells(usize),
}

/// The kernel of fprop, or else of the gradients; `pairs`: whether any operand is one, for which there are variants, since it takes
/// more registers.
pub(super) fn kernel(operands: Operands, fprop: bool, way: Way, pairs: bool) -> &'static str {
    let kernels = match (fprop, way, pairs) {
        (true, Way::Gathered, false) => kernels!("conv2d_fprop"),
        (true, Way::Gathered, true) => kernels!("conv2d_fprop_pair"),
        (true, Way::Direct(32), false) => kernels!("conv2d_direct_fprop_32"),
        (true, Way::Direct(_), false) => kernels!("conv2d_direct_fprop_64"),
        (true, Way::Direct(32), true) => kernels!("conv2d_direct_fprop_pair_32"),
        (true, Way::Direct(_), true) => kernels!("conv2d_direct_fprop_pair_64"),
        (true, Way::Stem(32), _) => kernels!("conv2d_stem_fprop_32"),
        (true, Way::Stem(_), _) => kernels!("conv2d_stem_fprop_64"),
        (true, Way::Cells(32), false) => kernels!("conv2d_wgmma_fprop_32"),
        (true, Way::Cells(_), false) => kernels!("conv2d_wgmma_fprop_64"),
        (true, Way::Cells(32), true) => kernels!("conv2d_wgmma_fprop_pair_32"),
        (true, Way::Cells(_), true) => kernels!("conv2d_wgmma_fprop_pair_64"),
        (false, Way::Gathered, false) => kernels!("conv2d_backward"),
        (false, Way::Gathered, true) => kernels!("conv2d_backward_pair"),
        (false, Way::Direct(32), false) => kernels!("conv2d_direct_backward_32"),
        (false, Way::Direct(_), false) => kernels!("conv2d_direct_backward_64"),
        (false, Way::Direct(32), true) => kernels!("conv2d_direct_backward_pair_32"),
        (false, Way::Direct(_), true) => kernels!("conv2d_direct_backward_pair_64"),
        (false, Way::Stem(16), false) => kernels!("conv2d_stem_wgrad_16"),
        (false, Way::Stem(_), false) => kernels!("conv2d_stem_wgrad_64"),
        (false, Way::Stem(16), true) => kernels!("conv2d_stem_wgrad_pair_16"),
        (false, Way::Stem(_), true) => kernels!("conv2d_stem_wgrad_pair_64"),
        (false, Way::Cells(32), false) => kernels!("conv2d_wgmma_backward_32"),
        (false, Way::Cells(_), false) => kernels!("conv2d_wgmma_backward_64"),
        (false, Way::Cells(32), true) => kernels!("conv2d_wgmma_backward_pair_32"),
        (false, Way::Cells(_), true) => kernels!("conv2d_wgmma_backward_pair_64"),
    };
    match operands {
        Operands::F32 => kernels.f32,
        Operands::Tf32 => kernels.tf32,
        Operands::F16 => kernels.f16,
        Operands::Bf16 => kernels.bf16,
    }
}
