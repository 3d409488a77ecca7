#!/usr/bin/env python3
"""Checks a built mlnt on a card: needs this file, the program and the golden steps; neither cargo nor network.

    scripts/gpu_check.py target/release/mlnt                 everything, on cuda:0; some minutes
    scripts/gpu_check.py MLNT golden --device cuda:1 --out FILE.json
    scripts/gpu_check.py MLNT --device simt --per-operation 1    the same without a card, slowly, on few cases

Prints one line per check, what failed by name, and writes all figures as JSON, by default to benches/results/CARD-check.json
(with --device simt only where --out says). Exit status: 0 when all that ran passed, 1 when something failed, 2 when
nothing could be checked. What could not run is listed as "not run" and is no pass.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = ["f32", "tf32", "f16", "bf16"]
PARTS = ["check", "verify", "train", "bench", "sanitizer"]

# The longest each command may take, seconds.
LIMITS = {"info": 60, "check": 240, "verify": 60, "train": 60, "bench": 45, "sanitizer": 60}
# The same on the SIMT host machine, and for everything together.
SIMT_LIMIT = 1800
BUDGET = {"cuda": 480, "simt": 7200}

# How far the losses of a run in f32 may be from the CPU's, relative. The meta loss is a small difference of large numbers.
LOSS_TOLERANCE = {"train_loss": 1e-3, "meta_loss": 1e-2}
TRAIN = (
    "--seed 1 --train-size 160 --val-fraction 0.2 --batch 16 --epochs 1 --feature-epochs 1 --widths 4,8 --blocks 1,1 "
    "--branches 4 --neighbours 5 --lr 0.3 --recipe paper --no-baseline"
).split()
TRAINED = ["student.safetensors", "teacher.safetensors", "metrics.jsonl"]

BENCH = {
    "cuda": "--preset cifar10 --recipe released --branches 10 --steps 5 --warmup 2".split(),
    "simt": "--widths 4,4 --blocks 1,1 --batch 8 --branches 2 --image-size 8x8 --steps 1 --warmup 1".split(),
}

# Cases with branches, a few of each operation; and for memory also a whole step.
SANITIZED = ["--only", "M=", "--per-operation", "3"]
SANITIZED_STEP = ["--only", "step joint: replay", "--precision", "f16"]


class Ended:
    """A command that has ended."""

    def __init__(self, status, out, err, seconds, limit):
        self.status, self.out, self.err, self.seconds, self.limit = status, out, err, seconds, limit

    @property
    def timed_out(self):
        return self.status is None

    def objects(self):
        """The JSON objects among the lines of its output; the last line may be cut off."""
        found = []
        for line in self.out.splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                found.append(value)
        return found

    def why(self):
        """Why it failed, in one line."""
        if self.timed_out:
            return f"no end within {self.limit:.0f} s"
        said = [line for line in self.err.splitlines() if line.strip()]
        return said[-1] if said else f"exit status {self.status}"


class NotRun(Exception):
    """A check cannot be made; the text says why."""


class GpuCheck:
    def __init__(self, args, info):
        self.args, self.info = args, info
        self.kind = "simt" if args.device == "simt" else "cuda"
        self.deadline = time.monotonic() + (args.budget or BUDGET[self.kind])
        self.rows, self.figures = [], {}

    def run(self, kind, command):
        return run(command, self.limit(kind))

    def limit(self, kind):
        left = self.deadline - time.monotonic()
        if left < 1:
            raise NotRun("the time for all checks is over")
        return min(left, LIMITS[kind] if self.kind == "cuda" else SIMT_LIMIT)

    def mlnt(self, kind, *arguments):
        return self.run(kind, [str(self.args.mlnt), *arguments])

    def row(self, what, passed, worst="", seconds=0.0, faults=()):
        """Adds a line to the summary and prints it. `passed`: True, False, or None for not run."""
        result = {True: "pass", False: "FAIL", None: "not run"}[passed]
        faults = list(faults)
        self.rows.append({"what": what, "result": result, "worst": worst, "seconds": round(seconds, 2), "faults": faults})
        print(f"{what:34} {result}", flush=True)

    def part(self, name):
        if name not in self.args.parts:
            return
        start = time.monotonic()
        try:
            getattr(self, name)()
        except NotRun as why:
            self.row(name, None, faults=[str(why)], seconds=time.monotonic() - start)

    # Every operation and whole steps, and convolutions with those kernels too that the device is not given by itself.
    def check(self):
        self.figures["check"] = []
        self.check_kernels("auto", self.args.precision, self.args.only)
        halves = [precision for precision in self.args.precision if precision in ("f16", "bf16")]
        if halves and not self.args.only and (other := self.other_kernels()):
            self.check_kernels(other, halves, "conv2d")

    def other_kernels(self):
        """The kernels for which there are others on this device; None where there is one kind alone."""
        if self.kind == "simt":
            return "hopper"
        return "portable" if self.info["card"]["compute_capability"] == "9.0" else None

    def check_kernels(self, kernels, precisions, only):
        flags = ["--device", self.args.device, "--precision", ",".join(precisions), "--json", "--kernels", kernels]
        before = len(self.rows)
        if only:
            flags += ["--only", only]
        if self.args.per_operation:
            flags += ["--per-operation", str(self.args.per_operation)]
        done = self.mlnt("check", "check", *flags)
        rows = [o for o in done.objects() if "what" in o]
        verdicts = [o for o in done.objects() if "pass" in o]
        self.figures["check"] += rows
        groups = {}
        for r in rows:
            what = "steps" if r["what"].startswith("step ") else "operations"
            what += "" if kernels == "auto" else f", {kernels} kernels"
            groups.setdefault((what, r["precision"] or "any precision"), []).append(r)
        for (what, precision), of in groups.items():
            failures = [f for r in of for f in r["failures"]]
            cases, failed = (sum(r[key] for r in of) for key in ("cases", "failed"))
            # The error closest to its tolerance, or farthest beyond; JSON has no infinity, so that it is null.
            judged = [r for r in of if r["tolerance"] is not None]
            ratio = lambda r: float("inf") if r["worst"] is None else r["worst"] / (r["tolerance"] or 1e-30)
            worst = f"{failed} of {cases} cases"
            if judged:
                top = max(judged, key=ratio)
                error = "not a number" if top["worst"] is None else f"{top['worst']:.1e}"
                worst += f", error {error} of {top['tolerance']:.0e}"
            faults = [f"{f['case']}: {f['fault']}: {f['what']}" for f in failures]
            passed = failed == 0 and not failures
            self.row(f"{what}, {precision}", passed, worst, sum(r["seconds"] for r in of), faults)
        # What ended the command early, and rows that say less than its own verdict.
        if not verdicts:
            self.row("check ran to its end", False, seconds=done.seconds, faults=[done.why()])
        elif verdicts[-1]["stopped"]:
            self.row("check ran to its end", False, faults=[verdicts[-1]["stopped"]])
        elif (done.status == 0) != all(r["result"] == "pass" for r in self.rows[before:]):
            self.row("check ran to its end", False, faults=[f"exit status {done.status} does not fit its rows"])

    # Golden steps.
    def verify(self):
        files = sorted(self.args.golden.glob("*.safetensors"))
        if not files:
            raise NotRun(f"no golden steps in {self.args.golden}")
        self.figures["verify"] = []
        for precision in self.args.precision:
            what = f"golden steps, {precision}"
            flags = ["--device", self.args.device, "--precision", precision, "--json", *map(str, files)]
            done = self.mlnt("verify", "verify", *flags)
            verdicts = done.objects()
            faults, worst = [], 0.0
            for verdict in verdicts:
                verdict["file"] = Path(verdict["file"]).name
                errors = {name: group["rel_replayed"] for name, group in verdict["groups"].items()}
                top = max(errors, key=lambda name: float("inf") if errors[name] is None else errors[name])
                if errors[top] is None:
                    worst = None
                elif worst is not None:
                    worst = max(worst, errors[top])
                if not verdict["pass"]:
                    error = "not a number" if errors[top] is None else f"{errors[top]:.1e}"
                    faults.append(f"{verdict['file']}: largest error, replayed: {error} in {top}")
            self.figures["verify"] += verdicts
            if len(verdicts) < len(files):
                faults.append(f"{files[len(verdicts)].name}: {done.why()}")
            if done.status != 0 and not faults:
                faults.append(done.why())
            text = f"{len(files)} files, error " + ("not a number" if worst is None else f"{worst:.1e}")
            self.row(what, not faults, text, done.seconds, faults)

    # Short runs of training.
    def train(self):
        self.figures["train"] = []
        for precision in [p for p in ("f32", "f16") if p in self.args.precision]:
            self.train_in(precision)

    def train_in(self, precision):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            start = time.monotonic()
            runs = [("first", self.args.device), ("second", self.args.device)]
            runs += [("cpu", "cpu")] if precision == "f32" else []
            for name, device in runs:
                flags = [*TRAIN, "--device", device, "--precision", precision, "--out", str(folder / name)]
                done = self.mlnt("train", "train", *flags)
                if done.status != 0:
                    fault = f"{name} run, {device}: {done.why()}"
                    return self.row(f"training, {precision}", False, "", time.monotonic() - start, [fault])
            read = lambda run, file: (folder / run / file).read_bytes()
            differ = [file for file in TRAINED if read("first", file) != read("second", file)]
            faults = [f"{file}: two runs of one seed differ" for file in differ]
            seconds = time.monotonic() - start
            figures = {"precision": precision, "files_that_differ": differ}
            self.row(f"training twice, {precision}", not faults, f"{len(TRAINED)} files, bytes", seconds, faults)
            if precision == "f32":
                figures.update(self.losses(read("first", "metrics.jsonl"), read("cpu", "metrics.jsonl")))
            self.figures["train"].append(figures)

    def losses(self, have, want):
        """Compares the losses of two metrics files."""
        have, want = ([json.loads(line) for line in text.splitlines()] for text in (have, want))
        worst, faults = {key: 0.0 for key in LOSS_TOLERANCE}, []
        if len(have) != len(want):
            faults.append(f"{len(have)} epochs, the CPU has {len(want)}")
        for a, b in zip(have, want):
            for key, tolerance in LOSS_TOLERANCE.items():
                if b[key] is None:
                    continue
                error = float("inf") if a[key] is None else abs(a[key] - b[key]) / abs(b[key])
                worst[key] = max(worst[key], error)
                if not error <= tolerance:
                    faults.append(f"{a['phase']} epoch {a['epoch']}: {key} {a[key]}, on the CPU {b[key]}")
        text = ", ".join(f"{key.replace('_', ' ')} {error:.1e}" for key, error in worst.items())
        self.row("training, losses as on the CPU", not faults, text, 0.0, faults)
        return {"relative_error": {key: error if error < float("inf") else None for key, error in worst.items()}}

    # Time of a step, for information.
    def bench(self):
        self.figures["bench"] = []
        for precision in [p for p in ("f32", "f16") if p in self.args.precision]:
            flags = [*BENCH[self.kind], "--device", self.args.device, "--precision", precision, "--json"]
            done = self.mlnt("bench", "bench-step", *flags)
            found = done.objects()
            if done.status != 0 or not found:
                # It is for information: a slow step is no fault, one that breaks off is.
                passed = None if done.timed_out else False
                self.row(f"time of a step, {precision}", passed, "", done.seconds, [done.why()])
                continue
            times = found[-1]
            self.figures["bench"].append({"precision": precision, "step": " ".join(BENCH[self.kind]), **times})
            text = f"{1e3 * times['seconds_per_step']:.2f} ms ({times['steps']} steps, rough)"
            self.row(f"time of a step, {precision}", True, text, done.seconds)

    # NVIDIA's checkers of memory and synchronisation.
    def sanitizer(self):
        if self.kind == "simt":
            raise NotRun("compute-sanitizer needs a card")
        tool = shutil.which("compute-sanitizer")
        if not tool:
            raise NotRun("compute-sanitizer is not in the PATH; it comes with the CUDA toolkit")
        self.figures["sanitizer"] = []
        plans = [(name, SANITIZED) for name in ("memcheck", "racecheck", "initcheck", "synccheck")]
        for name, selection in [*plans, ("memcheck", SANITIZED_STEP)]:
            what = name if selection is SANITIZED else f"{name}, whole step"
            try:
                self.sanitize(tool, name, what, selection)
            except NotRun as why:
                self.row(what, None, faults=[str(why)])

    def sanitize(self, tool, name, what, selection):
        command = [tool, "--tool", name, "--print-limit", "10", str(self.args.mlnt), "check"]
        done = self.run("sanitizer", [*command, "--device", self.args.device, *selection])
        counts = sanitizer_counts(done.out + done.err)
        self.figures["sanitizer"].append({"tool": what, "status": done.status, "errors": counts})
        if counts is None:
            # It says nothing for or against the kernels when it does not come to its end.
            said = [line for line in (done.out + done.err).splitlines() if line.startswith("=========")]
            return self.row(what, None, "", done.seconds, [done.why(), *said[:3]])
        faults = [f"{counts} errors"] if counts else []
        if counts:
            said = [line for line in (done.out + done.err).splitlines() if line.startswith("=========")]
            faults += said[:12]
        if done.status != 0:
            faults.append(f"mlnt check below it: {done.why()}")
        self.row(what, not faults, f"{counts} errors", done.seconds, faults)

    def report(self):
        failed = [r for r in self.rows if r["result"] == "FAIL"]
        ran = [r for r in self.rows if r["result"] != "not run"]
        print(f"\n{'':34} {'result':8} {'seconds':>8}  worst")
        for r in self.rows:
            print(f"{r['what']:34} {r['result']:8} {r['seconds']:8.1f}  {r['worst']}")
        for r in self.rows:
            for fault in r["faults"]:
                print(f"{r['result']}: {r['what']}: {fault}")
        passed = bool(ran) and not failed
        print(f"\n{'pass' if passed else 'FAIL'}: {len(ran)} ran, {len(failed)} failed, {len(self.rows) - len(ran)} not run")
        return passed

    def write(self, passed):
        card, info = self.info["card"] or {}, self.info
        out = self.args.out
        if out is None:
            if self.kind == "simt":
                return
            name = re.sub(r"[^a-z0-9]+", "-", card["name"].lower()).strip("-")
            out = ROOT / "benches" / "results" / f"{name}-check.json"
        report = {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "device": self.args.device,
            "card": card.get("name"),
            "compute_capability": card.get("compute_capability"),
            "memory_bytes": card.get("memory_bytes"),
            "kernels": card.get("kernels"),
            "driver": info["driver"],
            "driver_cuda": info["mlnt"]["driver_cuda"],
            "nvcc": info["mlnt"]["nvcc"],
            "system": f"{platform.system()} {platform.machine()}",
            "version": info["mlnt"]["version"],
            "commit": info["commit"],
            "binary_sha256": hashlib.sha256(self.args.mlnt.read_bytes()).hexdigest(),
            "selection": {key: getattr(self.args, key) for key in ("parts", "precision", "only", "per_operation")},
            "pass": passed,
            "summary": self.rows,
            **self.figures,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        print(f"written: {out}")


def run(command, limit):
    """Runs a command; ends it and all it started after `limit` seconds."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        try:
            status = child.wait(limit)
        except BaseException as stop:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            if not isinstance(stop, subprocess.TimeoutExpired):
                raise
            status = None
        out.seek(0)
        err.seek(0)
        texts = [file.read().decode(errors="replace") for file in (out, err)]
    return Ended(status, *texts, time.monotonic() - start, limit)


def sanitizer_counts(text):
    """The errors that compute-sanitizer counted; None when it did not come to its end."""
    found = re.findall(r"ERROR SUMMARY: (\d+) errors?", text)
    found += re.findall(r"RACECHECK SUMMARY: (\d+) hazards?", text)
    return sum(map(int, found)) if found else None


def quietly(command):
    """The first line that a command prints; None when it cannot run."""
    try:
        done = run(command, 20)
    except OSError:
        return None
    return done.out.splitlines()[0].strip() if done.status == 0 and done.out.strip() else None


def information(args):
    """What program, driver and card are; ends the script when the device is not there."""
    try:
        done = run([str(args.mlnt), "info", "--json"], LIMITS["info"])
    except OSError as error:
        refuse(f"{args.mlnt}: {error.strerror}")
    found = done.objects()
    if done.status != 0 or not found:
        refuse(f"{args.mlnt} info --json: {done.why()}")
    mlnt = found[-1]
    card = driver = None
    if args.device == "simt":
        if not mlnt["simt"]:
            refuse("the program was built without the SIMT host machine")
    else:
        name = "cuda:0" if args.device == "cuda" else args.device
        card = next((c for c in mlnt["cards"] if c["device"] == name), None)
        if card is None:
            refuse(f"no device {name}: {mlnt['missing'] or 'this machine has ' + str(len(mlnt['cards'])) + ' cards'}")
        if not card["kernels"]:
            refuse(f"the program has no kernels for {card['name']}: was it built with nvcc?")
        ordinal = name.partition(":")[2]
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", ordinal]
        driver = quietly(query)
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return {"mlnt": mlnt, "card": card, "driver": driver, "commit": mlnt["commit"] or quietly(git)}


def refuse(text):
    """Nothing can be checked."""
    print(f"gpu_check: {text}", file=sys.stderr)
    raise SystemExit(2)


def names(choices):
    def parse(text):
        chosen = text.split(",")
        for name in chosen:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(choices)}")
        return chosen

    return parse


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mlnt", type=Path, help="the program")
    parser.add_argument("golden", type=Path, nargs="?", default=ROOT / "golden", help="folder of golden steps")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or simt")
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument("--parts", type=names(PARTS), default=PARTS, help=f"of {','.join(PARTS)}")
    parser.add_argument("--precision", type=names(PRECISIONS), default=PRECISIONS, help=f"of {','.join(PRECISIONS)}")
    parser.add_argument("--only", help="check only cases whose name contains this")
    parser.add_argument("--per-operation", type=int, help="check at most so many cases of each operation")
    parser.add_argument("--budget", type=float, help="seconds for everything; what is left then is not run")
    args = parser.parse_args()
    if not re.fullmatch(r"simt|cuda(:\d+)?", args.device):
        parser.error(f"--device {args.device}: it is cuda, cuda:N or simt")
    args.mlnt = args.mlnt.absolute()
    return args


def main():
    args = arguments()
    info = information(args)
    card = info["card"]
    where = f"{card['name']}, compute capability {card['compute_capability']}" if card else "SIMT host machine"
    print(f"mlnt {info['mlnt']['version']} ({info['commit'] or 'commit unknown'}) on {where}")
    print(f"driver {info['driver'] or 'unknown'}, nvcc {info['mlnt']['nvcc'] or 'none'}\n", flush=True)
    check = GpuCheck(args, info)
    for part in PARTS:
        check.part(part)
    passed = check.report()
    check.write(passed)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
