// Both gradients of a 2-D convolution of few channels from one tile of delta, by mma.sync: `conv_direct_joint.cuh`.
#define KERNEL_BLOCKS 3
#include "conv_direct_joint.cuh"

KERNEL(conv2d_direct_joint_f16, ConvJointParams, 128) { direct_joint<F16, false>(p); }
KERNEL(conv2d_direct_joint_bf16, ConvJointParams, 128) { direct_joint<Bf16, false>(p); }
KERNEL(conv2d_direct_joint_pair_f16, ConvJointParams, 128) { direct_joint<F16, true>(p); }
KERNEL(conv2d_direct_joint_pair_bf16, ConvJointParams, 128) { direct_joint<Bf16, true>(p); }
