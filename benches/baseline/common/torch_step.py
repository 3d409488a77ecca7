"""The step on PyTorch's autograd, operation by operation: a loop over the M branches, each with
`torch.autograd.grad(create_graph=True)`, a forward at the fast weights, and a gradient of the consistency loss.

All that a step changes it changes in place, so that a step can be captured as a CUDA graph.
"""

import torch
import torch.nn.functional as F

from .torch_network import forward


class Student:
    """Everything a step reads and writes.

    state: {group: {name: tensor}}, which it takes over. shared_forward: one forward at θ for all branches, its graph
    kept, instead of one per branch. amp: type of autocast, or None. scale: what losses are multiplied by before their
    gradient is taken, and gradients divided by after it, so that small cotangents survive in f16. inner_gradients:
    report them too.
    """

    def __init__(self, net, step, state, shared_forward=False, amp=None, scale=1.0, inner_gradients=False):
        self.net, self.how, self.state = net, step, state
        self.shared_forward, self.amp, self.scale = shared_forward, amp, scale
        self.inner_gradients = inner_gradients
        self.params = {name: t.requires_grad_() for name, t in state["param"].items()}

    def forward(self, params, x, stats=None):
        return forward(self.net, params, x, stats, self.amp)

    def gradient(self, loss, **flags):
        grads = torch.autograd.grad(self.scale * loss, list(self.params.values()), **flags)
        return grads if self.scale == 1.0 else [g / self.scale for g in grads]

    def update_teacher(self):
        with torch.no_grad():
            for name, t in self.state["teacher.param"].items():
                t.mul_(self.how.gamma).add_(self.params[name], alpha=1.0 - self.how.gamma)

    def target(self, x):
        """Consistency target [k, classes]: the teacher, mixed with the mentor where there is one."""
        with torch.no_grad():
            target = self.forward(self.state["teacher.param"], x, (self.state["teacher.buffer"], "update")).softmax(1)
            if "mentor.param" in self.state:
                mentor = self.forward(self.state["mentor.param"], x, (self.state["mentor.buffer"], "eval")).softmax(1)
                target = self.how.teacher_share * target + (1.0 - self.how.teacher_share) * mentor
        return target

    def meta_gradient(self, x, y_syn, target, report, logits=None):
        """∇L_meta, a list in the order of the parameters, branch by branch.

        `logits`, with their graph, are the forward at θ shared by all branches; without them each branch makes its own.
        """
        step, branches = self.how, len(y_syn)
        kl_scale = step.kl_scale(self.net.classes)
        total = None
        for labels in y_syn:
            out = self.forward(self.params, x) if logits is None else logits
            inner = F.cross_entropy(out, labels)
            keep_graph = logits is not None or not step.first_order
            grads = self.gradient(inner, create_graph=not step.first_order, retain_graph=keep_graph)
            fast = {name: t - step.alpha * g for (name, t), g in zip(self.params.items(), grads)}
            log_p = F.log_softmax(self.forward(fast, x), dim=1)
            consistency = kl_scale * F.kl_div(log_p, target, reduction="batchmean")
            of_branch = self.gradient(consistency / branches, retain_graph=logits is not None)
            if total is None:
                total = list(of_branch)
            else:
                for sum_, g in zip(total, of_branch):
                    sum_.add_(g)
            report["inner_loss"].append(inner.detach())
            report["consistency"].append(consistency.detach())
            if self.inner_gradients:
                report.setdefault("inner_grad", []).append([g.detach() for g in grads])
        return total

    def sgd(self, grads):
        with torch.no_grad():
            for (name, t), g in zip(self.params.items(), grads):
                g = g.add(t, alpha=self.how.weight_decay)
                t.sub_(self.state["momentum"][name].mul_(self.how.momentum).add_(g), alpha=self.how.lr)

    def class_loss(self, x, y, class_weight):
        """Logits and classification loss: the one forward that updates the running statistics."""
        logits = self.forward(self.params, x, (self.state["buffer"], "update"))
        return logits, (F.cross_entropy(logits, y, reduction="none") * class_weight).sum()

    def step(self, x, y, y_syn, class_weight):
        """One training step. Returns its losses, target and meta-gradient by their golden names."""
        report = {"inner_loss": [], "consistency": []}
        if self.how.sequential:
            target = self.target(x)
            logits = self.forward(self.params, x) if self.shared_forward else None
            meta = self.meta_gradient(x, y_syn, target, report, logits)
            del logits
            with torch.no_grad():
                for t, g in zip(self.params.values(), meta):
                    t.sub_(g, alpha=self.how.eta)
            _, loss = self.class_loss(x, y, class_weight)
            self.sgd(self.gradient(loss))
            self.update_teacher()
        else:
            self.update_teacher()
            target = self.target(x)
            logits, loss = self.class_loss(x, y, class_weight)
            grads = self.gradient(loss, retain_graph=self.shared_forward)
            meta = self.meta_gradient(x, y_syn, target, report, logits if self.shared_forward else None)
            del logits
            self.sgd([g + self.how.eta * m for g, m in zip(grads, meta)])
        report |= {"target": target, "class_loss": loss.detach(), "meta_grad": dict(zip(self.params, meta))}
        if self.inner_gradients:
            report["inner_grad"] = {name: torch.stack(g) for name, *g in zip(self.params, *report["inner_grad"])}
        return report
