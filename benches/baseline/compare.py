#!/usr/bin/env python3
"""Times the engine and the PyTorch baseline in turn on this machine's CPU, and writes the result to benches/results/.

Every round runs each program once, one after the other (engine, authors, shared, engine, authors, …), so that a
slow spell of the machine falls on all of them. Standard library only; the baseline runs under `--python`.

    cargo build --release
    python benches/baseline/compare.py --python .venv/bin/python --rounds 5
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASELINE = Path(__file__).resolve().parent / "torch_mlnt.py"
UNSTEADY = 1.25  # rounds of one program further apart than this are not to be trusted


def cpu_model():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        brand = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        if brand.returncode == 0:
            return brand.stdout.strip()
    return platform.processor() or platform.machine()


def usable_cores():
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count()


def commit():
    """The checked-out commit, with `-dirty` where tracked files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def run(command):
    """Runs one benchmark; returns the JSON object it prints."""
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise SystemExit(f"{command[0]}: {error.strerror}")
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit status {result.returncode}\n{result.stderr.strip()}")
    try:
        return json.loads(result.stdout)
    except json.JSONDecodeError:
        raise SystemExit(f"{' '.join(command)}: printed no JSON object\n{result.stdout.strip()}")


def engine_command(args, first_order):
    command = [str(args.mlnt), "bench-step", *shape(args), "--image-size", args.size, *protocol(args, args.steps)]
    return command + (["--first-order"] if first_order else [])


def baseline_command(args, first_order, style):
    command = [args.python, str(BASELINE), *shape(args), "--size", args.size, *protocol(args, args.baseline_steps)]
    return command + ["--style", style] + (["--first-order"] if first_order else [])


def shape(args):
    names = ("widths", "blocks", "in_channels", "classes", "batch", "branches", "recipe")
    return [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]


def protocol(args, steps):
    return ["--threads", str(args.threads), "--steps", str(steps), "--warmup", str(args.warmup), "--json"]


def summary(runs):
    """One program's rounds as one record: the median of the rounds' medians, the extremes of all steps."""
    record = {
        "seconds_per_step": statistics.median(r["seconds_per_step"] for r in runs),
        "round_medians": [r["seconds_per_step"] for r in runs],
        "min": min(r["min"] for r in runs),
        "max": max(r["max"] for r in runs),
        "peak_rss_bytes": max(r["peak_rss_bytes"] for r in runs),
    }
    if all("rss_before_bytes" in r for r in runs):
        record["rss_before_bytes"] = max(r["rss_before_bytes"] for r in runs)
    return record


def compare(args, first_order):
    """Runs all rounds of one order; returns {program: record} and the version of torch."""
    commands = {"mlnt": engine_command(args, first_order)}
    commands |= {f"torch, {style}": baseline_command(args, first_order, style) for style in args.styles}
    runs = {program: [] for program in commands}
    for _ in range(args.rounds):
        for program, command in commands.items():
            runs[program].append(run(command))
    torch = next((r[0]["torch"] for program, r in runs.items() if program != "mlnt"), None)
    records = {program: summary(r) for program, r in runs.items()}
    for record in records.values():
        record["times_mlnt"] = record["seconds_per_step"] / records["mlnt"]["seconds_per_step"]
    return records, torch


def warn_where_unsteady(orders):
    for order, records in orders.items():
        for program, record in records.items():
            slowest, quickest = max(record["round_medians"]), min(record["round_medians"])
            if slowest > UNSTEADY * quickest:
                print(
                    f"warning: {program}, {order} order: rounds from {quickest:.4f} to {slowest:.4f} s; is the machine idle?",
                    file=sys.stderr,
                )


def table(orders):
    head = ("order", "program", "s/step", "spread", "x mlnt", "peak MB", "above start MB")
    rows = [head]
    for order, records in orders.items():
        for program, r in records.items():
            above = f"{(r['peak_rss_bytes'] - r['rss_before_bytes']) / 1e6:.0f}" if "rss_before_bytes" in r else "-"
            spread = f"{r['min']:.4f}-{r['max']:.4f}"
            times = f"{r['times_mlnt']:.2f}"
            peak = f"{r['peak_rss_bytes'] / 1e6:.0f}"
            rows.append((order, program, f"{r['seconds_per_step']:.4f}", spread, times, peak, above))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        cells = (c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
        print("  ".join(cells).rstrip())


def main():
    parser = argparse.ArgumentParser(description="The engine's training step beside PyTorch eager, on the CPU.")
    parser.add_argument("--mlnt", type=Path, default=ROOT / "target" / "release" / "mlnt", help="the engine's program")
    parser.add_argument("--python", default=sys.executable, help="the Python that has torch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--styles", type=lambda text: text.split(","), default=["authors", "shared"])
    parser.add_argument("--widths", default="8,16,32")
    parser.add_argument("--blocks", default="1,1,1")
    parser.add_argument("--in-channels", type=int, default=1)
    parser.add_argument("--size", default="28x28", metavar="HxW")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--branches", type=int, default=4)
    parser.add_argument("--recipe", choices=("paper", "released"), default="paper")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of the engine per round")
    parser.add_argument("--baseline-steps", type=int, default=5, help="timed steps of the baseline per round")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--name", help="result file is benches/results/cpu-NAME.json [default: CPU model, threads, recipe]")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")

    orders, torch = {}, None
    for order in ("exact", "first"):
        orders[order], torch = compare(args, order == "first")
    table(orders)
    warn_where_unsteady(orders)

    cpu = cpu_model()
    slug = re.sub(r"\((r|tm)\)|@.*|\b(cpu|processor)\b", " ", cpu.lower())
    slug = "-".join(re.findall(r"[a-z0-9]+", slug))
    name = args.name or f"{slug}-{args.threads}t-{args.recipe}"
    result = {
        "cpu": cpu,
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch,
        "mlnt_commit": commit(),
        "shape": {
            "widths": args.widths,
            "blocks": args.blocks,
            "in_channels": args.in_channels,
            "image_size": args.size,
            "classes": args.classes,
            "batch": args.batch,
            "branches": args.branches,
        },
        "recipe": args.recipe,
        "threads": args.threads,
        "rounds": args.rounds,
        "steps_per_round": {"mlnt": args.steps, "torch": args.baseline_steps},
        "orders": orders,
    }
    path = ROOT / "benches" / "results" / f"cpu-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
