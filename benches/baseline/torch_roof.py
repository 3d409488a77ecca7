#!/usr/bin/env python3
"""The roof of a machine as a library reaches it: the best product of large matrices and the largest copy in PyTorch.

Prints one JSON object: operations per second by precision, bytes per second read and written by a copy. On a card times
are those of its events. Left in benches/results as NAME-roof.json, it is what our benchmarks' `percent of the roof` is of on
this card; without it that is the best that the engine's own convolutions reach.
"""

import argparse
import json
import statistics
import sys
import time

import torch

TYPES = {"f32": torch.float32, "tf32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
RUNS = (3, 10)  # before the timed ones, and those


def seconds(device, work):
    """Median seconds of one run."""
    times = []
    for _ in range(sum(RUNS)):
        if device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        else:
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
    return statistics.median(times[RUNS[0] :])


def flops(device, precision, size):
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    a, b = (torch.randn(size, size, device=device).to(TYPES[precision]) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * size**3 / seconds(device, lambda: torch.mm(a, b, out=out))


def copied(device, elements):
    a = torch.randn(elements, device=device)
    b = torch.empty_like(a)
    return 2.0 * a.nbytes / seconds(device, lambda: b.copy_(a))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", type=int, help="rows of the matrices [default: 8192 on a card, 1024 on the CPU]")
    args = parser.parse_args()
    card = args.device == "cuda"
    if card and not torch.cuda.is_available():
        print("torch_roof: torch sees no card", file=sys.stderr)
        return 1
    size = args.size or (8192 if card else 1024)
    precisions = list(TYPES) if card else ["f32"]
    found = {
        "card": torch.cuda.get_device_name() if card else None,
        "torch": torch.__version__,
        "size": size,
        "flop_per_second": {precision: flops(args.device, precision, size) for precision in precisions},
        "bytes_per_second": copied(args.device, 1 << (28 if card else 24)),
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
