"""Golden steps: reading them, and judging what a peer makes of them. The format is told in golden/FORMAT.md."""

import json
import math
from pathlib import Path

import numpy as np

from .spec import STATES, Network, Step

FOLDER = Path(__file__).resolve().parents[3] / "golden"
DTYPES = {"F32": np.float32, "F64": np.float64, "I64": np.int64, "U8": np.uint8}

GROUPS = ("target", "inner_loss", "consistency", "meta_grad", "class_loss", *STATES)


class Golden:
    """A golden step."""

    def __init__(self, path):
        self.path = Path(path)
        data = self.path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        self.config = json.loads(header.pop("__metadata__")["config"])
        self.tensors = {}
        for name, entry in header.items():
            begin, end = (start + offset for offset in entry["data_offsets"])
            values = np.frombuffer(data[begin:end], DTYPES[entry["dtype"]])
            self.tensors[name] = values.reshape(entry["shape"])

    def group(self, prefix):
        """Tensors whose name begins with `prefix` and a dot, by the rest of it."""
        prefix += "."
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def network(self):
        shape = {key: tuple(self.config[key]) for key in ("size", "widths", "blocks")}
        return Network(self.config["arch"], self.config["in_channels"], classes=self.config["classes"], **shape)

    def step(self, first_order=False):
        keys = ("kl", "alpha", "eta", "lr", "momentum", "weight_decay", "gamma")
        return Step(
            sequential=self.config["update"] == "sequential",
            **{key: self.config[key] for key in keys},
            teacher_share=self.config.get("lambda", 1.0),
            first_order=first_order,
        )

    def state(self):
        """What the step starts from, with the mentor where there is one."""
        groups = STATES + (("mentor.param", "mentor.buffer") if self.config["mentor"] else ())
        return {group: self.group(f"in.{group}") for group in groups}

    def batch(self):
        keep = self.tensors["in.keep"].astype(np.float64)
        batch = {name: self.tensors[f"in.{name}"] for name in ("x", "y", "y_syn")}
        return batch | {"class_weight": keep / keep.sum()}

    def judge(self, results, first_order):
        """Relative L2 error of every group of results. `results` has the golden names without `out.`.

        Of what a step changes it is the change that is compared: a wrong update of a small learning rate would be lost
        in the size of the parameters. With the first-order meta-gradient only what does not depend on it can be.
        """
        errors = {}
        inner = ("inner_grad",) if any(name.startswith("inner_grad.") for name in results) else ()
        for group in inner + GROUPS:
            if first_order and (group in STATES or (group == "class_loss" and self.config["update"] == "sequential")):
                continue
            saved = "meta_grad_first_order" if first_order and group == "meta_grad" else group
            want = self.group(f"out.{saved}") or {"": self.tensors[f"out.{saved}"]}
            have = {name: results[f"{group}.{name}" if name else group] for name in want}
            start = self.group(f"in.{group}") if group in STATES else {}
            errors[group] = relative_error(have, want, start)
        return errors


def relative_error(have, want, start):
    """‖have − want‖ / ‖want − start‖ over all tensors of a group together; infinite where it is not a number."""
    difference = sum(float(np.sum((have[n].astype(np.float64).reshape(want[n].shape) - want[n]) ** 2)) for n in want)
    norm = sum(float(np.sum((want[n] - start.get(n, 0.0)) ** 2)) for n in want)
    error = math.sqrt(difference / norm)
    return error if math.isfinite(error) else math.inf
