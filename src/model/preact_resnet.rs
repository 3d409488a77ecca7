//! Pre-activation ResNet with basic blocks, for any image size, widths and blocks.
//!
//! `conv1`, stages `layer1 …` of blocks `h = relu(bn1(x))`; `conv2(relu(bn2(conv1(h)))) + shortcut`, the shortcut
//! being `x`, or a 1×1 strided convolution of `h` where the shape changes; then `bn`, ReLU, pooling, `linear`.

use super::{Forward, ModelSpec, ParamSpec, Scope, bn_params, conv_param, linear_params};
use crate::error::Result;
use crate::tape::{Tape, Tensor};

/// One block.
struct Block {
    name: String,
    from: usize,
    to: usize,
    stride: usize,
}

impl Block {
    fn has_shortcut(&self) -> bool {
        self.stride != 1 || self.from != self.to
    }
}

fn blocks(spec: &ModelSpec) -> Vec<Block> {
    let mut list = Vec::new();
    let mut from = spec.widths[0];
    for (stage, (&to, &count)) in spec.widths.iter().zip(&spec.blocks).enumerate() {
        for b in 0..count {
            let stride = if stage > 0 && b == 0 { 2 } else { 1 };
            list.push(Block { name: format!("layer{}.{b}", stage + 1), from, to, stride });
            from = to;
        }
    }
    list
}

pub(super) fn params(spec: &ModelSpec) -> Vec<ParamSpec> {
    let mut list = vec![conv_param("conv1.weight".into(), spec.widths[0], spec.in_channels, 3)];
    for b in blocks(spec) {
        list.extend(bn_params(&format!("{}.bn1", b.name), b.from));
        list.push(conv_param(format!("{}.conv1.weight", b.name), b.to, b.from, 3));
        list.extend(bn_params(&format!("{}.bn2", b.name), b.to));
        list.push(conv_param(format!("{}.conv2.weight", b.name), b.to, b.to, 3));
        if b.has_shortcut() {
            list.push(conv_param(format!("{}.shortcut.0.weight", b.name), b.to, b.from, 1));
        }
    }
    let last = spec.features();
    list.extend(bn_params("bn", last));
    list.extend(linear_params("linear", spec.classes, last));
    list
}

pub(super) fn forward(spec: &ModelSpec, tape: &mut Tape, s: &mut Scope<'_>, x: Tensor) -> Result<Forward> {
    let mut x = s.conv(tape, "conv1", x, 1)?;
    for b in blocks(spec) {
        let name = |layer: &str| format!("{}.{layer}", b.name);
        let h = s.bn(tape, &name("bn1"), x)?;
        let h = s.relu(tape, &name("bn1"), h)?;
        let shortcut = if b.has_shortcut() { s.conv(tape, &name("shortcut.0"), h, b.stride)? } else { x };
        let y = s.conv(tape, &name("conv1"), h, b.stride)?;
        let y = s.bn(tape, &name("bn2"), y)?;
        let y = s.relu(tape, &name("bn2"), y)?;
        let y = s.conv(tape, &name("conv2"), y, 1)?;
        x = tape.add(shortcut, y)?;
    }
    let x = s.bn(tape, "bn", x)?;
    let x = s.relu(tape, "bn", x)?;
    s.head(tape, "linear", x)
}
