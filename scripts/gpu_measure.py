#!/usr/bin/env python3
"""Checks and measures a built mlnt on a card, once: correctness, our benchmarks, the peers, a summary.

    scripts/gpu_measure.py --mlnt MLNT --benches FOLDER --python PYTHON [--libtorch PROGRAM] [--profile] [--lab]
    scripts/gpu_measure.py ... --device cpu --out /tmp/results      the same way through, on a small network without a card

FOLDER holds the built benchmarks `step`, `kernels` and `ops` with the names that cargo gives them (`step-0123…`;
`MLNT_COMMIT=$(git rev-parse HEAD) cargo bench --no-run` leaves them in target/release/deps); PYTHON has torch and jax.
Neither cargo nor network is needed. Parts, in this order; each has a limit of its own, and one that fails or is not
there stops no other:

    check     scripts/gpu_check.py: every operation, golden steps, training twice
    roof      what PyTorch's matrix product and copy reach: the roof that the benchmarks below take percentages of
    step      the whole step by M, k, recipe, order and precision
    kernels   every launch of the step at M = 10
    compare   benches/baseline/compare.py: all peers in turn, in the exact order
    ops       all operation cases
    first     the comparison in first order, in what is left of --budget: not run when that is less than 2 minutes; 8 at most
    lab       scripts/lab.py, with --lab only: the versions of kernels/lab; needs nvcc
    profile   scripts/gpu_profile.py, with --profile only: ncu and nsys
    roofline  scripts/roofline.py: what the kernels took beside what they must take

Files go to benches/results/, named by card. Exit status: 0 when all parts ran and the check passed, else 1.
"""

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["check", "roof", "step", "kernels", "compare", "ops", "first", "lab", "profile", "roofline"]
ON_DEMAND = ["lab", "profile"]
# The longest each part may take, seconds.
LIMITS = {"check": 300, "step": 200, "kernels": 60, "roof": 60, "compare": 720, "ops": 400, "profile": 240}
LIMITS |= {"first": 480, "lab": 240, "roofline": 10}
TO_END = 70  # seconds that a comparison has to come to its end, of its limit
LEAST = 120  # seconds that one in first order is begun for
# What each part writes, beside its log.
WRITTEN = {
    "first": ["compare-first.json"],
    "step": ["step.json", "step-batch.json"],
    "profile": ["profile-ncu.json", "profile-nsys.csv"],
    "roofline": ["roofline.md"],
}
ROWS = 12  # of the longest launches, in the summary

# What the benchmarks are run with.
SIZES = {
    "cuda": {
        "step": "--network resnet32 --precision f16,bf16,tf32,f32 --branches 1,4,10 --recipe released --seconds 0.5",
        "more steps": "--network resnet32 --precision f16 --branches 10 --batch 64,128,256 --recipe paper --seconds 0.5",
        "kernels": "--network resnet32 --precision f16,tf32 --branches 10",
        "ops": "--precision f16",
        "compare": "--recipe released --rounds 4 --warmup 5 --steps 20 --peer-steps 5",
        "roof": "",
    },
    "cpu": {
        "step": "--branches 1 --batch 16 --recipe released --seconds 0.05",
        "more steps": "--branches 2 --batch 8 --recipe released --seconds 0.05",
        "kernels": "--branches 2 --batch 16 --steps 3",
        "ops": "relu",
        "compare": "--recipe released --rounds 2 --steps 2 --peer-steps 1 --warmup 1 "
        "--batch 8 --branches 2 --widths 4,8 --blocks 1,1 --size 8x8",
        "roof": "--size 128",
    },
}


class NotRun(Exception):
    """A part was not run or did not come to its end; the text says why."""


class Measure:
    def __init__(self, args, card):
        self.args, self.card = args, card
        self.deadline = time.monotonic() + args.budget
        self.out = args.out
        self.prefix = re.sub(r"[^a-z0-9]+", "-", card["card"].lower()).strip("-")
        self.rows = []

    def file(self, name):
        return self.out / f"{self.prefix}-{name}"

    def run(self, part, command):
        """Runs a command of a part; its output goes to the terminal and to a log. Raises NotRun where it fails."""
        limit = min(LIMITS[part], self.deadline - time.monotonic())
        if limit < 5:
            raise NotRun("the time for everything is over")
        log = self.file(f"{part}.log")
        with log.open("a") as out:
            try:
                child = subprocess.Popen(
                    [str(word) for word in command],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise NotRun(f"{command[0]}: {error.strerror}") from None
            try:
                status = child.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                try:
                    os.killpg(child.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                child.wait()
        if status is None:
            raise NotRun(f"no end within {limit:.0f} s; see {log}")
        if status != 0:
            said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise NotRun(f"exit status {status}: {said[-1] if said else 'it said nothing'}; see {log}")

    def part(self, name):
        start = time.monotonic()
        print(f"{name} ...", flush=True)
        # What an earlier run has left is no result of this one.
        for old in (f"{name}.log", *WRITTEN.get(name, [f"{name}.json"])):
            self.file(old).unlink(missing_ok=True)
        try:
            getattr(self, name)()
            result = "done"
        except NotRun as why:
            result = str(why)
        except (KeyError, ValueError, OSError) as why:
            result = f"its result cannot be read: {why!r}"
        self.rows.append({"part": name, "result": result, "seconds": round(time.monotonic() - start, 1)})
        print(f"{name}: {result}", flush=True)

    def bench(self, name):
        """The built benchmark, the newest where there are several."""
        found = [p for p in self.args.benches.glob(f"{name}*") if re.fullmatch(rf"{name}(-[0-9a-f]{{16}})?", p.name)]
        if not found:
            raise NotRun(f"no benchmark {name} in {self.args.benches}")
        return max(found, key=lambda p: p.stat().st_mtime)

    def sized(self, name):
        return SIZES[self.args.device][name].split()

    def criterion(self, part, size, name):
        command = [self.bench(part), "--device", self.args.device, *self.sized(size)]
        # Criterion keeps its own files in a folder target/ of the working folder.
        self.run(part, [*command, "--roofs", self.out, "--out", self.file(f"{name}.json")])

    # The parts.
    def check(self):
        if self.args.device == "cpu":
            raise NotRun("the kernels need a card")
        script = ROOT / "scripts" / "gpu_check.py"
        # The sanitizers take long and are asked for by the script itself.
        flags = ["--parts", "check,verify,train", "--budget", LIMITS["check"] - 10]
        command = [sys.executable, script, self.args.mlnt, self.args.golden, *flags]
        self.run("check", [*command, "--out", self.file("check.json")])

    def step(self):
        self.criterion("step", "step", "step")
        self.criterion("step", "more steps", "step-batch")

    def kernels(self):
        self.criterion("kernels", "kernels", "kernels")

    def ops(self):
        self.criterion("ops", "ops", "ops")

    def roof(self):
        script = ROOT / "benches" / "baseline" / "torch_roof.py"
        log = self.file("roof.log")
        self.run("roof", [self.args.python, script, "--device", self.args.device, *self.sized("roof")])
        self.file("roof.json").write_text(log.read_text().splitlines()[-1] + "\n")

    def compare(self):
        self.compared("compare", "exact", "compare")

    def first(self):
        if self.deadline - time.monotonic() < LEAST:
            raise NotRun("the time for everything is nearly over: the peers were compared in the exact order alone")
        self.compared("first", "first", "compare-first")

    def compared(self, part, order, name):
        script = ROOT / "benches" / "baseline" / "compare.py"
        command = [sys.executable, script, "--device", self.args.device, *self.sized("compare")]
        command += ["--mlnt", self.args.mlnt, "--python", self.args.python, "--golden", self.args.golden]
        limit = min(LIMITS[part], self.deadline - time.monotonic())
        command += ["--orders", order, "--budget", max(limit - TO_END, 1)]
        if self.args.libtorch:
            command += ["--libtorch", self.args.libtorch]
        if self.args.programs:
            command += ["--programs", self.args.programs]
        self.run(part, [*command, "--out", self.file(f"{name}.json")])

    def profile(self):
        if self.args.device == "cpu":
            raise NotRun("the profilers need a card")
        script = ROOT / "scripts" / "gpu_profile.py"
        command = [sys.executable, script, "--kernels", self.bench("kernels"), "--mlnt", self.args.mlnt]
        self.run("profile", [*command, "--out", self.file("profile"), "--limit", LIMITS["profile"] / 2])

    def lab(self):
        if self.args.device == "cpu":
            raise NotRun("the laboratory needs a card")
        self.run("lab", [sys.executable, ROOT / "scripts" / "lab.py", "--time", "--out", self.file("lab.json")])

    def roofline(self):
        command = [sys.executable, ROOT / "scripts" / "roofline.py", "--mlnt", self.args.mlnt, "--results", self.out]
        self.run("roofline", [*command, "--name", self.prefix, "--out", self.file("roofline.md")])

    # The end.
    def read(self, name):
        """A result of this run; None where there is none."""
        try:
            return json.loads(self.file(f"{name}.json").read_text())
        except (OSError, ValueError):
            return None

    def summary(self):
        lines = [f"{self.card['card']}, driver {self.card['driver']}, {self.card['date']}", ""]
        lines += [f"{r['part']:10} {r['seconds']:7.1f} s  {r['result']}" for r in self.rows]
        check = self.read("check")
        if check:
            failed = [row["what"] for row in check["summary"] if row["result"] == "FAIL"]
            lines += ["", "check: " + ("pass" if check["pass"] else f"FAIL: {', '.join(failed)}")]
        for name in ("step", "step-batch"):
            lines += self.step_lines(self.read(name))
        lines += self.kernel_lines(self.read("kernels"), self.read("roof"))
        for name in ("compare", "compare-first"):
            lines += self.peer_lines(self.read(name))
        return lines

    def peer_lines(self, compared):
        lines = []
        for order, records in (compared or {"orders": {}})["orders"].items():
            lines += ["", f"peers, {order} order, M = {compared['shape']['branches']}: ms per step, times mlnt"]
            for label, r in records.items():
                times = f"{r['times_mlnt']:6.2f}" if "times_mlnt" in r else "     -"
                memory = f"{r['peak_device_bytes'] / 1e9:6.2f} GB" if r["peak_device_bytes"] else ""
                lines.append(f"  {label:20} {1e3 * r['device_seconds_per_step']:9.2f} {times} {memory}".rstrip())
            lines += [f"  {label:20} not run: {why}" for label, why in compared["not_run"][order].items()]
        return lines

    def step_lines(self, found):
        if not found:
            return []
        lines = ["", f"steps of {found['network']}: ms (quartiles), TFLOP/s"]
        for r in found["rows"]:
            ms = f"{1e3 * r['seconds']:9.3f} ({1e3 * r['first_quartile']:.3f}-{1e3 * r['third_quartile']:.3f})"
            lines.append(f"  {r['precision']:4} {r['name']:36} {ms:32} {r['tflop_per_second']:8.2f}")
        return lines

    def kernel_lines(self, found, library):
        """The longest launches, with the percentage of the roof that the benchmark took and of a library's."""
        if not found:
            return []
        lines = ["", "longest launches of a step: ms in all, launches, TFLOP/s, GB/s, % of the benchmark's roof, % of the library's"]
        lines += [f"  {r['precision']}: {'a library' if r['library'] else 'our own best'}, {r['best']}" for r in found["roofs"]]
        for r in found["rows"][:ROWS]:
            share = "-"
            if library and r["precision"] in library["flop_per_second"]:
                flops, rate = library["flop_per_second"][r["precision"]], library["bytes_per_second"]
                share = f"{100 * max(r['flops'] / flops, r['bytes'] / rate) / r['seconds']:.0f}"
            numbers = f"{1e3 * r['seconds'] * r['count']:9.3f} {r['count']:5} {r['tflop_per_second']:8.1f}"
            numbers += f" {r['gb_per_second']:8.0f} {r['percent_of_roof']:6.0f} {share:>6}"
            lines.append(f"  {numbers}  {r['precision']} {r['name']}")
        return lines


def card(args):
    """What the figures are of."""
    found = {"card": "trial on the cpu", "driver": "none", "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")}
    if args.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "-i", "0"]
        try:
            line = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
            found["card"], found["driver"] = (part.strip() for part in line.splitlines()[0].split(","))
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as why:
            raise SystemExit(f"gpu_measure: nvidia-smi shows no card: {why}") from None
    return found


def arguments():
    def parts(text):
        chosen = text.split(",")
        if unknown := set(chosen) - set(PARTS):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: of {','.join(PARTS)}")
        return chosen

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mlnt", type=Path, required=True, help="the program")
    parser.add_argument("--benches", type=Path, required=True, help="folder of the built benchmarks")
    parser.add_argument("--python", default=sys.executable, help="the Python that has torch and jax")
    parser.add_argument("--libtorch", type=Path, help="the libtorch baseline's program")
    parser.add_argument("--programs", help="of the comparison, as compare.py takes them")
    parser.add_argument("--golden", type=Path, default=ROOT / "golden", help="folder of golden steps")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "benches" / "results", help="folder of the results")
    usual = [part for part in PARTS if part not in ON_DEMAND]
    parser.add_argument("--parts", type=parts, help=f"[default: {','.join(usual)}]")
    parser.add_argument("--profile", action="store_true", help="also run ncu and nsys")
    parser.add_argument("--lab", action="store_true", help="also time the versions of kernels/lab")
    parser.add_argument("--budget", type=float, default=1300.0, help="seconds for everything")
    args = parser.parse_args()
    args.mlnt, args.benches = args.mlnt.absolute(), args.benches.absolute()
    args.parts = args.parts or usual
    args.parts += [part for part in ON_DEMAND if getattr(args, part) and part not in args.parts]
    return args


def main():
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    measure = Measure(args, card(args))
    for name in (part for part in PARTS if part in args.parts):
        measure.part(name)
    text = "\n".join(measure.summary())
    print(f"\n{text}")
    measure.file("summary.txt").write_text(text + "\n")
    print(f"\nwritten: {measure.file('*')}")
    return 0 if all(row["result"] == "done" for row in measure.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
