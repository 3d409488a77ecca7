//! What the kernels of convolutions are told: twins of the structs of `kernels/include/conv_params.cuh`.

use super::Operand;
use crate::device::cuda::driver::Address;
use crate::ops::BN_EPS;
use bytemuck::{Pod, Zeroable};

/// Twin of `ConvTerm`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct ConvTerm {
    pub image: Address,
    pub matrix: Address,
    pub image_branch: i64,
    pub matrix_branch: i64,
    pub segments: i32,
    pub image_half: i32,
    pub matrix_half: i32,
    pub norm: i32,
}
const _: () = assert!(size_of::<ConvTerm>() == 48);

/// Twin of `ConvNorm`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct ConvNorm {
    pub at: [Address; 4],
    pub branch: [i64; 4],
    pub epsilon: f32,
    pub unused: i32,
}
const _: () = assert!(size_of::<ConvNorm>() == 72);

/// Twin of `ConvPair`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct ConvPair {
    pub at: Address,
    pub branch: i64,
    pub norm: ConvNorm,
    pub vectors: [Address; 4],
    pub vector_branches: [i64; 4],
    pub residual: Address,
    pub residual_branch: i64,
    pub kept: Address,
    pub kept_branch: i64,
    pub half: i32,
    pub residual_half: i32,
    pub kept_half: i32,
    pub count: f32,
}
const _: () = assert!(size_of::<ConvPair>() == 200);

/// Twin of `ConvSums`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct ConvSums {
    pub next: Address,
    pub next_branch: i64,
    pub norm: ConvNorm,
    pub results: [Address; 2],
    pub next_half: i32,
    pub unused: i32,
}
const _: () = assert!(size_of::<ConvSums>() == 112);

/// Twin of `ConvProduct`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct ConvProduct {
    pub terms: [ConvTerm; 2],
    pub norm: ConvNorm,
    pub image: ConvPair,
    pub matrix: ConvPair,
    pub sums: ConvSums,
    pub start: Address,
    pub out: Address,
    pub start_branch: i64,
    pub out_branch: i64,
    pub mean: Address,
    pub var: Address,
    pub partial: Address,
    pub tile_sums: Address,
    pub group_sums: Address,
    pub arrivals: Address,
    pub rows: i32,
    pub columns: i32,
    pub inner: i32,
    pub image_height: i32,
    pub image_width: i32,
    pub image_channels: i32,
    pub grid_height: i32,
    pub grid_width: i32,
    pub kernel_width: i32,
    pub stride: i32,
    pub pad: i32,
    pub filter: i32,
    pub row_tiles: i32,
    pub column_tiles: i32,
    pub inner_tiles: i32,
    pub segments: i32,
    pub splits: i32,
    pub branches: i32,
    pub by_pixel: i32,
    pub start_half: i32,
    pub out_half: i32,
    pub kernel_height: i32,
    pub images: i32,
    pub patch_images: i32,
    pub patch_height: i32,
    pub patch_width: i32,
    pub patches_down: i32,
    pub patches_across: i32,
    pub halo_height: i32,
    pub halo_width: i32,
}
const _: () = assert!(size_of::<ConvProduct>() == 880);

/// Twin of `ConvParams`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct ConvParams {
    pub product: ConvProduct,
}
const _: () = assert!(size_of::<ConvParams>() == 880);

/// Twin of `ConvBackwardParams`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct ConvBackwardParams {
    pub dgrad: ConvProduct,
    pub wgrad: ConvProduct,
    pub dgrad_blocks: i32,
    pub wgrad_blocks: i32,
}
const _: () = assert!(size_of::<ConvBackwardParams>() == 1768);

impl ConvNorm {
    /// Of gain and bias, where they are wanted, and of mean and variance.
    pub fn new(gain: Option<&[Operand; 2]>, moments: &[Operand; 2]) -> Self {
        let [g, b] = [0, 1].map(|i| gain.map_or((Address::NULL, 0), |gain| (gain[i].at, gain[i].branch)));
        let [mean, var] = moments.map(|o| (o.at, o.branch));
        let all = [g, b, mean, var];
        ConvNorm { at: all.map(|v| v.0), branch: all.map(|v| v.1), epsilon: BN_EPS as f32, unused: 0 }
    }

    /// Of `g, b, mean, var`.
    pub fn of_four(&[g, b, mean, var]: &[Operand; 4]) -> Self {
        Self::new(Some(&[g, b]), &[mean, var])
    }
}
