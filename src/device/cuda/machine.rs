//! The card that defaults go by.

use super::Operands;
use crate::plan::Machine;

/// What the default for branch groups goes by, for convolutions with these operands: an H200. It is the same on every card, so that results
/// are too: groups decide the order of sums over the branches.
///
/// Every group costs launches and one more pass over the sums over branches, which are as large as one branch; so groups are as few as the
/// arena lets. An exact step of PreAct ResNet-32 at batch 128 with ten branches takes about 0.35 GB and 0.4 GB for each
/// branch of a group in 16 bits: 4.2 GB in one piece, 2.5 GB as 5 + 5, 2.2 GB if it computes some cotangents again. A first-order
/// step fits in one piece. Twice as much is set aside where activations may take 32 bits.
///
/// 50 MB of cache and 4.8 TB/s are NVIDIA's figures; the rate of convolutions is 790 TFLOP/s (an H200's dense f16, see
/// `docs/performance.md`), half of it in TF32, and that of f32 operands the card's without tensor cores. No kernel reaches it, which is in
/// favour of fewer branches at a time: the sooner the work is done, the more a launch waits for memory. 2 µs for a launch in a
/// graph and its last blocks are an assumption.
pub fn machine(operands: Operands) -> Machine {
    let (arena_bytes, conv_rate) = match operands {
        Operands::F16 | Operands::Bf16 => (2_200_000_000, 790e12),
        Operands::Tf32 => (4_400_000_000, 395e12),
        Operands::F32 => (4_400_000_000, 67e12),
    };
    Machine {
        real_bytes: 4,
        arena_bytes,
        cache_bytes: 50_000_000,
        memory_rate: 4.8e12,
        conv_rate,
        other_rate: 67e12,
        launch: 2e-6,
    }
}
