"""What every peer on PyTorch does alike: tensors on the device, precision, the clock, results by golden names."""

import time

import numpy as np
import torch

from .peer import Peer, Refused
from .spec import STATES

TYPES = {"f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}
F16_SCALE = 1024.0  # of losses; unscaled cotangents of f16 lose a hundredth of the meta-gradient


class TorchPeer(Peer):
    """A peer on PyTorch. A subclass sets up its step in `prepare` and does one in `step`."""

    archs = ("preact_resnet", "resnet_bottleneck")
    mentor = True
    memory_format = torch.contiguous_format

    @classmethod
    def configure(cls, args):
        super().configure(args)
        if args.device == "cuda" and not torch.cuda.is_available():
            raise Refused("torch sees no card")
        torch.set_num_threads(args.threads)
        # The fastest convolutions are found by trying, as a tuned program does; in f32 none of them may round to TF32.
        torch.backends.cudnn.benchmark = True
        for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):
            backend.allow_tf32 = args.precision == "tf32"

    @classmethod
    def versions(cls):
        return {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}

    def __init__(self, net, step, state, precision, args):
        self.net, self.how, self.device = net, step, torch.device(args.device)
        self.dtype = torch.float64 if precision == "f64" else torch.float32
        self.amp = TYPES[precision] if precision in ("f16", "bf16") else None
        self.scale = F16_SCALE if precision == "f16" else 1.0
        placed = {group: {name: self.place(t) for name, t in tensors.items()} for group, tensors in state.items()}
        self.state = placed
        self.prepare(args)
        self.report = None

    def place(self, array):
        """A copy of an array on the device: reals in the peer's type, images and weights in its layout."""
        dtype = self.dtype if array.dtype.kind == "f" else torch.int64
        tensor = torch.from_numpy(np.array(array)).to(self.device, dtype)
        return tensor.contiguous(memory_format=self.memory_format) if tensor.ndim == 4 else tensor

    def put(self, batch):
        return {name: self.place(array) for name, array in batch.items()}

    def timed(self, batch):
        if self.device.type == "cpu":
            start = time.perf_counter()
            self.report = self.step(**batch)
            return time.perf_counter() - start
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.report = self.step(**batch)
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def loss(self):
        return self.report["class_loss"].item()

    def peak_device_bytes(self):
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    def results(self):
        """The results of the last step as arrays by golden names."""
        found = {}
        for name, value in (self.report | {group: self.state[group] for group in STATES}).items():
            if isinstance(value, dict):
                found |= {f"{name}.{key}": t.detach().cpu().numpy() for key, t in value.items()}
            else:
                value = torch.stack(value) if isinstance(value, list) else value
                found[name] = value.detach().cpu().numpy()
        return found
