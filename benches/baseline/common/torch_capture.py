"""A whole step as one CUDA graph."""

import torch

from .spec import STATES

WARMUP = 3  # steps before the capture: libraries allocate and choose their algorithms in the first


class Captured:
    """`student.step` captured for batches shaped like the first one, and replayed.

    Steps before the capture would train the student: its state is put back, also where the capture fails.
    """

    def __init__(self, student, batch):
        self.batch = {name: t.clone() for name, t in batch.items()}
        state = [t for group in STATES for t in student.state[group].values()]
        saved = [t.detach().clone() for t in state]
        try:
            self.capture(student)
        finally:
            with torch.no_grad():
                for t, values in zip(state, saved):
                    t.copy_(values)

    def capture(self, student):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                student.step(**self.batch)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.report = student.step(**self.batch)

    def step(self, **batch):
        for name, t in self.batch.items():
            t.copy_(batch[name])
        self.graph.replay()
        return self.report
