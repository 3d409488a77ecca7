//! ResNet with bottleneck blocks, torchvision's names: 7×7/2 stem, batch norm, ReLU, 3×3/2 max-pooling, stages of
//! blocks 1×1, 3×3 (with the stride), 1×1 of four times the width, then pooling and `fc`.

use super::{Forward, ModelSpec, ParamSpec, Scope, bn_params, conv_param, linear_params};
use crate::error::Result;
use crate::tape::{Tape, Tensor};

/// Output channels of a block per channel of its width.
pub(super) const EXPANSION: usize = 4;

/// One block.
struct Block {
    name: String,
    from: usize,
    width: usize,
    stride: usize,
    /// A stage's first block projects its shortcut.
    first: bool,
}

fn blocks(spec: &ModelSpec) -> Vec<Block> {
    let mut list = Vec::new();
    let mut from = spec.widths[0];
    for (stage, (&width, &count)) in spec.widths.iter().zip(&spec.blocks).enumerate() {
        for b in 0..count {
            let stride = if stage > 0 && b == 0 { 2 } else { 1 };
            list.push(Block { name: format!("layer{}.{b}", stage + 1), from, width, stride, first: b == 0 });
            from = width * EXPANSION;
        }
    }
    list
}

pub(super) fn params(spec: &ModelSpec) -> Vec<ParamSpec> {
    let stem = spec.widths[0];
    let mut list = vec![conv_param("conv1.weight".into(), stem, spec.in_channels, 7)];
    list.extend(bn_params("bn1", stem));
    for b in blocks(spec) {
        let out = b.width * EXPANSION;
        let name = |layer: &str| format!("{}.{layer}", b.name);
        list.push(conv_param(name("conv1.weight"), b.width, b.from, 1));
        list.extend(bn_params(&name("bn1"), b.width));
        list.push(conv_param(name("conv2.weight"), b.width, b.width, 3));
        list.extend(bn_params(&name("bn2"), b.width));
        list.push(conv_param(name("conv3.weight"), out, b.width, 1));
        list.extend(bn_params(&name("bn3"), out));
        if b.first {
            list.push(conv_param(name("downsample.0.weight"), out, b.from, 1));
            list.extend(bn_params(&name("downsample.1"), out));
        }
    }
    list.extend(linear_params("fc", spec.classes, spec.features()));
    list
}

pub(super) fn forward(spec: &ModelSpec, tape: &mut Tape, s: &mut Scope<'_>, x: Tensor) -> Result<Forward> {
    let x = s.conv(tape, "conv1", x, 2)?;
    let x = s.bn(tape, "bn1", x)?;
    let x = s.relu(tape, "bn1", x)?;
    let mut x = s.max_pool(tape, "bn1", x, [3, 2, 1])?;
    for b in blocks(spec) {
        let name = |layer: &str| format!("{}.{layer}", b.name);
        let mut y = x;
        for (layer, stride) in [("1", 1), ("2", b.stride)] {
            y = s.conv(tape, &name(&format!("conv{layer}")), y, stride)?;
            y = s.bn(tape, &name(&format!("bn{layer}")), y)?;
            y = s.relu(tape, &name(&format!("bn{layer}")), y)?;
        }
        y = s.conv(tape, &name("conv3"), y, 1)?;
        y = s.bn(tape, &name("bn3"), y)?;
        let shortcut = match b.first {
            true => {
                let d = s.conv(tape, &name("downsample.0"), x, b.stride)?;
                s.bn(tape, &name("downsample.1"), d)?
            }
            false => x,
        };
        let sum = tape.add(y, shortcut)?;
        x = s.relu(tape, &b.name, sum)?;
    }
    s.head(tape, "fc", x)
}
