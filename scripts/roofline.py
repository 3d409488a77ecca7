#!/usr/bin/env python3
"""The roofline of a training step: what each kind of launch must take on an H200, beside what a card took.

    scripts/roofline.py [--mlnt MLNT]    writes docs/roofline.md; MLNT: target/debug/mlnt, or target/release/mlnt
    scripts/roofline.py --check          fails when docs/roofline.md is not up to date
    scripts/roofline.py --self-test      this script, on an invented plan and invented results

The step is counted by `mlnt plan --json --launches`. Times are those of a measurement in --results (NAME-kernels.json of the
benchmark `kernels`, NAME-profile-nsys.csv of scripts/gpu_profile.py, NAME-step.json of the benchmark `step`), the newest unless
--name says which. A kind of launch that has no time there is "not measured".
"""

import argparse
import csv
import io
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mlnt_plan import ROOT, NoPlan, plan, program

DOCUMENT = ROOT / "docs" / "roofline.md"
# Groupings that are compared, the default too: branches at a time, and behind a colon by stage.
COMPARED = ["all", "auto", "5", "5:3", "5:2", "5:2,3", "5:1", "2", "1"]
GROUPS = {"all": "All ten branches at a time", "auto": "Groups of branches, as it runs by default"}

# An H200: dense f16 with f32 sums, as DESIGN takes it, and the part of it that mma.sync is said to reach; what is not on tensor
# cores; memory. Operations per second, bytes per second.
TENSOR, MMA_PART, ORDINARY, BANDWIDTH = 790e12, 0.63, 67e12, 4.8e12
# The part that wgmma reaches, by the output channels of a tile: it reads both operands from shared memory. Both gradients from one tile are
# of 32 channels.
WGMMA_PARTS = {"32": 0.7, "64": 1.0}


def sizes(what):
    """Heights of the images in a label, largest first."""
    return sorted({int(h) for h in re.findall(r"activation\[\d+, \d+, (\d+), \d+\]", what)} - {1}, reverse=True)


def stages_of(listing):
    """The stage of each image height, counted from the largest."""
    heights = sorted({h for launch in listing for h in sizes(launch["what"])}, reverse=True)
    return {height: stage for stage, height in enumerate(heights, 1)}


def roof(launch):
    """Operations per second that a launch is held to."""
    if not launch["operation"].startswith("conv2d"):
        return ORDINARY
    tiles = [found[1] or "32" for kernel in launch["kernels"] if (found := re.search(r"wgmma(?:_joint|.*_(32|64)_)", kernel))]
    return TENSOR * (min(WGMMA_PARTS[tile] for tile in tiles) if tiles else MMA_PART)


def times(launch, tensor=None):
    """Seconds that computing and moving take at least; with `tensor`, at this rate of all convolutions."""
    rate = tensor if tensor and launch["operation"].startswith("conv2d") else roof(launch)
    return launch["flops"] / rate, launch["bytes_moved"] / BANDWIDTH


def key(launch, stages):
    """The row of a launch: operation, kernels, stage, whether it works on every branch."""
    heights = sizes(launch["what"])
    stage = "–".join(str(stages[h]) for h in heights) or "none"
    return launch["operation"], " + ".join(dict.fromkeys(launch["kernels"])), stage, "M×activation" in launch["what"]


COUNTED = ("launches", "kernels", "flops", "bytes", "compute", "memory", "least")


def gather(listing, of, measured):
    """Rows by `of(launch)`: counted work, predicted and measured time. A row is measured if all of its launches are."""
    rows = {}
    for launch in listing:
        row = rows.setdefault(of(launch), dict.fromkeys(COUNTED, 0) | {"measured": 0.0})
        compute, memory = times(launch)
        row["launches"] += 1
        row["kernels"] += len(launch["kernels"])
        row["flops"] += launch["flops"]
        row["bytes"] += launch["bytes_moved"]
        row["least"] += max(compute, memory)
        row["compute" if compute > memory else "memory"] += max(compute, memory)
        took = measured.get((launch["what"], launch["flops"], launch["bytes_moved"]))
        row["measured"] = None if took is None or row["measured"] is None else row["measured"] + took
    return rows


def cells(row):
    intensity = f"{row['flops'] / row['bytes']:,.0f}" if row["bytes"] else "–"
    binds = "tensor cores" if row["compute"] > row["memory"] else "memory"
    part = max(row["compute"], row["memory"]) / row["least"] if row["least"] else 1
    if part < 0.95:
        binds += f" ({100 * part:.0f} %)"
    took = row["measured"]
    measured = "not measured" if took is None else f"{1e3 * took:.3f} ({100 * row['least'] / took:.0f} %)"
    return [
        row["launches"], row["kernels"], f"{row['flops'] / 1e9:,.1f}", f"{row['bytes'] / 1e9:.3f}", intensity, binds,
        f"{1e3 * row['least']:.3f}", measured,
    ]


HEADS = ["launches", "kernels", "GFLOP", "GB", "FLOP/B", "roof", "predicted, ms", "measured, ms"]
ALIGN = "--:|--:|--:|--:|--:|---|--:|--:|"


def total(rows):
    every = list(rows.values())
    summed = {k: sum(row[k] for row in every) for k in every[0] if k != "measured"}
    took = None if any(row["measured"] is None for row in every) else sum(row["measured"] for row in every)
    return summed | {"measured": took}


def table(heads, align, rows, label):
    lines = [f"| {' | '.join(heads + HEADS)} |", f"|{align}{ALIGN}"]
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["least"]):
        lines.append(f"| {' | '.join(map(str, [*label(name), *cells(row)]))} |")
    sums = [f"**{cell}**" if cell != "–" else cell for cell in cells(total(rows))]
    return lines + [f"| {' | '.join(['**sum**'] + [''] * (len(heads) - 1) + sums)} |", ""]


def label_of(name):
    """Cells of a row's name, as `key` made it."""
    operation, kernels, stage, each = name
    return [f"`{operation}`", ", ".join(f"`{k}`" for k in kernels.split(" + ")), stage, "each" if each else "shared"]


def by_kernel(listing, nsys):
    """Predicted time by kernel name, beside that of replayed graphs: mean time of a launch times launches of the step. What an
    operation takes is divided among its kernels in equal parts."""
    rows = {}
    for launch in listing:
        for kernel in launch["kernels"]:
            row = rows.setdefault(kernel, [0, 0.0])
            row[0] += 1
            row[1] += max(times(launch)) / len(launch["kernels"])
    lines = ["| kernel | launches | predicted, ms | measured, ms |", "|---|--:|--:|--:|"]
    for kernel, (launches, least) in sorted(rows.items(), key=lambda item: -item[1][1]):
        took = nsys.get(kernel)
        text = "not measured" if took is None else f"{1e3 * took * launches:.3f}"
        lines.append(f"| `{kernel}` | {launches} | {1e3 * least:.3f} | {text} |")
    return lines + [""]


def by_grouping(plans):
    """What `auto` compares, for several groupings."""
    cache = plans["auto"]["cache_bytes"] / 1e6
    lines = [
        "## Groupings",
        "",
        f"Bytes to and from memory are those of a model of an L2 cache of {cache:.0f} MB (`src/plan/cache.rs`). *Compared* is the time that the",
        "default goes by: each launch the longer of its work and of those bytes, and 2 µs more (an assumption; `src/plan/machine.rs`). The default",
        "takes fewer branches at a time within a stage only where that time is less for it.",
        "",
        "| branches at a time: by stage | kernels | GB moved | GB to and from memory | partial sums, GB | arena, GB | compared, ms |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for group, plan in plans.items():
        by_stage = f": {plan['stage_groups']}" if plan["stage_groups"] else ""
        name = f"{plan['group']}{by_stage}{', the default' if group == 'auto' else ''}"
        gigabytes = [f"{plan[key] / 1e9:.2f}" for key in ("bytes_moved", "memory_bytes", "partial_bytes", "arena_bytes")]
        cells = [name, str(plan["kernel_launches"]), *gigabytes, f"{1e3 * plan['seconds_compared']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines + [""]


def render(plans, compared, results):
    """The text of the document. `plans`: the objects of `mlnt plan` by grouping; `compared`: more of them."""
    reaches = f"{100 * MMA_PART:.0f} % of {TENSOR / 1e12:.0f} TFLOP/s"
    lines = [
        "# Roofline of a step",
        "",
        "Written by `scripts/roofline.py` from `mlnt plan --launches`; not to be edited.",
        "",
        "PreAct ResNet-32, k = 128, M = 10, exact second order, `released` recipe, f16. A launch's *predicted* time is the",
        f"larger of two: its operations at {reaches} (convolutions: an H200's dense f16, and the part of it that `mma.sync`",
        f"is said to reach; kernels with `wgmma` are held to the whole, to {100 * WGMMA_PARTS['32']:.0f} % with tiles of 32 output channels) or",
        f"{ORDINARY / 1e12:.0f} TFLOP/s (all else), and its bytes, every operand once, at {BANDWIDTH / 1e12:.1f} TB/s. *Roof* is the one that binds, with its part of the row's time where the",
        "row's launches differ. The sum takes launches one after the other and nothing between them.",
        "",
        "What no row knows: partial sums of split products, which are written and read again (below, by grouping); operands that",
        "blocks of one launch read several times, and an activation that is still in the L2 cache; products of a tile beyond its result, such as a",
        "quarter of those of a 3 × 3 weight gradient of 32 output channels on `wgmma`; and that no kernel reaches its roof.",
        "Predictions of the main convolution that know its instructions: [kernels/lab](../kernels/lab/README.md).",
        "",
    ]
    measured, nsys, card, step = results
    lines += [
        "| | kernels | GFLOP | GB | predicted, ms | if all convolutions had the whole rate, ms "
        "| measured sum of launches, ms | measured step, ms |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for group, plan in plans.items():
        all_of = total(gather(plan["listing"], lambda launch: launch["operation"], measured))
        took = f"{1e3 * all_of['measured']:.2f}" if all_of["measured"] is not None else "not measured"
        whole = f"{1e3 * step:.2f}" if step and group == "auto" else "not measured"
        at_whole = sum(max(times(launch, TENSOR)) for launch in plan["listing"])
        numbers = [plan["kernel_launches"], f"{all_of['flops'] / 1e9:,.0f}", f"{all_of['bytes'] / 1e9:.1f}"]
        numbers += [f"{1e3 * all_of['least']:.2f}", f"{1e3 * at_whole:.2f}"]
        lines.append(f"| {GROUPS[group]}: {plan['group']} | {' | '.join(map(str, numbers))} | {took} | {whole} |")
    lines += ["", f"Measured on {card}." if card else "Nothing of this was measured.", ""]
    lines += by_grouping(compared)
    for group, plan in plans.items():
        listing, stages = plan["listing"], stages_of(plan["listing"])
        lines += [f"## {GROUPS[group]}", "", "### By phase", ""]
        lines += table(["phase"], "---|", gather(listing, lambda launch: launch["phase"], measured), lambda name: [name])
        lines += ["### By operation, kernel and stage", ""]
        lines += ["*Stage* goes by the height of the images; 1–2 is between two. *Branches*: whether it has activations of each.", ""]
        rows = gather(listing, lambda launch: key(launch, stages), measured)
        lines += table(["operation", "kernel", "stage", "branches"], "---|---|---|---|", rows, label_of)
    lines += ["## By kernel, in groups as by default", ""]
    lines += ["What an operation takes is divided among its kernels in equal parts; times are what `nsys` sees in replayed graphs.", ""]
    lines += by_kernel(plans["auto"]["listing"], nsys)
    return "\n".join(lines)


def read_results(folder, name):
    """Seconds of a launch by label and cost, of a kernel by name, the card, seconds of the step: what a measurement left."""
    files = sorted(folder.glob(f"{name or '*'}-kernels.json"), key=lambda path: path.stat().st_mtime)
    for path in reversed(files):
        found = json.loads(path.read_text())
        step = found.get("step", {})
        rows = [row for row in found["rows"] if row["precision"] == "f16"]
        shape = [step.get(part) for part in ("network", "branches", "batch", "recipe")]
        if rows and "H200" in found["device"] and shape == ["resnet32", 10, 128, "released"]:
            break
    else:
        return {}, {}, None, None
    launches = {(row["name"], row["flops"], row["bytes"]): row["seconds"] for row in rows}
    beside = lambda end: path.with_name(path.name.removesuffix("-kernels.json") + end)
    nsys = parse_nsys(beside("-profile-nsys.csv").read_text()) if beside("-profile-nsys.csv").is_file() else {}
    return launches, nsys, found["device"], read_step(beside("-step.json"))


def read_step(path):
    """Seconds of the step with M = 10 in f16."""
    if not path.is_file():
        return None
    rows = json.loads(path.read_text())["rows"]
    return next((r["seconds"] for r in rows if r["precision"] == "f16" and r["name"] == "released exact k=128 M=10"), None)


def parse_nsys(text):
    """Mean seconds of a launch by kernel, of nsys's report cuda_gpu_kern_sum."""
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if "Total Time (ns)" in line), None)
    if head is None:
        return {}
    rows = csv.DictReader(io.StringIO("\n".join(lines[head:])))
    return {row["Name"]: float(row["Total Time (ns)"]) / float(row["Instances"]) / 1e9 for row in rows}


def self_test():
    conv = "conv2d_fused_fprop M×activation[128, 32, 32, 32] -> M×activation[128, 64, 16, 16]"
    cost = {"flops": 497_700_000_000, "bytes_moved": 4_800}
    launch = {"phase": "A", "operation": "conv2d_fused_fprop", "what": conv, "kernels": ["conv2d_f16"]} | cost
    cost = {"flops": 67, "bytes_moved": 4_800_000_000}
    sums = {"phase": "A", "operation": "bn", "what": "bn M×activation[128, 32, 32, 32]", "kernels": ["a", "b"]} | cost
    other = launch | {"kernels": ["conv2d_wgmma_fprop_64_f16"]}
    narrow = launch | {"kernels": ["conv2d_wgmma_fprop_32_f16"]}
    joint = launch | {"kernels": ["conv2d_wgmma_joint_pair_f16"]}
    listing, stages = [launch, launch, sums], {32: 1, 16: 2}
    took = {(conv, launch["flops"], launch["bytes_moved"]): 2e-3}
    rows = gather(listing, lambda l: key(l, stages), took)
    row = rows["conv2d_fused_fprop", "conv2d_f16", "1–2", True]
    csv_text = "note\nTime (%),Total Time (ns),Instances,Name\n1,3000,2,a\n"
    near = lambda a, b: abs(a - b) < 1e-9
    compared = {"kernel_launches": 3, "bytes_moved": 2e9, "memory_bytes": 1e9, "arena_bytes": 5e8, "cache_bytes": 5e7, "partial_bytes": 3e9}
    compared |= {"group": 5, "stage_groups": "2,3", "seconds_compared": 0.012}
    checks = {
        "groupings": by_grouping({"auto": compared})[-2] == "| 5: 2,3, the default | 3 | 2.00 | 1.00 | 3.00 | 0.50 | 12.00 |",
        "stages": stages_of(listing) == stages,
        "a rate for all convolutions": near(times(launch, TENSOR)[0], 0.63e-3) and times(sums, TENSOR) == times(sums),
        "time at the roof": near(max(times(launch)), 1e-3) and near(times(other)[0], 0.63e-3) and near(times(narrow)[0], 0.9e-3) and times(joint) == times(narrow),
        "what binds": cells(row)[5] == "tensor cores" and cells(rows["bn", "a + b", "1", True])[5] == "memory",
        "sums": row["launches"] == 2 and near(row["least"], 2e-3) and near(row["measured"], 4e-3),
        "the measured, with the part of it that is needed": cells(row)[7] == "4.000 (50 %)",
        "what was not measured": rows["bn", "a + b", "1", True]["measured"] is None and total(rows)["measured"] is None,
        "nsys": near(parse_nsys(csv_text)["a"], 1.5e-6) and parse_nsys("") == {},
        "by kernel": "| `a` | 1 | 0.500 | 0.002 |" in by_kernel(listing, {"a": 1.5e-6}),
    }
    return [what for what, holds in checks.items() if not holds]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mlnt", type=Path, help="the program")
    parser.add_argument("--results", type=Path, default=ROOT / "benches" / "results", help="folder of measurements")
    parser.add_argument("--name", help="beginning of the measurement's file names")
    parser.add_argument("--out", type=Path, default=DOCUMENT, help="file to write")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--self-test", action="store_true")
    args = parser.parse_args()
    try:
        if args.self_test:
            wrong = self_test()
        else:
            mlnt = program(args.mlnt)
            compared = {group: plan(mlnt, "--kernels", "hopper", "--launches", "--group", group) for group in COMPARED}
            text = render({group: compared[group] for group in GROUPS}, compared, read_results(args.results, args.name))
            wrong = []
            if not args.check:
                args.out.write_text(text)
            elif not args.out.is_file() or args.out.read_text() != text:
                wrong = [f"{args.out} is not up to date: run scripts/roofline.py"]
    except NoPlan as failure:
        wrong = [str(failure)]
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
