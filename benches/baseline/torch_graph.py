#!/usr/bin/env python3
"""The MLNT training step in PyTorch under one CUDA graph, with automatic mixed precision and channels-last tensors.

The step is that of torch_eager.py with one forward at θ for all branches. It is recorded once, from the target to the
teacher's update, and replayed. `--precision f16` (losses scaled by 1024) or `bf16`; `f32` and `tf32` work without
autocast. On the CPU there is no graph and `--check` is all it does.
"""

import sys

from common.peer import Refused, main
from common.torch_capture import Captured
from common.torch_peer import TorchPeer, torch
from common.torch_step import Student


class WholeStepGraph(TorchPeer):
    name = "PyTorch, one CUDA graph"
    memory_format = torch.channels_last

    @classmethod
    def configure(cls, args):
        super().configure(args)
        if args.device == "cpu" and not (args.check or args.self_test):
            raise Refused("a CUDA graph needs a card; on the CPU the step can only be checked")

    def prepare(self, args):
        self.student = Student(self.net, self.how, self.state, True, self.amp, self.scale)
        self.captured = None

    def step(self, **batch):
        if self.device.type == "cpu":
            return self.student.step(**batch)
        if self.captured is None:
            self.captured = Captured(self.student, batch)
        return self.captured.step(**batch)


if __name__ == "__main__":
    sys.exit(main(WholeStepGraph))
