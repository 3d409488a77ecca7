#!/usr/bin/env python3
"""The MLNT training step in PyTorch eager: the baseline the engine's benchmark is set beside.

It is written the way the method usually is on a framework's autograd: a Python loop over the M branches, each with a
forward at θ, `torch.autograd.grad(create_graph=True)`, a forward at the fast weights and a backward that accumulates
into θ. `--verify` shows that it does the same work as the engine: it runs the golden steps in float64 and prints the
distance to their results.

    python torch_mlnt.py --widths 8,16,32 --blocks 1,1,1 --in-channels 1 --size 28x28 --batch 128 --branches 4
    python torch_mlnt.py --verify golden/*.safetensors
"""

import argparse
import gc
import json
import math
import resource
import statistics
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

BN_EPS = 1e-5
BN_MOMENTUM = 0.1
EXPANSION = 4  # of a bottleneck block
VERIFY_BOUND = 1e-10


@dataclass(frozen=True)
class Network:
    """Shape of a network; parameters and running statistics live in dictionaries beside it."""

    arch: str  # "preact_resnet" | "resnet_bottleneck"
    in_channels: int
    classes: int
    widths: tuple[int, ...]
    blocks: tuple[int, ...]


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
    shared_forward: bool = False  # one forward at θ for all branches, instead of one per branch


# --- Networks. `stats` says what BatchNorm does: None = batch statistics only, else (running statistics, mode) with
# --- mode "update" (batch statistics, running ones updated) or "eval" (running statistics).


def batch_norm(p, name, x, stats):
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    if stats is None:
        return F.batch_norm(x, None, None, weight, bias, True, BN_MOMENTUM, BN_EPS)
    buffers, mode = stats
    mean, var = buffers[f"{name}.running_mean"], buffers[f"{name}.running_var"]
    return F.batch_norm(x, mean, var, weight, bias, mode == "update", BN_MOMENTUM, BN_EPS)


def stages(net):
    """Yields (prefix, stride) of every block."""
    for s, count in enumerate(net.blocks):
        for b in range(count):
            yield f"layer{s + 1}.{b}", 2 if s > 0 and b == 0 else 1


def preact_resnet(net, p, x, stats):
    x = F.conv2d(x, p["conv1.weight"], padding=1)
    for block, stride in stages(net):
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
    for block, stride in stages(net):
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


def forward(net, params, x, stats=None):
    """Logits [k, classes]."""
    return FORWARD[net.arch](net, params, x, stats)


def fresh_preact_resnet(net, generator):
    """Random parameters (He) and fresh running statistics, by PyTorch's names."""
    params, buffers = {}, {}

    def conv(name, cin, cout, size):
        std = math.sqrt(2.0 / (cin * size * size))
        params[f"{name}.weight"] = torch.randn(cout, cin, size, size, generator=generator) * std

    def bn(name, channels):
        params[f"{name}.weight"], params[f"{name}.bias"] = torch.ones(channels), torch.zeros(channels)
        buffers[f"{name}.running_mean"], buffers[f"{name}.running_var"] = torch.zeros(channels), torch.ones(channels)

    cin = net.widths[0]
    conv("conv1", net.in_channels, cin, 3)
    for block, stride in stages(net):
        cout = net.widths[int(block.split(".")[0].removeprefix("layer")) - 1]
        bn(f"{block}.bn1", cin)
        conv(f"{block}.conv1", cin, cout, 3)
        bn(f"{block}.bn2", cout)
        conv(f"{block}.conv2", cout, cout, 3)
        if stride != 1 or cin != cout:
            conv(f"{block}.shortcut.0", cin, cout, 1)
        cin = cout
    bn("bn", cin)
    params["linear.weight"] = torch.randn(net.classes, cin, generator=generator) / math.sqrt(cin)
    params["linear.bias"] = torch.zeros(net.classes)
    return params, buffers


# --- The step.


class Student:
    """Everything a step reads and writes."""

    def __init__(self, net, params, buffers, momentum=None, teacher=None, teacher_buffers=None, mentor=None):
        def copy(tensors):
            return {name: t.detach().clone() for name, t in tensors.items()}

        self.net = net
        self.params = {name: t.requires_grad_() for name, t in copy(params).items()}
        self.buffers = copy(buffers)
        self.momentum = copy(momentum) if momentum else {name: torch.zeros_like(t) for name, t in params.items()}
        self.teacher = copy(teacher or params)
        self.teacher_buffers = copy(teacher_buffers or buffers)
        self.mentor = mentor  # (params, buffers) or None

    def update_teacher(self, gamma):
        with torch.no_grad():
            for name, t in self.teacher.items():
                t.mul_(gamma).add_(self.params[name], alpha=1.0 - gamma)

    def target(self, x, teacher_share):
        """Consistency target [k, classes]: the teacher, mixed with the mentor where there is one."""
        with torch.no_grad():
            target = forward(self.net, self.teacher, x, (self.teacher_buffers, "update")).softmax(1)
            if self.mentor is not None:
                params, buffers = self.mentor
                mentor = forward(self.net, params, x, (buffers, "eval")).softmax(1)
                target = teacher_share * target + (1.0 - teacher_share) * mentor
        return target

    def meta_backward(self, step, x, y_syn, target, logits=None, record=None):
        """Accumulates ∇L_meta into the parameters' `.grad`, branch by branch.

        `logits`, with their graph, are the forward at θ shared by all branches; without them each branch makes its own.
        """
        names, theta = list(self.params), list(self.params.values())
        branches = len(y_syn)
        kl_scale = 1.0 if step.kl == "batchmean" else 1.0 / self.net.classes
        for labels in y_syn:
            out = forward(self.net, self.params, x) if logits is None else logits
            inner = F.cross_entropy(out, labels)
            grads = torch.autograd.grad(
                inner, theta, create_graph=not step.first_order, retain_graph=logits is not None or not step.first_order
            )
            fast = {name: t - step.alpha * g for name, t, g in zip(names, theta, grads)}
            log_p = F.log_softmax(forward(self.net, fast, x), dim=1)
            consistency = kl_scale * F.kl_div(log_p, target, reduction="batchmean")
            (consistency / branches).backward(retain_graph=logits is not None)
            if record is not None:
                record.append((out.detach(), inner.detach(), [g.detach() for g in grads], consistency.detach()))

    def take_meta_gradient(self):
        grads = {name: t.grad for name, t in self.params.items()}
        for t in self.params.values():
            t.grad = None
        return grads

    def sgd(self, step, grads):
        with torch.no_grad():
            for name, t in self.params.items():
                g = grads[name].add(t, alpha=step.weight_decay)
                t.sub_(self.momentum[name].mul_(step.momentum).add_(g), alpha=step.lr)

    def classification(self, x):
        """The one forward that updates the running statistics."""
        return forward(self.net, self.params, x, (self.buffers, "update"))

    def class_gradient(self, logits, y, keep, retain_graph=False):
        loss = F.cross_entropy(logits, y) if keep is None else F.cross_entropy(logits[keep], y[keep])
        grads = torch.autograd.grad(loss, list(self.params.values()), retain_graph=retain_graph)
        return loss.detach(), dict(zip(self.params, grads))

    def step(self, step, x, y, y_syn, keep=None, record=None):
        """One training step. Returns (classification loss, target, meta-gradient)."""
        if step.sequential:
            target = self.target(x, step.teacher_share)
            logits = forward(self.net, self.params, x) if step.shared_forward else None
            self.meta_backward(step, x, y_syn, target, logits, record)
            del logits
            meta = self.take_meta_gradient()
            with torch.no_grad():
                for name, t in self.params.items():
                    t.sub_(meta[name], alpha=step.eta)
            loss, grads = self.class_gradient(self.classification(x), y, keep)
            self.sgd(step, grads)
            self.update_teacher(step.gamma)
        else:
            self.update_teacher(step.gamma)
            target = self.target(x, step.teacher_share)
            logits = self.classification(x)
            loss, grads = self.class_gradient(logits, y, keep, retain_graph=step.shared_forward)
            self.meta_backward(step, x, y_syn, target, logits if step.shared_forward else None, record)
            del logits
            meta = self.take_meta_gradient()
            self.sgd(step, {name: g + step.eta * meta[name] for name, g in grads.items()})
        return loss, target, meta


# --- Verification against the golden steps.


def relative_error(got, want):
    """‖got − want‖ / ‖want‖ over all tensors of a group together."""
    difference = sum(float(((got[n] - want[n]) ** 2).sum()) for n in want)
    norm = sum(float((want[n] ** 2).sum()) for n in want)
    return math.sqrt(difference / norm)


def golden_results(tensors, config, first_order, shared_forward):
    """Runs the golden step; returns its results by the golden file's names."""

    def group(prefix):
        names = (n for n in tensors if n.startswith(prefix))
        return {n.removeprefix(prefix): tensors[n].double() for n in names}

    net = Network(
        config["arch"], config["in_channels"], config["classes"], tuple(config["widths"]), tuple(config["blocks"])
    )
    mentor = (group("in.mentor.param."), group("in.mentor.buffer.")) if config["mentor"] else None
    student = Student(
        net,
        group("in.param."),
        group("in.buffer."),
        group("in.momentum."),
        group("in.teacher.param."),
        group("in.teacher.buffer."),
        mentor,
    )
    step = Step(
        sequential=config["update"] == "sequential",
        **{key: config[key] for key in ("kl", "alpha", "eta", "lr", "momentum", "weight_decay", "gamma")},
        teacher_share=config.get("lambda", 1.0),
        first_order=first_order,
        shared_forward=shared_forward,
    )
    record = []
    x, y, y_syn = tensors["in.x"].double(), tensors["in.y"], tensors["in.y_syn"]
    loss, target, meta = student.step(step, x, y, y_syn, tensors["in.keep"].bool(), record)

    results = {"logits": record[0][0], "class_loss": loss.reshape(1), "target": target}
    results["inner_loss"] = torch.stack([r[1] for r in record])
    results["consistency"] = torch.stack([r[3] for r in record])
    inner = zip(student.params, *(r[2] for r in record))
    results |= {f"inner_grad.{name}": torch.stack(g) for name, *g in inner}
    results |= {f"meta_grad_first_order.{n}" if first_order else f"meta_grad.{n}": g for n, g in meta.items()}
    for prefix, values in (
        ("param", student.params),
        ("momentum", student.momentum),
        ("buffer", student.buffers),
        ("teacher.param", student.teacher),
        ("teacher.buffer", student.teacher_buffers),
    ):
        results |= {f"{prefix}.{name}": t.detach() for name, t in values.items()}
    return results


GROUPS = (
    "target", "logits", "inner_loss", "inner_grad", "consistency", "meta_grad", "meta_grad_first_order",
    "class_loss", "param", "momentum", "buffer", "teacher.param", "teacher.buffer",
)  # fmt: skip


def verify(path, shared_forward):
    """Errors by group: {group: relative L2 error}."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    exact = golden_results(tensors, config, False, shared_forward)
    first_order = golden_results(tensors, config, True, shared_forward)
    errors = {}
    for group in GROUPS:
        results = first_order if group == "meta_grad_first_order" else exact
        prefix = f"out.{group}"
        names = [n for n in tensors if n == prefix or n.startswith(f"{prefix}.")]
        if not names:
            raise SystemExit(f"{path}: no tensor of group {group}")
        errors[group] = relative_error(
            {n: results[n.removeprefix("out.")] for n in names}, {n: tensors[n] for n in names}
        )
    return errors


def run_verify(paths, shared_forward):
    worst = 0.0
    for path in paths:
        errors = verify(path, shared_forward)
        worst = max(worst, *errors.values())
        print(path)
        for group, error in errors.items():
            print(f"  {group:<22} {error:.1e}")
    print(f"worst {worst:.1e}, bound {VERIFY_BOUND:.0e}: {'pass' if worst <= VERIFY_BOUND else 'FAIL'}")
    return 0 if worst <= VERIFY_BOUND else 1


# --- Timing.


def peak_rss_bytes():
    """The process's largest resident set so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def bench(args):
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(args.seed)
    net = Network("preact_resnet", args.in_channels, args.classes, args.widths, args.blocks)
    height, width = args.size
    rss_before = peak_rss_bytes()
    student = Student(net, *fresh_preact_resnet(net, generator))
    paper = args.recipe == "paper"
    step = Step(
        sequential=paper,
        kl="batchmean" if paper else "mean",
        alpha=0.2,
        eta=0.4,
        lr=0.02,
        momentum=0.9,
        weight_decay=1e-4,
        gamma=0.999,
        first_order=args.first_order,
        shared_forward=args.style == "shared",
    )
    seconds = []
    for _ in range(args.warmup + args.steps):
        x = torch.randn(args.batch, args.in_channels, height, width, generator=generator)
        y = torch.randint(args.classes, (args.batch,), generator=generator)
        y_syn = torch.randint(args.classes, (args.branches, args.batch), generator=generator)
        gc.collect()
        start = time.perf_counter()
        loss, _, _ = student.step(step, x, y, y_syn)
        seconds.append(time.perf_counter() - start)
    if not math.isfinite(loss.item()):
        raise SystemExit("the loss is not finite: the times mean nothing")
    seconds = seconds[args.warmup :]
    result = {
        "seconds_per_step": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "peak_rss_bytes": peak_rss_bytes(),
        "rss_before_bytes": rss_before,
        "recipe": args.recipe,
        "order": "first" if args.first_order else "exact",
        "style": args.style,
        "threads": args.threads,
        "steps": args.steps,
        "torch": torch.__version__,
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(f"recipe {args.recipe}, {result['order']} order, style {args.style}, {args.threads} threads")
        print(f"{result['seconds_per_step']:.4f} s per step ({result['min']:.4f} to {result['max']:.4f}, n={args.steps})")
        print(f"peak memory {result['peak_rss_bytes'] / 1e6:.0f} MB, before the model {rss_before / 1e6:.0f} MB")
    return 0


def main():
    def positive(text):
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError("must be at least 1")
        return value

    def integers(text):
        return tuple(positive(part) for part in text.split(","))

    def size(text):
        height, width = text.split("x")
        return positive(height), positive(width)

    parser = argparse.ArgumentParser(description="The MLNT training step in PyTorch eager: timing and verification.")
    parser.add_argument("--widths", type=integers, default=(8, 16, 32), metavar="W,…", help="channels per stage")
    parser.add_argument("--blocks", type=integers, default=(1, 1, 1), metavar="B,…", help="blocks per stage")
    parser.add_argument("--in-channels", type=positive, default=1)
    parser.add_argument("--size", type=size, default=(28, 28), metavar="HxW", help="image size")
    parser.add_argument("--classes", type=positive, default=10)
    parser.add_argument("--batch", type=positive, default=128)
    parser.add_argument("--branches", type=positive, default=4)
    parser.add_argument("--recipe", choices=("paper", "released"), default="paper")
    parser.add_argument("--first-order", action="store_true", help="drop the Hessian term")
    parser.add_argument(
        "--style",
        choices=("authors", "shared"),
        default="authors",
        help="authors: each branch repeats the forward at θ; shared: one forward at θ for all branches",
    )
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--steps", type=positive, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--verify", nargs="+", metavar="FILE", help="check against golden steps in float64 instead")
    args = parser.parse_args()
    if args.verify:
        torch.set_num_threads(args.threads)
        return run_verify(args.verify, args.style == "shared")
    if len(args.widths) != len(args.blocks):
        parser.error("--widths and --blocks must name the same number of stages")
    return bench(args)


if __name__ == "__main__":
    sys.exit(main())
