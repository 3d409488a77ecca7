#!/usr/bin/env python3
"""The MLNT training step with `torch.compile` over nested `torch.func.grad`.

What is compiled: the meta-gradient of one branch, a gradient through a gradient, as one function that the M branches
call in turn; the classification loss, with its backward; the target; the updates of all parameters. Branches repeat the
forward at θ: sharing it would take one function of all branches, which takes M times as long to compile. On a card the
compiled step is recorded as one CUDA graph; where that fails it is launched piece by piece, and the result says so.
"""

import sys

import torch.nn.functional as F
from common.peer import main
from common.torch_capture import Captured
from common.torch_network import forward
from common.torch_peer import TorchPeer, torch


class CompiledStudent:
    """The step of compiled functions. Its state changes in place."""

    def __init__(self, net, how, state, amp, scale):
        self.net, self.how, self.state, self.amp, self.scale = net, how, state, amp, scale
        self.params = {name: t.requires_grad_() for name, t in state["param"].items()}
        self.branch_gradient = torch.compile(torch.func.grad(self.branch_loss, has_aux=True), fullgraph=True)
        self.class_loss = torch.compile(self.class_loss_eager, fullgraph=True)
        self.target = torch.no_grad()(torch.compile(self.target_eager, fullgraph=True))
        self.update = torch.no_grad()(torch.compile(self.update_eager, fullgraph=True))

    def branch_loss(self, theta, x, labels, target):
        """(scaled J_m, (inner loss, J_m))."""

        def inner_loss(params):
            return self.scale * F.cross_entropy(forward(self.net, params, x, None, self.amp), labels)

        grads, inner = torch.func.grad_and_value(inner_loss)(theta)
        if self.how.first_order:
            grads = {name: g.detach() for name, g in grads.items()}
        fast = {name: theta[name] - self.how.alpha / self.scale * g for name, g in grads.items()}
        log_p = F.log_softmax(forward(self.net, fast, x, None, self.amp), dim=1)
        consistency = self.how.kl_scale(self.net.classes) * F.kl_div(log_p, target, reduction="batchmean")
        return self.scale * consistency, (inner / self.scale, consistency)

    def class_loss_eager(self, params, buffers, x, y, class_weight):
        logits = forward(self.net, params, x, (buffers, "update"), self.amp)
        return (F.cross_entropy(logits, y, reduction="none") * class_weight).sum()

    def target_eager(self, params, buffers, x):
        return forward(self.net, params, x, (buffers, "update"), self.amp).softmax(1)

    def update_eager(self, params, velocity, grads, meta, eta):
        """SGD on grads + eta·meta."""
        for name, t in params.items():
            g = grads[name] + eta * meta[name] + self.how.weight_decay * t
            t.sub_(velocity[name].mul_(self.how.momentum).add_(g), alpha=self.how.lr)

    @torch.no_grad()
    def update_teacher(self):
        teacher = list(self.state["teacher.param"].values())
        torch._foreach_lerp_(teacher, list(self.params.values()), 1.0 - self.how.gamma)

    def class_gradient(self, x, y, class_weight):
        loss = self.class_loss(self.params, self.state["buffer"], x, y, class_weight)
        grads = torch.autograd.grad(self.scale * loss, list(self.params.values()))
        return loss.detach(), {name: g / self.scale for name, g in zip(self.params, grads)}

    def meta_gradient(self, x, y_syn, target, report):
        theta = {name: t.detach() for name, t in self.params.items()}
        total = None
        for labels in y_syn:
            grads, (inner, consistency) = self.branch_gradient(theta, x, labels, target)
            grads = list(grads.values())
            if total is None:
                total = grads
            else:
                torch._foreach_add_(total, grads)
            report["inner_loss"].append(inner)
            report["consistency"].append(consistency)
        torch._foreach_div_(total, len(y_syn) * self.scale)
        return dict(zip(theta, total))

    def step(self, x, y, y_syn, class_weight):
        report = {"inner_loss": [], "consistency": []}
        state, eta = self.state, self.how.eta
        if not self.how.sequential:
            self.update_teacher()
        target = self.target(state["teacher.param"], state["teacher.buffer"], x)
        meta = self.meta_gradient(x, y_syn, target, report)
        if self.how.sequential:
            with torch.no_grad():
                torch._foreach_sub_(list(self.params.values()), list(meta.values()), alpha=eta)
            eta = 0.0
        loss, grads = self.class_gradient(x, y, class_weight)
        self.update(self.params, state["momentum"], grads, meta, eta)
        if self.how.sequential:
            self.update_teacher()
        return report | {"target": target, "class_loss": loss, "meta_grad": meta}


class Compiled(TorchPeer):
    name = "torch.compile"
    mentor = False
    archs = ("preact_resnet",)
    memory_format = torch.channels_last

    @classmethod
    def configure(cls, args):
        super().configure(args)
        # Golden steps and timed steps, in two precisions: each is a version of the functions of its own.
        torch._dynamo.config.cache_size_limit = 64

    def prepare(self, args):
        self.student = CompiledStudent(self.net, self.how, self.state, self.amp, self.scale)
        self.launched, self.why = None, None

    def step(self, **batch):
        if self.launched is None:
            self.launched = self.launcher(batch)
        return self.launched(**batch)

    def launcher(self, batch):
        if self.device.type == "cpu":
            return self.student.step
        try:
            return Captured(self.student, batch).step
        except RuntimeError as error:
            self.why = str(error).splitlines()[0]
            torch.cuda.synchronize()
            return self.student.step

    def notes(self):
        return [] if self.why is None else [f"not captured as a graph: {self.why}"]


if __name__ == "__main__":
    sys.exit(main(Compiled))
