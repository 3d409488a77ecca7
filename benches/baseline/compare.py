#!/usr/bin/env python3
"""Times the engine and its peers in turn on one machine, CPU or card, and writes a table and JSON.

    cargo build --release
    python benches/baseline/compare.py --python .venv/bin/python                     on the CPU
    python benches/baseline/compare.py --python .venv/bin/python --device cuda       on the first card
    python benches/baseline/compare.py --self-test                                   this script, with stand-ins

Every program is first checked against the golden steps and left out where it differs. Then every round runs each of them
once, one after the other, so that a slow spell of the machine falls on all. What is not installed, or fails, is listed
with the reason. Standard library only; the peers run under --python.
"""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common.bounds import BOUNDS
from common.turns import Engine, Served, take_turns

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
UNSTEADY = 1.25  # rounds of one program further apart than this are not to be trusted

# What a peer's name stands for.
PEERS = {
    "eager": ["torch_eager.py", "--style", "authors"],
    "eager-shared": ["torch_eager.py", "--style", "shared"],
    "graph": ["torch_graph.py"],
    "compile": ["torch_compile.py"],
    "libtorch": ["libtorch_cpp.py"],
    "jax": ["jax_jit.py", "--style", "scan"],
    "jax-vmap": ["jax_jit.py", "--style", "vmap"],
}
# What is compared by default: the engine and every peer, each in a precision that fits the device. A peer that is not
# installed, or cannot do it there, is listed with its reason.
ENGINE = {"cpu": ["mlnt:f32"], "cuda": ["mlnt:f16", "mlnt:tf32"]}
IN_PRECISION = {"cpu": {}, "cuda": {"eager": "tf32", "eager-shared": "tf32", "libtorch": "tf32"}}
OTHERS = {"cpu": "f32", "cuda": "f16"}
PROGRAMS = {
    device: [*ENGINE[device], *(f"{name}:{IN_PRECISION[device].get(name, OTHERS[device])}" for name in PEERS)]
    for device in ENGINE
}
# Version of the result's fields: a file of another one is not read as if it were of this.
SCHEMA = 2
ORDER_OF_TURNS = "as listed in the 1st, 3rd, … round, backwards in the 2nd, 4th, …"
# The network of the comparison: on the CPU a small one, on a card PreAct ResNet-32 with CIFAR's images.
SHAPES = {
    "cpu": {"widths": "8,16,32", "blocks": "1,1,1", "in_channels": 1, "size": "28x28", "branches": 4},
    "cuda": {"widths": "32,64,128", "blocks": "5,5,5", "in_channels": 3, "size": "32x32", "branches": 10},
}


def quietly(command):
    """The first line that a command prints; None when it cannot run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = result.stdout.strip().splitlines()
    return lines[0].strip() if result.returncode == 0 and lines else None


def cpu_model():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    brand = quietly(["sysctl", "-n", "machdep.cpu.brand_string"]) if sys.platform == "darwin" else None
    return brand or platform.processor() or platform.machine()


def usable_cores():
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count()


def machine(args):
    """What the times were taken on."""
    info = json.loads(quietly([str(args.mlnt), "info", "--json"]) or "{}")
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    card = {}
    if args.device == "cuda":
        query = "name,driver_version,memory.total,clocks.max.sm"
        line = quietly(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"])
        names = ("card", "driver", "memory", "most_clock")
        card = dict(zip(names, (part.strip() for part in line.split(",")))) if line else {"card": "unknown card"}
    return card | {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "mlnt": {key: info.get(key) for key in ("version", "nvcc", "driver_cuda")},
        "mlnt_commit": info.get("commit") or quietly(git) or "unknown",
    }


def shape(args, size_flag):
    names = ("widths", "blocks", "in_channels", "classes", "batch", "branches", "recipe")
    flags = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    return [*flags, size_flag, args.size]


def program(args, label, first_order):
    """The program that a label, NAME:PRECISION, stands for."""
    name, precision = label.split(":")
    steps = args.steps if name == "mlnt" else args.peer_steps
    where = ["--device", args.device, "--precision", precision, "--threads", str(args.threads)]
    protocol = ["--steps", str(steps), "--warmup", str(args.warmup), *(["--first-order"] if first_order else [])]
    if name == "mlnt":
        golden = sorted(str(path) for path in args.golden.glob("*.safetensors"))
        verify = [str(args.mlnt), "verify", *where[:4], "--json", *golden]
        bench = [str(args.mlnt), "bench-step", *shape(args, "--image-size"), *where, *protocol, "--json"]
        return Engine(verify, bench, args.limit)
    script, *flags = PEERS[name]
    if name == "libtorch" and args.libtorch:
        flags = [*flags, "--binary", str(args.libtorch)]
    command = [args.python, str(HERE / script), *flags, *shape(args, "--size"), *where, *protocol]
    return Served([*command, "--golden", str(args.golden), "--serve"], args.limit)


def summary(about, rounds):
    """One program's rounds as one record: the median of the rounds' medians, the extremes of all steps."""

    def most(key):
        found = [r[key] for r in rounds if r.get(key) is not None]
        return max(found) if found else None

    record = {key: about[key] for key in ("versions", "check", "check_seconds", "start_seconds") if key in about}
    notes = sorted({note for r in rounds for note in r.get("notes", [])})
    return record | {
        "seconds_per_step": statistics.median(r["seconds_per_step"] for r in rounds),
        "min": min(r["min"] for r in rounds),
        "max": max(r["max"] for r in rounds),
        "device_seconds_per_step": statistics.median(r["device_seconds_per_step"] for r in rounds),
        "device_min": min(r["device_min"] for r in rounds),
        "device_max": max(r["device_max"] for r in rounds),
        # Of the engine: all of them, or it would have been left out; and attempts that overflowed, which have no time.
        "taken": sum(r["taken"] for r in rounds) if all("taken" in r for r in rounds) else None,
        "overflows": sum(r["overflows"] for r in rounds) if all("overflows" in r for r in rounds) else None,
        "round_medians": [r["device_seconds_per_step"] for r in rounds],
        "peak_rss_bytes": most("peak_rss_bytes"),
        "rss_before_bytes": most("rss_before_bytes"),
        "peak_device_bytes": most("peak_device_bytes"),
        "notes": notes,
    }


def compare(programs, rounds, budget=float("inf")):
    """All rounds of one order: ({label: record}, {label: why not})."""
    done, left_out = take_turns(programs, rounds, lambda text: print(text, flush=True), budget)
    records = {label: summary(about, found) for label, (about, found) in done.items()}
    engine = next((r for label, r in records.items() if label.startswith("mlnt:")), None)
    for record in records.values() if engine else ():
        record["times_mlnt"] = record["device_seconds_per_step"] / engine["device_seconds_per_step"]
    return records, left_out


def warn_where_unsteady(orders):
    for order, records in orders.items():
        for label, record in records.items():
            slowest, quickest = max(record["round_medians"]), min(record["round_medians"])
            if slowest > UNSTEADY * quickest:
                spread = f"rounds from {1e3 * quickest:.2f} to {1e3 * slowest:.2f} ms"
                print(f"warning: {label}, {order} order: {spread}; is the machine idle?", file=sys.stderr)


def table(orders, left_out):
    head = ("order", "program", "ms/step", "spread", "with copies", "x mlnt", "peak MB", "on card MB")
    rows = [head]
    for order, records in orders.items():
        for label, r in records.items():
            spread = f"{1e3 * r['device_min']:.2f}-{1e3 * r['device_max']:.2f}"
            times = f"{r['times_mlnt']:.2f}" if "times_mlnt" in r else "-"
            memory = [f"{r[k] / 1e6:.0f}" if r[k] else "-" for k in ("peak_rss_bytes", "peak_device_bytes")]
            step = f"{1e3 * r['device_seconds_per_step']:.2f}"
            rows.append((order, label, step, spread, f"{1e3 * r['seconds_per_step']:.2f}", times, *memory))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row in rows:
        cells = (c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
        lines.append("  ".join(cells).rstrip())
    for order, why in left_out.items():
        lines += [f"{order}  {label}: not run: {text}" for label, text in why.items()]
    for order, records in orders.items():
        lines += [f"{order}  {label}: {note}" for label, r in records.items() for note in r["notes"]]
    return "\n".join(lines)


def slug(text):
    text = re.sub(r"\((r|tm)\)|@.*|\b(cpu|processor)\b", " ", text.lower())
    return "-".join(re.findall(r"[a-z0-9]+", text))


def result_path(args, found):
    if args.out:
        return args.out
    if args.device == "cuda":
        name = f"{slug(found['card'])}-compare-{args.recipe}"
    else:
        name = f"cpu-{slug(found['cpu'])}-{args.threads}t-{args.recipe}"
    return ROOT / "benches" / "results" / f"{name}.json"


def read_result(path):
    """A result that this script wrote; ValueError for one of other fields, which could be read wrongly."""
    found = json.loads(path.read_text())
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: a result of schema {schema}, not {SCHEMA}: measure again")
    return found


def show(path):
    """Prints the table of a result; the exit status."""
    try:
        found = read_result(path)
    except (OSError, ValueError) as why:
        print(f"compare: {why}", file=sys.stderr)
        return 1
    print(f"{found.get('card') or found['cpu']}, mlnt {found['mlnt_commit']}, {found['date']}")
    print(table(found["orders"], found["not_run"]))
    return 0


def arguments():
    def labels(text):
        for label in text.split(","):
            name, colon, precision = label.partition(":")
            if name not in PEERS and name != "mlnt" or not colon or not precision:
                raise argparse.ArgumentTypeError(f"{label!r}: NAME:PRECISION with one of mlnt, {', '.join(PEERS)}")
        return text.split(",")

    def orders(text):
        if not set(text.split(",")) <= {"exact", "first"}:
            raise argparse.ArgumentTypeError("of exact,first")
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mlnt", type=Path, default=ROOT / "target" / "release" / "mlnt", help="the engine's program")
    parser.add_argument("--python", default=sys.executable, help="the Python that has torch and jax")
    parser.add_argument("--libtorch", type=Path, help="the libtorch baseline's program [default: as it builds it]")
    parser.add_argument("--golden", type=Path, default=ROOT / "golden", help="folder of golden steps")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--programs", type=labels, metavar="NAME:PRECISION,…", help=f"[default: {'; '.join(','.join(p) for p in PROGRAMS.values())} by device]")
    parser.add_argument("--orders", type=orders, default=["exact", "first"], help="of exact,first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=900.0, help="most seconds for a start or a round of a program")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for everything; then fewer rounds")
    for name in ("widths", "blocks", "size"):
        parser.add_argument(f"--{name}", help=f"[default: {', '.join(s[name] for s in SHAPES.values())} by device]")
    for name in ("in-channels", "branches"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--recipe", choices=("paper", "released"), default="paper")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--steps", type=int, default=10, help="timed steps of the engine per round")
    parser.add_argument("--peer-steps", type=int, default=5, help="timed steps of a peer per round")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--out", type=Path, help="the JSON file [default: in benches/results/, named by card or CPU]")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing, print the table of a result")
    parser.add_argument("--self-test", action="store_true", help="try this script with stand-ins for all programs")
    args = parser.parse_args()
    for name, value in SHAPES[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.programs = args.programs or PROGRAMS[args.device]
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    return args


def main():
    args = arguments()
    if args.self_test:
        return self_test()
    if args.show:
        return show(args.show)
    found = machine(args)
    print(f"{found.get('card') or found['cpu']}, mlnt {found['mlnt_commit']}", flush=True)
    orders, left_out = {}, {}
    for order in args.orders:
        programs = {label: program(args, label, order == "first") for label in args.programs}
        orders[order], left_out[order] = compare(programs, args.rounds, args.budget / len(args.orders))
    print(table(orders, left_out))
    warn_where_unsteady(orders)
    names = ("widths", "blocks", "in_channels", "size", "classes", "batch", "branches")
    result = found | {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": args.device,
        "shape": {name: getattr(args, name) for name in names},
        "recipe": args.recipe,
        "threads": args.threads,
        "rounds": args.rounds,
        "order_of_turns": ORDER_OF_TURNS,
        "steps_per_round": {"mlnt": args.steps, "peers": args.peer_steps},
        "orders": orders,
        "not_run": left_out,
    }
    path = result_path(args, found)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path}")
    return 0 if any(orders.values()) else 1


# A program of the protocol that does as its name says, and notes when it was asked for a round.
STAND_IN = """
import json, sys, time
name, log = sys.argv[1:3]
def tell(value):
    print("a library says hello")
    print(json.dumps(value), flush=True)
if name == "refused":
    sys.exit("step.safetensors in f64: meta_grad is off by 2.0e+00")
if name == "silent":
    time.sleep(600)
times = {key: 0.002 for key in ("seconds_per_step", "min", "max", "device_min", "device_max")}
times["device_seconds_per_step"] = {"verify": 0.001, "bench": 0.001}.get(name, 0.003)
if name in ("verify", "bench", "overflowed", "old"):
    open(log, "a").write(name + " ")
    tell(times | {"steps": 4, "overflows": 1, "taken": {"overflowed": 3, "old": True}.get(name, 4)})
    sys.exit()
tell({"check": []})
for count, _ in enumerate(sys.stdin):
    open(log, "a").write(name + " ")
    if name == "short" and count == 1:
        sys.exit("out of memory")
    tell(times | {"notes": ["a note"]})
"""


def self_test():
    """Compares stand-ins: programs that are right, refused, silent, or die in their second round."""
    with tempfile.TemporaryDirectory() as folder:
        script, log = Path(folder) / "stand_in.py", Path(folder) / "log"
        script.write_text(STAND_IN)

        def command(name):
            return [sys.executable, str(script), name, str(log)]

        programs = {"mlnt:f32": Engine(command("verify"), command("bench"), 60.0)}
        programs |= {name: Served(command(name), 60.0) for name in ("right", "refused", "short")}
        programs["silent"] = Served(command("silent"), 1.0)
        programs["missing"] = Served([f"{folder}/nothing", "x"], 1.0)
        records, left_out = compare(programs, 3)
        turns = log.read_text().split()
        untaken = {f"mlnt:{name}": Engine(command("verify"), command(name), 60.0) for name in ("overflowed", "old")}
        untaken_records, untaken_why = compare(untaken, 1)
        result = Path(folder) / "result.json"

        def refused(fields):
            result.write_text(json.dumps(fields))
            try:
                read_result(result)
            except ValueError:
                return True
            return False

        schemas = [refused({"orders": {}}), refused({"schema": SCHEMA - 1}), refused([]), not refused({"schema": SCHEMA})]
    expected = ["verify", "bench", "right", "short", "short", "right", "bench", "bench", "right"]
    readme = (HERE / "README.md").read_text()
    bounds = {row[1]: float(row[2]) for row in re.finditer(r"^\| (\w+) \| ([\d.e-]+) \|", readme, re.M)}
    reasons = {
        "refused": "meta_grad is off by",
        "short": "out of memory",
        "silent": "no answer within 1 s",
        "missing": "No such file",
    }
    text = table({"exact": records}, {"exact": left_out})
    checks = {
        "programs take turns, forwards and backwards": turns == expected,
        "those that are right are timed": list(records) == ["mlnt:f32", "right"],
        "the others are left out with the reason": all(why in left_out[name] for name, why in reasons.items()),
        "every peer is a default": all({p.split(":")[0] for p in ps} == {"mlnt", *PEERS} for ps in PROGRAMS.values()),
        "steps that were not taken are no result": not untaken_records and all("taken" in w for w in untaken_why.values()),
        "steps taken are counted": (records["mlnt:f32"]["taken"], records["mlnt:f32"]["overflows"]) == (12, 3),
        "results of other fields are refused": all(schemas),
        "the README's bounds are the check's": bounds == BOUNDS,
        "ratio": abs(records["right"]["times_mlnt"] - 3.0) < 1e-12,
        "rounds are counted": len(records["right"]["round_medians"]) == 3,
        "the table says all": all(name in text for name in (*programs, "a note")),
    }
    for what, holds in checks.items():
        print(f"{'pass' if holds else 'FAIL'}: {what}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
