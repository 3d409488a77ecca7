#!/usr/bin/env python3
"""What each kernel of a step really reads, writes and computes, beside what the plan counts, by NVIDIA's profilers.

    scripts/gpu_profile.py --kernels BENCH --mlnt MLNT --out FOLDER/NAME     BENCH: the built benchmark `kernels`
    scripts/gpu_profile.py --self-test                                       this script, on an invented profile

ncu runs one step of `BENCH --profile`, launch by launch, on cold caches. NAME-ncu.json gets, for every kind of launch, the
bytes of DRAM and the floating-point operations as measured and as counted; those more than 15 % apart are named. Of FLOPs
only what convolutions do is compared: other operations are not counted by the instruction. nsys records `mlnt bench-step`
and NAME-nsys.csv gets the time of each kernel in replayed graphs. A profiler that is not installed is left out.

Exit status: 0 when something was recorded, 1 when nothing was.
"""

import argparse
import csv
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

APART = 0.15
CHIPS = {"8.0": "ga100", "8.6": "ga102", "8.9": "ad102", "9.0": "gh100"}
BYTES = ["dram__bytes_read.sum", "dram__bytes_write.sum"]
TIME = "gpu__time_duration.sum"
# Thread instructions of f32; a fused multiply-add is two operations.
SCALAR = {f"smsp__sass_thread_inst_executed_op_{op}_pred_on.sum": n for op, n in (("fadd", 1), ("fmul", 1), ("ffma", 2))}
TENSOR = r"sm__ops_path_tensor(?:_op_hmma)?_src_(?:fp16|bf16|tf32)_dst_fp32"


class NotRun(Exception):
    """There is no profile; the text says why."""


def run(command, limit):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except OSError as error:
        raise NotRun(f"{command[0]}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise NotRun(f"{command[0]}: no end within {limit:.0f} s") from None
    if done.returncode != 0:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in said if "ERR" in line or "rror" in line] or said
        raise NotRun(f"{command[0]}: {errors[-1] if errors else f'exit status {done.returncode}'}")
    return done.stdout


def tool(name):
    """The profiler's program: in the PATH or where NVIDIA installs it."""
    places = [*Path("/opt/nvidia").glob(f"nsight-*/*/{name}"), *Path("/usr/local").glob(f"cuda*/bin/{name}")]
    places += Path("/opt/nvidia").glob(f"nsight-systems/*/bin/{name}")
    found = shutil.which(name) or next((str(path) for path in sorted(places, reverse=True)), None)
    if not found:
        raise NotRun(f"{name} is neither in the PATH nor where NVIDIA installs it")
    return found


def tensor_metrics(listing):
    """The metrics of tensor-core operations with f32 results among those that ncu lists for a chip."""
    names = {line.split()[0] for line in listing.splitlines() if line.strip()}
    plain = sorted(name for name in names if re.fullmatch(TENSOR, name))
    return [f"{n}.sum" for n in plain or sorted(n for n in names if re.fullmatch(f"{TENSOR}_sparsity_off", n))]


def parse_ncu(text):
    """The rows of ncu's raw CSV page, in order of launch: kernel name and numbers by metric."""
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        refused = [line for line in lines if "ERR" in line]
        raise NotRun(f"ncu wrote no table{': ' + refused[0] if refused else ''}")
    rows = []
    for row in csv.DictReader(io.StringIO("\n".join(lines[head:]))):
        if not row["ID"].isdigit():
            continue  # units
        numbers = {}
        for name, value in row.items():
            try:
                numbers[name] = float(value.replace(",", ""))
            except (AttributeError, ValueError):
                continue
        rows.append((int(row["ID"]), row["Kernel Name"], numbers))
    return [(name, numbers) for _, name, numbers in sorted(rows, key=lambda row: row[0])]


def measured(numbers, tensor):
    """(bytes of DRAM, floating-point operations, seconds) of one kernel; ncu gives base units."""
    flops = sum(factor * numbers.get(name, 0.0) for name, factor in SCALAR.items())
    flops += sum(numbers.get(name, 0.0) for name in tensor)
    return sum(numbers.get(name, 0.0) for name in BYTES), flops, numbers.get(TIME, 0.0) / 1e9


def beside(launches, kernels, tensor):
    """Counted and measured work of every kind of launch, the most DRAM bytes first."""
    wanted = sum(launch["kernels"] for launch in launches)
    if wanted != len(kernels):
        raise NotRun(f"ncu saw {len(kernels)} kernels, the step launched {wanted}")
    kinds, at = {}, 0
    for launch in launches:
        of_launch = [measured(numbers, tensor) for _, numbers in kernels[at : at + launch["kernels"]]]
        names = sorted({name for name, _ in kernels[at : at + launch["kernels"]]})
        at += launch["kernels"]
        row = kinds.setdefault(
            launch["what"],
            {"what": launch["what"], "op": launch["op"], "launches": 0, "kernels": names}
            | dict.fromkeys(("counted_bytes", "dram_bytes", "counted_flops", "measured_flops", "seconds"), 0),
        )
        row["launches"] += 1
        row["counted_bytes"] += launch["bytes"]
        row["counted_flops"] += launch["flops"]
        for key, i in (("dram_bytes", 0), ("measured_flops", 1), ("seconds", 2)):
            row[key] += sum(values[i] for values in of_launch)
    for row in kinds.values():
        row["bytes_ratio"] = ratio(row["dram_bytes"], row["counted_bytes"])
        convolves = row["op"].startswith("conv2d")
        row["flops_ratio"] = ratio(row["measured_flops"], row["counted_flops"]) if convolves else None
        row["apart"] = [
            what for what in ("bytes", "flops") if row[f"{what}_ratio"] and abs(row[f"{what}_ratio"] - 1.0) > APART
        ]
    return sorted(kinds.values(), key=lambda row: -row["dram_bytes"])


def ratio(have, want):
    return have / want if want else None


def ncu(args):
    program = tool("ncu")
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "-i", "0"]
    capability = run(query, 30).strip().splitlines()[0]
    chip = CHIPS.get(capability)
    tensor = tensor_metrics(run([program, "--query-metrics", "--chip", chip], 60)) if chip else []
    metrics = ",".join([*BYTES, TIME, *SCALAR, *tensor])
    with tempfile.TemporaryDirectory() as folder:
        log, expected = Path(folder) / "log.csv", Path(folder) / "expected.json"
        step = ["--network", "resnet8", "--branches", str(args.branches), "--batch", str(args.batch)]
        benchmark = [str(args.kernels), "--profile", "--device", "cuda", "--precision", args.precision, *step]
        watch = [program, "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log), "--metrics", metrics]
        run([*watch, *benchmark, "--out", str(expected)], args.limit)
        found = json.loads(expected.read_text())
        rows = beside(found["launches"], parse_ncu(log.read_text()), tensor)
    out = Path(f"{args.out}-ncu.json")
    report = {"precision": args.precision, "step": found["step"], "commit": found["commit"], "metrics": metrics}
    out.write_text(json.dumps(report | {"apart_bound": APART, "rows": rows}, indent=1) + "\n")
    print(f"{'DRAM / counted':>15} {'FLOPs / counted':>16}  launches  what")
    text = lambda value: "-" if value is None else f"{value:.2f}"
    for row in rows:
        mark = " *" if row["apart"] else ""
        cells = (text(row["bytes_ratio"]), text(row["flops_ratio"]), row["launches"], row["what"])
        print("{:>15} {:>16} {:>9}  {}".format(*cells) + mark)
    apart = sum(bool(row["apart"]) for row in rows)
    print(f"{apart} of {len(rows)} kinds of launch are more than {100 * APART:.0f} % from what is counted (*)")
    print(f"written to {out}")


def nsys(args):
    program = tool("nsys")
    with tempfile.TemporaryDirectory() as folder:
        record = [program, "profile", "--trace=cuda,nvtx", "--cuda-graph-trace=node", "-o", f"{folder}/step"]
        step = ["--device", "cuda", "--precision", args.precision, "--preset", "cifar10", "--recipe", "released"]
        size = ["--branches", str(args.branches), "--batch", str(args.batch), "--warmup", "3", "--steps", "5"]
        run([*record, str(args.mlnt), "bench-step", *step, *size], args.limit)
        stats = [program, "stats", "--report", "cuda_gpu_kern_sum", "--format", "csv", f"{folder}/step.nsys-rep"]
        table = run(stats, args.limit)
    out = Path(f"{args.out}-nsys.csv")
    out.write_text(table)
    print(f"written to {out}")


def self_test():
    """An invented profile of two launches, one of two kernels."""
    listing = (
        "sm__ops_path_tensor_src_fp16_dst_fp32  Counter  # of ops\n"
        "sm__ops_path_tensor_src_fp16_dst_fp32_sparsity_off  Counter  x\nsm__ops_path_tensor_src_int8  Counter  y\n"
    )
    tensor = tensor_metrics(listing)
    sparse = tensor_metrics("sm__ops_path_tensor_src_tf32_dst_fp32_sparsity_off  Counter  x\n")
    head = ["ID", "Kernel Name", *BYTES, TIME, *SCALAR, "sm__ops_path_tensor_src_fp16_dst_fp32.sum"]
    rows = [
        head,
        ["", "", "byte", "byte", "ns", "inst", "inst", "inst", ""],
        ["1", "sum_f32", "0", "1", "5", "0", "0", "0", "0"],
        ["0", "conv2d_fprop_f16", "1,000", "99", "10", "0", "0", "8", "1,984"],
        ["2", "relu_f32", "80", "40", "5", "10", "0", "0", "0"],
    ]
    text = "==PROF== Connected\n" + "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows)
    launches = [
        {"op": "conv2d_fprop", "what": "conv", "kernels": 2, "flops": 2000, "bytes": 1100},
        {"op": "relu", "what": "relu", "kernels": 1, "flops": 7, "bytes": 100},
    ]
    found = beside(launches, parse_ncu(text), tensor)
    try:
        beside(launches[:1], parse_ncu(text), tensor)
        refused = False
    except NotRun:
        refused = True
    checks = {
        "tensor metrics": tensor == ["sm__ops_path_tensor_src_fp16_dst_fp32.sum"] and "sparsity_off" in sparse[0],
        "rows in order of launch": [row["kernels"] for row in found] == [["conv2d_fprop_f16", "sum_f32"], ["relu_f32"]],
        "bytes": [row["bytes_ratio"] for row in found] == [1.0, 1.2],
        "FLOPs of convolutions only": [row["flops_ratio"] for row in found] == [1.0, None],
        "what is apart": [row["apart"] for row in found] == [[], ["bytes"]],
        "a kernel too many is refused": refused,
    }
    for what, holds in checks.items():
        print(f"{'pass' if holds else 'FAIL'}: {what}")
    return 0 if all(checks.values()) else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", type=Path, help="the built benchmark `kernels`")
    parser.add_argument("--mlnt", type=Path, help="the program")
    parser.add_argument("--out", type=Path, help="folder and beginning of the name of the files to write")
    parser.add_argument("--precision", default="f16")
    parser.add_argument("--branches", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--limit", type=float, default=300.0, help="most seconds for each profiler")
    parser.add_argument("--self-test", action="store_true", help="try this script on an invented profile")
    args = parser.parse_args()
    if args.self_test:
        return self_test()
    if not (args.kernels and args.mlnt and args.out):
        parser.error("--kernels, --mlnt and --out are needed")
    recorded = 0
    for profiler in (ncu, nsys):
        try:
            profiler(args)
            recorded += 1
        except NotRun as why:
            print(f"{profiler.__name__}: not run: {why}")
    return 0 if recorded else 1


if __name__ == "__main__":
    sys.exit(main())
