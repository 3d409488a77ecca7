"""How a peer is checked, timed and asked: its command line.

A peer is refused unless a golden step comes out right: in double precision to 1e-10, then in the precision and on the
device in which it is timed. `--serve` keeps the process, so that `compare.py` can take turns with programs that
compile for minutes: it prints one JSON object when it is ready and one for every line it reads.
"""

import argparse
import dataclasses
import gc
import json
import math
import resource
import statistics
import sys
import time
import traceback
from pathlib import Path

import numpy as np

from .bounds import BOUNDS
from .golden import FOLDER, Golden
from .spec import Network, fresh_state, random_batch, recipe_step

REFUSED = 3  # exit status of a peer that cannot do what is asked, or does it wrong


class Refused(Exception):
    """This peer is not timed; the text says why."""


class Peer:
    """One implementation of the step.

    A subclass has `name`, `archs` (the networks it knows), `mentor` (whether it mixes a mentor into the target), and
    `put`, `timed`, `loss`, `results`; or `measure` and `results`.
    """

    name = ""
    archs = ("preact_resnet",)
    mentor = False
    styles = ()
    own_process = False  # the step is done by another process than this
    precisions = ("f32", "tf32", "f16", "bf16", "f64")

    @classmethod
    def add_arguments(cls, parser):
        """Adds what only this peer takes."""

    @classmethod
    def configure(cls, args):
        """Sets the framework up, before the first instance.

        Raises Refused where it cannot do what is asked.
        """
        if args.precision not in cls.precisions:
            raise Refused(f"computes in {', '.join(cls.precisions)}, not in {args.precision}")
        if args.precision == "tf32" and args.device == "cpu":
            raise Refused("tf32 needs a card")

    def measure(self, batch):
        """One step: (seconds of the host from the batch in its memory to the loss there, seconds of the step alone)."""
        start = time.perf_counter()
        device_seconds = self.timed(self.put(batch))
        loss = self.loss()
        seconds = time.perf_counter() - start
        if not math.isfinite(loss):
            raise Refused(f"the loss is {loss}: the times mean nothing")
        return seconds, device_seconds

    def notes(self):
        """What is to be known of how it ran."""
        return []

    def peak_device_bytes(self):
        """Most memory taken on a card; None where the framework does not tell."""

    def peak_rss_bytes(self):
        """Largest resident set so far of the process that does the step."""
        return peak_rss_bytes()

    def close(self):
        """Ends what the peer has started."""


def golden_errors(peer_type, golden, step, precision, args):
    """The errors by group when a peer does `step` where a golden step is asked for."""
    peer = peer_type(golden.network(), step, golden.state(), precision, args)
    try:
        peer.measure(golden.batch())
        return golden.judge(peer.results(), args.first_order)
    finally:
        peer.close()


def fitting(peer_type, args):
    """The golden steps that this peer can do, in the order of updates that is timed."""
    found = [Golden(path) for path in sorted(args.golden.glob("*.safetensors"))]
    update = "sequential" if args.recipe == "paper" else "joint"
    fit = [g for g in found if g.config["arch"] in peer_type.archs and (peer_type.mentor or not g.config["mentor"])]
    fit = [g for g in fit if g.config["update"] == update]
    if not fit:
        raise Refused(f"no golden step with {update} updates in {args.golden} that this peer can do")
    return fit


def check(peer_type, args):
    """Checks a peer against the golden steps; returns the errors and raises Refused where one is too large."""
    checks = []
    for golden in fitting(peer_type, args):
        # The timed network is a PreAct ResNet: in its precision, too, only that is asked for.
        timed = [args.precision] if golden.config["arch"] == "preact_resnet" else []
        for precision in dict.fromkeys(("f64", *timed)):
            errors = golden_errors(peer_type, golden, golden.step(args.first_order), precision, args)
            group = max(errors, key=errors.get)
            bound, worst = BOUNDS[precision], errors[group]
            verdict = {"file": golden.path.name, "precision": precision, "bound": bound, "group": group}
            checks.append(verdict | {"worst": None if math.isinf(worst) else worst, "errors": errors})
            if not worst <= bound:
                raise Refused(
                    f"{golden.path.name} in {precision}: {group} is off by {worst:.1e} (relative), the bound is {bound:.0e}"
                )
    return checks


def self_test(peer_type, args):
    """Plants wrong signs, which the check must refuse. Returns the exit status."""
    failed = False
    for golden in fitting(peer_type, args):
        right = golden.step(args.first_order)
        # Below f32 the smaller faults cannot be told from rounding: that is what double precision is for.
        faults = {"none": {}, "sign of α": {"alpha": -right.alpha}}
        fine = {"sign of γ": {"gamma": -right.gamma}, "sign of the momentum": {"momentum": -right.momentum}}
        fine |= {"sign of η": {"eta": -right.eta}, "no second order": {"first_order": True}}
        timed = [args.precision] if golden.config["arch"] == "preact_resnet" else []
        for precision in dict.fromkeys(("f64", *timed)):
            more = fine if precision in ("f64", "f32") and not args.first_order else {}
            for fault, change in (faults | more).items():
                wrong = dataclasses.replace(right, **change)
                worst = max(golden_errors(peer_type, golden, wrong, precision, args).values())
                refused = not worst <= BOUNDS[precision]
                right_so = refused == (fault != "none")
                failed |= not right_so
                said = ("refused" if refused else "accepted") + ("" if right_so else ", FAULT")
                print(f"{golden.path.name:28} {precision:5} wrong: {fault:21} error {worst:.1e}  {said}")
    print(f"{peer_type.name}: {'FAIL' if failed else 'pass'}")
    return 1 if failed else 0


def peak_rss_bytes():
    """The process's largest resident set so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Bench:
    """A peer at work on the size asked for."""

    def __init__(self, peer_type, args):
        self.args, self.random = args, np.random.default_rng(args.seed)
        self.net = Network("preact_resnet", args.in_channels, args.size, args.classes, args.widths, args.blocks)
        step = recipe_step(args.recipe, args.first_order)
        self.rss_before = peak_rss_bytes()
        self.peer = peer_type(self.net, step, fresh_state(self.net, args.seed), args.precision, args)
        self.steps(args.warmup)

    def steps(self, count):
        times = []
        for _ in range(count):
            batch = random_batch(self.net, self.args.batch, self.args.branches, self.random)
            gc.collect()
            times.append(self.peer.measure(batch))
        return times

    def round(self):
        """One round: medians and extremes of its steps."""
        seconds, device = zip(*self.steps(self.args.steps))
        return {
            "seconds_per_step": statistics.median(seconds),
            "min": min(seconds),
            "max": max(seconds),
            "device_seconds_per_step": statistics.median(device),
            "device_min": min(device),
            "device_max": max(device),
            "steps": self.args.steps,
            "peak_rss_bytes": self.peer.peak_rss_bytes(),
            "rss_before_bytes": None if self.peer.own_process else self.rss_before,
            "peak_device_bytes": self.peer.peak_device_bytes(),
            "notes": self.peer.notes(),
        }


def tell(value):
    print(json.dumps(value), flush=True)


def arguments(peer_type):
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

    about = sys.modules[peer_type.__module__].__doc__
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=tuple(BOUNDS), default="f32")
    parser.add_argument("--widths", type=integers, default=(8, 16, 32), metavar="W,…", help="channels per stage")
    parser.add_argument("--blocks", type=integers, default=(1, 1, 1), metavar="B,…", help="blocks per stage")
    parser.add_argument("--in-channels", type=positive, default=1)
    parser.add_argument("--size", type=size, default=(28, 28), metavar="HxW", help="image size")
    parser.add_argument("--classes", type=positive, default=10)
    parser.add_argument("--batch", type=positive, default=128)
    parser.add_argument("--branches", type=positive, default=4)
    parser.add_argument("--recipe", choices=("paper", "released"), default="paper")
    parser.add_argument("--first-order", action="store_true", help="drop the Hessian term")
    if peer_type.styles:
        parser.add_argument("--style", choices=peer_type.styles, default=peer_type.styles[0])
    parser.add_argument("--threads", type=positive, default=2, help="of the CPU")
    parser.add_argument("--steps", type=positive, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--golden", type=Path, default=FOLDER, help="folder of golden steps")
    parser.add_argument("--check", action="store_true", help="check only")
    parser.add_argument("--self-test", action="store_true", help="plant wrong signs, which the check must refuse")
    parser.add_argument("--serve", action="store_true", help="time one round for every line of standard input")
    peer_type.add_arguments(parser)
    args = parser.parse_args()
    if len(args.widths) != len(args.blocks):
        parser.error("--widths and --blocks must name the same number of stages")
    return args


def main(peer_type):
    """Runs a peer's command line; returns the exit status."""
    args = arguments(peer_type)
    try:
        peer_type.configure(args)
        if args.self_test:
            return self_test(peer_type, args)
        start = time.monotonic()
        checks = check(peer_type, args)
        about = {"peer": peer_type.name, "precision": args.precision, "versions": peer_type.versions()}
        about |= {"check": checks, "check_seconds": time.monotonic() - start}
        if args.check:
            tell(about)
            return 0
        start = time.monotonic()
        bench = Bench(peer_type, args)
        about["start_seconds"] = time.monotonic() - start
        if not args.serve:
            tell(about | bench.round())
        else:
            tell(about)
            for _ in sys.stdin:
                tell(bench.round())
        bench.peer.close()
    except Refused as why:
        print(f"{peer_type.name}: {why}", file=sys.stderr)
        return REFUSED
    except Exception as error:  # noqa: BLE001, frameworks raise what they like
        # The last line is what a comparison quotes.
        traceback.print_exc()
        said = str(error).strip().splitlines() or ["no reason given"]
        print(f"{peer_type.name}: {type(error).__name__}: {said[0]}", file=sys.stderr)
        return 1
    return 0
