#!/usr/bin/env python3
"""The MLNT training step in PyTorch eager.

It is written the way the method usually is on a framework's autograd: a Python loop over the M branches, each with a
forward at θ, `torch.autograd.grad(create_graph=True)`, a forward at the fast weights and a gradient that is added up.
`--style authors`: each branch repeats the forward at θ; `--style shared`: one forward at θ for all branches.
"""

import sys

from common.peer import main
from common.torch_peer import TorchPeer
from common.torch_step import Student


class Eager(TorchPeer):
    name = "PyTorch eager"
    styles = ("authors", "shared")

    def prepare(self, args):
        shared, detail = args.style == "shared", args.check or args.self_test
        student = Student(self.net, self.how, self.state, shared, self.amp, self.scale, inner_gradients=detail)
        self.step = student.step


if __name__ == "__main__":
    sys.exit(main(Eager))
