#!/usr/bin/env python3
"""The MLNT training step on libtorch, in C++ (libtorch/): the loop of torch_eager.py's style `authors` without Python.

    python libtorch_cpp.py --build      compiles it with cmake against the torch of this Python, or --torch FOLDER

The program is told what to do through a pipe; it times itself.
"""

import argparse
import importlib.metadata
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common.peer import REFUSED, Peer, Refused, main
from common.spec import STATES

HERE = Path(__file__).resolve().parent
BUILT = HERE.parents[1] / "target" / "libtorch"
TYPES = {"f4": "f32", "f8": "f64", "i8": "i64"}


def installed_torch():
    """The folder of this Python's torch, which is not imported; None without one."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec else None


def build(torch):
    """Compiles the program; returns the exit status."""
    if torch is None:
        print("libtorch: no torch in this Python; --torch FOLDER names a libtorch", file=sys.stderr)
        return REFUSED
    configure = ["cmake", "-S", str(HERE / "libtorch"), "-B", str(BUILT), f"-DTORCH={torch}"]
    try:
        for command in (configure, ["cmake", "--build", str(BUILT)]):
            subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"libtorch: {error}", file=sys.stderr)
        return REFUSED
    return 0


class Libtorch(Peer):
    name = "libtorch C++"
    precisions = ("f32", "tf32", "f64")
    own_process = True

    @classmethod
    def add_arguments(cls, parser):
        parser.add_argument("--binary", type=Path, default=BUILT / "mlnt_libtorch", help="the compiled program")

    @classmethod
    def configure(cls, args):
        super().configure(args)
        if not args.binary.is_file():
            raise Refused(f"{args.binary} is not there: compile it with libtorch_cpp.py --build")

    @classmethod
    def versions(cls):
        return {"libtorch": importlib.metadata.version("torch") if installed_torch() else "unknown"}

    def __init__(self, net, how, state, precision, args):
        settings = {
            "blocks": ",".join(map(str, net.blocks)),
            "sequential": int(how.sequential),
            "first_order": int(how.first_order),
            "kl_scale": how.kl_scale(net.classes),
            **{key: getattr(how, key) for key in ("alpha", "eta", "lr", "momentum", "weight_decay", "gamma")},
            "device": args.device,
            "type": "f64" if precision == "f64" else "f32",
            "tf32": int(precision == "tf32"),
            "threads": args.threads,
        }
        command = [str(args.binary), *(f"{key}={value}" for key, value in settings.items())]
        # The program finds its libraries where it was compiled; elsewhere, in this Python's torch.
        folders = [str(installed_torch() / "lib")] if installed_torch() else []
        path = os.pathsep.join([*folders, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the program
        self.program = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=os.environ | {"LD_LIBRARY_PATH": path},
        )
        self.peak = 0
        self.send("load", {f"{group}:{name}": t for group in STATES for name, t in state[group].items()})

    def send(self, word, tensors=None):
        try:
            self.program.stdin.write(f"{word}\n".encode())
            if tensors is not None:
                self.program.stdin.write(f"tensors {len(tensors)}\n".encode())
                for name, array in tensors.items():
                    kind = TYPES[array.dtype.str.lstrip("<|")]
                    shape = "".join(f" {n}" for n in array.shape)
                    self.program.stdin.write(f"{name} {kind}{shape}\n".encode() + array.tobytes())
            self.program.stdin.flush()
        except BrokenPipeError:
            self.ended()

    def line(self):
        line = self.program.stdout.readline()
        if not line:
            self.ended()
        return line.decode().split()

    def ended(self):
        status = self.program.wait()
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip().splitlines()
        raise Refused(f"the program ended with status {status}: {said[0] if said else 'it said nothing'}")

    def measure(self, batch):
        self.send("step", batch)
        seconds, device_seconds, loss, self.peak = (float(word) for word in self.line())
        if not math.isfinite(loss):
            raise Refused(f"the loss is {loss}: the times mean nothing")
        return seconds, device_seconds

    def peak_device_bytes(self):
        return int(self.peak) or None

    def peak_rss_bytes(self):
        try:
            status = Path(f"/proc/{self.program.pid}/status").read_text()
        except OSError:
            return None
        return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), None)

    def results(self):
        self.send("results")
        found = {}
        for _ in range(int(self.line()[1])):
            name, _, *shape = self.line()
            shape = [int(n) for n in shape]
            data = self.program.stdout.read(8 * math.prod(shape))
            found[name] = np.frombuffer(data, np.float64).reshape(shape)
        return found

    def close(self):
        self.program.stdin.close()
        self.program.wait()
        self.program.stdout.close()
        self.errors.close()


if __name__ == "__main__":
    if "--build" in sys.argv[1:]:
        parser = argparse.ArgumentParser()
        parser.add_argument("--build", action="store_true")
        parser.add_argument("--torch", type=Path, default=installed_torch())
        sys.exit(build(parser.parse_args().torch))
    sys.exit(main(Libtorch))
