"""A network, a step, and the tensors a step starts from, for every framework alike: NumPy arrays by PyTorch's names."""

import math
from dataclasses import dataclass

import numpy as np

BN_EPS = 1e-5
BN_MOMENTUM = 0.1

# What a step changes. Each is a dictionary of arrays by name.
STATES = ("param", "momentum", "buffer", "teacher.param", "teacher.buffer")


@dataclass(frozen=True)
class Network:
    """Shape of a network."""

    arch: str  # "preact_resnet" | "resnet_bottleneck"
    in_channels: int
    size: tuple[int, int]
    classes: int
    widths: tuple[int, ...]
    blocks: tuple[int, ...]

    def stages(self):
        """Yields (prefix, stride) of every block."""
        for s, count in enumerate(self.blocks):
            for b in range(count):
                yield f"layer{s + 1}.{b}", 2 if s > 0 and b == 0 else 1


@dataclass(frozen=True)
class Step:
    """How a step is done."""

    sequential: bool  # two updates per step; otherwise one joint update
    kl: str  # "batchmean" (÷k) or "mean" (÷k·classes)
    alpha: float
    eta: float
    lr: float
    momentum: float
    weight_decay: float
    gamma: float
    teacher_share: float = 1.0  # λ, the teacher's part of the consistency target; the rest is the mentor's
    first_order: bool = False

    def kl_scale(self, classes):
        """What the KL divergence, averaged over the batch, is multiplied by."""
        return 1.0 if self.kl == "batchmean" else 1.0 / classes


def recipe_step(recipe, first_order):
    """The step that is timed."""
    paper = recipe == "paper"
    return Step(
        sequential=paper,
        kl="batchmean" if paper else "mean",
        alpha=0.2,
        eta=0.4,
        lr=0.02,
        momentum=0.9,
        weight_decay=1e-4,
        gamma=0.999,
        first_order=first_order,
    )


def fresh_state(net, seed):
    """Random parameters (He) of a PreAct ResNet and everything else of a first step: {group: {name: float32}}."""
    random = np.random.default_rng(seed)
    params, buffers = {}, {}

    def conv(name, cin, cout, size):
        std = math.sqrt(2.0 / (cin * size * size))
        params[f"{name}.weight"] = random.normal(0.0, std, (cout, cin, size, size)).astype(np.float32)

    def bn(name, channels):
        params[f"{name}.weight"] = np.ones(channels, np.float32)
        params[f"{name}.bias"] = np.zeros(channels, np.float32)
        buffers[f"{name}.running_mean"] = np.zeros(channels, np.float32)
        buffers[f"{name}.running_var"] = np.ones(channels, np.float32)

    cin = net.widths[0]
    conv("conv1", net.in_channels, cin, 3)
    for block, stride in net.stages():
        cout = net.widths[int(block.split(".")[0].removeprefix("layer")) - 1]
        bn(f"{block}.bn1", cin)
        conv(f"{block}.conv1", cin, cout, 3)
        bn(f"{block}.bn2", cout)
        conv(f"{block}.conv2", cout, cout, 3)
        if stride != 1 or cin != cout:
            conv(f"{block}.shortcut.0", cin, cout, 1)
        cin = cout
    bn("bn", cin)
    params["linear.weight"] = (random.normal(size=(net.classes, cin)) / math.sqrt(cin)).astype(np.float32)
    params["linear.bias"] = np.zeros(net.classes, np.float32)
    return {
        "param": params,
        "momentum": {name: np.zeros_like(t) for name, t in params.items()},
        "buffer": buffers,
        "teacher.param": params,
        "teacher.buffer": buffers,
    }


def random_batch(net, batch, branches, random):
    """Images, labels, synthetic labels and weights of the classification loss, as a golden step has them."""
    return {
        "x": random.standard_normal((batch, net.in_channels, *net.size), np.float32),
        "y": random.integers(net.classes, size=batch),
        "y_syn": random.integers(net.classes, size=(branches, batch)),
        "class_weight": np.full(batch, 1.0 / batch, np.float32),
    }
