#!/usr/bin/env python3
"""The MLNT training step in JAX, one `jax.jit` for the whole step.

`--style scan`: the branches in a `lax.scan`, each with a forward at θ of its own; `--style vmap`: one gradient of the
mean over a `vmap` of the branches, which share the forward at θ and whose fast weights make grouped convolutions.
Low precision: convolutions and activations in f16 (losses scaled by 1024) or bf16, the rest in f32. JAX has no device
events: on a card, too, the host's clock runs until the step's results are there, with the batch on the device before.
"""

import os
import sys
import time
from functools import partial

# The card is shared with the other programs of a comparison.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from common.peer import Peer, Refused, main
from common.spec import BN_EPS, BN_MOMENTUM, STATES
from jax import lax

TYPES = {"f16": jnp.float16, "bf16": jnp.bfloat16}
MATMUL = {"tf32": "tensorfloat32"}
F16_SCALE = 1024.0


def conv(x, w, stride=1, padding=0):
    """Convolution of [N, H, W, C] with [K, C, R, S], in the type of x."""
    return lax.conv_general_dilated(
        x, w.astype(x.dtype), (stride, stride), [(padding, padding)] * 2, dimension_numbers=("NHWC", "OIHW", "NHWC")
    )


def batch_norm(p, name, x, seen):
    """By batch statistics, which are put into `seen`: {name: (mean, unbiased variance)}."""
    wide = x.astype(p[f"{name}.weight"].dtype)
    mean, var = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
    count = x.size // x.shape[-1]
    seen[name] = (mean, var * (count / (count - 1)))
    y = (wide - mean) * lax.rsqrt(var + BN_EPS) * p[f"{name}.weight"] + p[f"{name}.bias"]
    return y.astype(x.dtype)


def forward(net, p, x, compute):
    """Logits [k, classes] and the batch statistics of every BatchNorm. x: [k, H, W, C] in the parameters' type."""
    seen = {}
    wide = x.dtype
    x = conv(x.astype(compute), p["conv1.weight"], padding=1)
    for block, stride in net.stages():
        h = jax.nn.relu(batch_norm(p, f"{block}.bn1", x, seen))
        shortcut = p.get(f"{block}.shortcut.0.weight")
        skip = x if shortcut is None else conv(h, shortcut, stride)
        h = conv(h, p[f"{block}.conv1.weight"], stride, padding=1)
        h = jax.nn.relu(batch_norm(p, f"{block}.bn2", h, seen))
        x = conv(h, p[f"{block}.conv2.weight"], padding=1) + skip
    x = jax.nn.relu(batch_norm(p, "bn", x, seen)).astype(wide).mean((1, 2))
    return x @ p["linear.weight"].T + p["linear.bias"], seen


def running(buffers, seen):
    """Running statistics after a forward."""
    fresh = {}
    for name, (mean, var) in seen.items():
        for key, value in ((f"{name}.running_mean", mean), (f"{name}.running_var", var)):
            fresh[key] = (1.0 - BN_MOMENTUM) * buffers[key] + BN_MOMENTUM * value
    return fresh


def cross_entropy(logits, labels):
    """[k]"""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]


def make_step(net, how, compute, scale, style):
    """The step as a function of (state, batch): (new state, report)."""
    net_forward = partial(forward, net, compute=compute)

    def scaled_grad(loss, theta):
        """((loss, more), gradient) of a function that returns (loss, more)."""
        (value, more), grads = jax.value_and_grad(lambda p: (scale * (r := loss(p))[0], r[1]), has_aux=True)(theta)
        return (value / scale, more), jax.tree.map(lambda g: g / scale, grads)

    def branch(theta, x, labels, target):
        """(J_m, (inner loss, J_m))"""
        (inner, _), grads = scaled_grad(lambda p: (cross_entropy(net_forward(p, x)[0], labels).mean(), None), theta)
        if how.first_order:
            grads = lax.stop_gradient(grads)
        fast = jax.tree.map(lambda t, g: t - how.alpha * g, theta, grads)
        log_p = jax.nn.log_softmax(net_forward(fast, x)[0])
        divergence = jax.scipy.special.xlogy(target, target) - target * log_p
        consistency = how.kl_scale(net.classes) * divergence.sum() / len(x)
        return consistency, (inner, consistency)

    def scanned(theta, x, y_syn, target):
        def body(total, labels):
            (_, losses), grads = scaled_grad(lambda p: branch(p, x, labels, target), theta)
            return jax.tree.map(jnp.add, total, grads), losses

        total, losses = lax.scan(body, jax.tree.map(jnp.zeros_like, theta), y_syn)
        return losses, jax.tree.map(lambda g: g / len(y_syn), total)

    def mapped(theta, x, y_syn, target):
        def mean(p):
            each, losses = jax.vmap(lambda labels: branch(p, x, labels, target))(y_syn)
            return each.mean(), losses

        (_, losses), grads = scaled_grad(mean, theta)
        return losses, grads

    meta_gradient = {"scan": scanned, "vmap": mapped}[style]

    def class_loss(theta, x, y, class_weight):
        logits, seen = net_forward(theta, x)
        return (cross_entropy(logits, y) * class_weight).sum(), seen

    def ema(teacher, theta):
        return jax.tree.map(lambda t, p: how.gamma * t + (1.0 - how.gamma) * p, teacher, theta)

    def step(state, x, y, y_syn, class_weight):
        theta, teacher = state["param"], state["teacher.param"]
        if not how.sequential:
            teacher = ema(teacher, theta)
        logits, teacher_seen = net_forward(teacher, x)
        target = jax.nn.softmax(logits)
        (inner, consistency), meta = meta_gradient(theta, x, y_syn, target)
        if how.sequential:
            theta = jax.tree.map(lambda t, g: t - how.eta * g, theta, meta)
        (loss, seen), grads = scaled_grad(lambda p: class_loss(p, x, y, class_weight), theta)
        if not how.sequential:
            grads = jax.tree.map(lambda g, m: g + how.eta * m, grads, meta)
        velocity = jax.tree.map(
            lambda v, g, t: how.momentum * v + g + how.weight_decay * t, state["momentum"], grads, theta
        )
        theta = jax.tree.map(lambda t, v: t - how.lr * v, theta, velocity)
        if how.sequential:
            teacher = ema(teacher, theta)
        new = {
            "param": theta,
            "momentum": velocity,
            "buffer": running(state["buffer"], seen),
            "teacher.param": teacher,
            "teacher.buffer": running(state["teacher.buffer"], teacher_seen),
        }
        report = {"target": target, "inner_loss": inner, "consistency": consistency, "class_loss": loss}
        return new, report | {"meta_grad": meta}

    return jax.jit(step, donate_argnums=0)


class Jax(Peer):
    name = "JAX jit"
    styles = ("scan", "vmap")

    @classmethod
    def configure(cls, args):
        super().configure(args)
        platform = "gpu" if args.device == "cuda" else "cpu"
        try:
            cls.device = jax.devices(platform)[0]
        except RuntimeError as why:
            raise Refused(f"JAX has no {platform}: {str(why).splitlines()[0]}") from None
        # For the check; what is timed is in 32 bits because its arrays are.
        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_default_device", cls.device)
        jax.config.update("jax_default_matmul_precision", MATMUL.get(args.precision, "highest"))

    @classmethod
    def versions(cls):
        return {"jax": jax.__version__, "platform": cls.device.client.platform_version.splitlines()[0]}

    def __init__(self, net, how, state, precision, args):
        self.dtype = np.float64 if precision == "f64" else np.float32
        scale = F16_SCALE if precision == "f16" else 1.0
        self.step = make_step(net, how, TYPES.get(precision, self.dtype), scale, args.style)
        self.state = {group: {name: self.place(t) for name, t in state[group].items()} for group in STATES}

    def place(self, array):
        # A copy: two groups that begin alike must not be one buffer, which is given away in a step.
        array = np.array(array, self.dtype if array.dtype.kind == "f" else np.int32)
        return jax.device_put(array, self.device)

    def put(self, batch):
        placed = {name: self.place(array) for name, array in batch.items()}
        placed["x"] = placed["x"].transpose(0, 2, 3, 1)
        return placed

    def timed(self, batch):
        jax.block_until_ready(batch)
        start = time.perf_counter()
        self.state, self.report = self.step(self.state, **batch)
        jax.block_until_ready((self.state, self.report))
        return time.perf_counter() - start

    def loss(self):
        return float(self.report["class_loss"])

    def peak_device_bytes(self):
        return (self.device.memory_stats() or {}).get("peak_bytes_in_use")

    def results(self):
        found = {}
        for name, value in (self.report | self.state).items():
            if isinstance(value, dict):
                found |= {f"{name}.{key}": np.asarray(t) for key, t in value.items()}
            else:
                found[name] = np.asarray(value)
        return found


if __name__ == "__main__":
    sys.exit(main(Jax))
