"""The networks in PyTorch, as functions of dictionaries of parameters and running statistics.

`stats` says what BatchNorm does: None = batch statistics only, else (running statistics, mode) with mode "update"
(batch statistics, running ones updated) or "eval" (running statistics).
"""

import torch
import torch.nn.functional as F

from .spec import BN_EPS, BN_MOMENTUM


def batch_norm(p, name, x, stats):
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    if stats is None:
        return F.batch_norm(x, None, None, weight, bias, True, BN_MOMENTUM, BN_EPS)
    buffers, mode = stats
    mean, var = buffers[f"{name}.running_mean"], buffers[f"{name}.running_var"]
    return F.batch_norm(x, mean, var, weight, bias, mode == "update", BN_MOMENTUM, BN_EPS)


def preact_resnet(net, p, x, stats):
    x = F.conv2d(x, p["conv1.weight"], padding=1)
    for block, stride in net.stages():
        h = F.relu(batch_norm(p, f"{block}.bn1", x, stats))
        shortcut = p.get(f"{block}.shortcut.0.weight")
        skip = x if shortcut is None else F.conv2d(h, shortcut, stride=stride)
        h = F.conv2d(h, p[f"{block}.conv1.weight"], stride=stride, padding=1)
        h = F.relu(batch_norm(p, f"{block}.bn2", h, stats))
        x = F.conv2d(h, p[f"{block}.conv2.weight"], padding=1) + skip
    x = F.relu(batch_norm(p, "bn", x, stats)).mean((2, 3))
    return F.linear(x, p["linear.weight"], p["linear.bias"])


def resnet_bottleneck(net, p, x, stats):
    x = F.conv2d(x, p["conv1.weight"], stride=2, padding=3)
    x = F.max_pool2d(F.relu(batch_norm(p, "bn1", x, stats)), 3, stride=2, padding=1)
    for block, stride in net.stages():
        downsample = p.get(f"{block}.downsample.0.weight")
        skip = x
        if downsample is not None:
            skip = batch_norm(p, f"{block}.downsample.1", F.conv2d(x, downsample, stride=stride), stats)
        h = F.conv2d(x, p[f"{block}.conv1.weight"])
        h = F.relu(batch_norm(p, f"{block}.bn1", h, stats))
        h = F.conv2d(h, p[f"{block}.conv2.weight"], stride=stride, padding=1)
        h = F.relu(batch_norm(p, f"{block}.bn2", h, stats))
        h = F.conv2d(h, p[f"{block}.conv3.weight"])
        x = F.relu(batch_norm(p, f"{block}.bn3", h, stats) + skip)
    return F.linear(x.mean((2, 3)), p["fc.weight"], p["fc.bias"])


FORWARD = {"preact_resnet": preact_resnet, "resnet_bottleneck": resnet_bottleneck}


def forward(net, params, x, stats=None, amp=None):
    """Logits [k, classes] in the parameters' type. `amp`: the type that autocast lowers to, None without it.

    Each forward is an autocast region of its own: its cache of lowered parameters must not outlive an update of them.
    """
    with torch.autocast(x.device.type, dtype=amp, enabled=amp is not None):
        logits = FORWARD[net.arch](net, params, x, stats)
    return logits.to(x.dtype)
