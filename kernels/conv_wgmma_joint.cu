// Both gradients of one convolution from one tile of δ, by products of warpgroups (wgmma): see `conv_cells_joint.cuh`.
#define KERNEL_SM_90A
#include "conv_cells_joint.cuh"

KERNEL(conv2d_wgmma_joint_f16, JointParams, 256) { cells_joint<F16, false>(p); }
KERNEL(conv2d_wgmma_joint_bf16, JointParams, 256) { cells_joint<Bf16, false>(p); }
KERNEL(conv2d_wgmma_joint_pair_f16, JointParams, 256) { cells_joint<F16, true>(p); }
KERNEL(conv2d_wgmma_joint_pair_bf16, JointParams, 256) { cells_joint<Bf16, true>(p); }
