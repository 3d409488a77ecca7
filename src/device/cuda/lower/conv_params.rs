//! What the kernels of convolutions are told: twins of the structs of `kernels/include/conv_params.cuh`.

use super::Operand;
use super::conv_cells::CellTiling;
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
    pub half: i32,
    pub count: f32,
}
const _: () = assert!(size_of::<ConvPair>() == 160);

/// Twin of `ConvSums`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct ConvSums {
    pub next: Address,
    pub dy: Address,
    pub next_branch: i64,
    pub dy_branch: i64,
    pub norm: ConvNorm,
    pub db: Address,
    pub db_branch: i64,
    pub results: [Address; 3],
    pub next_half: i32,
    pub dy_half: i32,
}
const _: () = assert!(size_of::<ConvSums>() == 152);

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
const _: () = assert!(size_of::<ConvProduct>() == 840);

/// Twin of `ConvParams`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct ConvParams {
    pub product: ConvProduct,
}
const _: () = assert!(size_of::<ConvParams>() == 840);

/// Twin of `ConvBackwardParams`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct ConvBackwardParams {
    pub dgrad: ConvProduct,
    pub wgrad: ConvProduct,
    pub dgrad_blocks: i32,
    pub wgrad_blocks: i32,
}
const _: () = assert!(size_of::<ConvBackwardParams>() == 1688);

impl ConvNorm {
    /// Of `g, b, mean, var`.
    pub fn new(norm: &[Operand; 4]) -> Self {
        ConvNorm { at: norm.map(|o| o.at), branch: norm.map(|o| o.branch), epsilon: BN_EPS as f32, unused: 0 }
    }
}

impl ConvPair {
    /// Of a tensor that is made of another and of `with`, which the batch norm `norm` normalises, with `vectors` per channel.
    pub fn new(with: &Operand, norm: &[Operand; 4], vectors: &[Operand], count: usize) -> Self {
        let mut pair = ConvPair {
            at: with.at,
            branch: with.branch,
            norm: ConvNorm::new(norm),
            half: with.half.into(),
            count: count as f32,
            ..ConvPair::zeroed()
        };
        for (i, vector) in vectors.iter().enumerate() {
            (pair.vectors[i], pair.vector_branches[i]) = (vector.at, vector.branch);
        }
        pair
    }
}

/// Twin of `CellParams`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct CellParams {
    pub product: ConvProduct,
    pub tiling: CellTiling,
}
const _: () = assert!(size_of::<CellParams>() == size_of::<ConvParams>() + 32);

/// Twin of `CellBackwardParams`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct CellBackwardParams {
    pub both: ConvBackwardParams,
    pub dgrad: CellTiling,
    pub wgrad: CellTiling,
}
const _: () = assert!(size_of::<CellBackwardParams>() == size_of::<ConvBackwardParams>() + 64);
