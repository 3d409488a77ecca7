#!/usr/bin/env python3
"""The laboratory of convolution kernels, kernels/lab: what nvcc makes of each version, forward and backward, the time
predicted, the time taken.

    scripts/lab.py               compiles all versions and writes the tables of kernels/lab/README.md
    scripts/lab.py --check       fails when the tables are not up to date, or a version spills or does not compile
    scripts/lab.py --time        on a card: checks every version against version 0, times it, writes
                                 benches/results/CARD-lab.json (or --out FILE), and prints predicted beside measured;
                                 --build compiles and links for a card but does not run
    scripts/lab.py --self-test   this script, on invented machine code

Needs nvcc (scripts/install_nvcc.sh) and the system's C++ compiler. The model is described in the README: the largest of five
times, none of which knows of another.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import kernel_report
import lab_backward
from kernel_report import ROOT, Failure, parse_resources, run
from lab_backward import BACKWARD
from lab_model import VERSIONS, flops_of, parse, self_test, times, work_of

LAB = ROOT / "kernels" / "lab"
README = LAB / "README.md"
RESULTS = ROOT / "benches" / "results"
BEGIN, END = "<!-- tables: scripts/lab.py -->", "<!-- end of tables -->"

# ---- Compilers ----


def find_nvcc():
    places = [os.environ.get("NVCC"), *sorted((ROOT / ".nvcc").glob("lib/*/site-packages/nvidia/cu13/bin/nvcc"))]
    places += [shutil.which("nvcc"), Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"]
    for place in places:
        if place and Path(place).is_file():
            return Path(place)
    raise Failure("nvcc was not found: scripts/install_nvcc.sh installs it")


def version_of(nvcc):
    return re.search(r"V([\d.]+)", run(nvcc, "--version"))[1]


def sources():
    return sorted(LAB.glob("*.cu"))


def sources_for(arch):
    """Products of warpgroups are for sm_90a alone."""
    return [source for source in sources() if "wgmma" not in source.name or arch == "sm_90a"]


def compile_all(nvcc, folder, arch, mode, threads=2):
    """Compiles every version for an architecture, two at a time."""
    gencode = f"arch={arch.replace('sm', 'compute')},code={arch}"
    made, running = [], []
    environment = {**os.environ, "PATH": f"{nvcc.parent}{os.pathsep}{os.environ.get('PATH', '')}"}

    def settle(limit):
        while len(running) > limit:
            command, child = running.pop(0)
            out, _ = child.communicate()
            if child.returncode:
                raise Failure(f"{' '.join(command)}\n{out}")

    for source in sources_for(arch):
        out = folder / f"{source.stem}.{arch}.{'cubin' if mode == '-cubin' else 'o'}"
        command = [str(nvcc), "-std=c++20", "-O3", f"-I{ROOT / 'kernels' / 'include'}", "-lineinfo"]
        command += [mode, "-gencode", gencode, "-o", str(out), str(source)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        running.append((command, child))
        made.append(out)
        settle(threads - 1)
    settle(0)
    return made


def plans(folder):
    """How the harness divides the stages into blocks."""
    program = folder / "harness"
    include = [f"-I{ROOT / 'kernels' / part}" for part in ("include", "simt")]
    files = [*sources(), LAB / "harness.cpp", *(ROOT / "kernels" / "simt").glob("*.cpp")]
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++20", "-O0", "-DMLNT_SIMT", "-fno-strict-aliasing", "-pthread", *include]
    run(compiler, *flags, "-x", "c++", *files, "-o", program)
    return json.loads(run(program, "plan"))


# ---- Tables ----

# Of a version in a stage; `work`: of a warp, or of all warps, and `turns` of its main loop, or of the main loop of each role.
Row = namedtuple("Row", "plan registers warps work turns times")


def examine(nvcc, folder):
    """Compiles all and predicts. Returns rows by stage and version, and what is wrong."""
    cuobjdump = nvcc.parent / "cuobjdump"
    all_plans, wrong, resources, code = plans(folder), [], {}, {}
    for arch in ("sm_80", "sm_90a"):
        for cubin in compile_all(nvcc, folder, arch, "-cubin"):
            for name, use in parse_resources(run(cuobjdump, "--dump-resource-usage", cubin)).items():
                if use["STACK"] or use["LOCAL"]:
                    wrong.append(f"{name} on {arch} has {use['STACK']} bytes of stack, {use['LOCAL']} of local memory")
                resources[arch, name] = use
            if arch == "sm_90a":
                spread = 16.5 if cubin.name.startswith("v0_") else 1
                code.update(parse(run(cuobjdump, "-sass", cubin), spread))
    rows = []
    for plan in all_plans:
        version, kernel = plan["version"], plan["kernel"]
        if version in VERSIONS and VERSIONS[version] is None:
            continue
        registers = resources["sm_90a", kernel]["REG"]
        warps, _ = kernel_report.occupancy("sm_90a", plan["threads"], registers, plan["shared"])
        if version in BACKWARD:
            found = lab_backward.works_of(code[kernel], plan, BACKWARD[version](plan))
            work, turns = lab_backward.total_of(plan, found), [(one.role.name, one.turn) for one in found]
            time = lab_backward.times(version, plan, found, warps)
        else:
            work, turn = work_of(code[kernel], version, plan, VERSIONS[version])
            turns, time = [(None, turn)], times(version, plan, work, warps)
        rows.append(Row(plan, registers, warps, work, turns, time))
    return rows, resources, wrong


def measured():
    """Medians in µs by stage and version, of an H200's newest result; empty where there is none."""
    files = sorted(RESULTS.glob("*-lab.json"), key=lambda path: path.stat().st_mtime)
    for path in reversed(files):
        found = json.loads(path.read_text())
        if "H200" in found["card"]:
            return {(r["stage"], r["version"]): r["microseconds"] for r in found["rows"]}, found["card"]
    return {}, None


def text_of(seconds):
    return f"{1e6 * seconds:,.1f}" if seconds < 1e-2 else f"{1e6 * seconds:,.0f}"


def render_kernels(rows, resources):
    lines = ["| kernel | registers, sm_80 | sm_90a | local memory | instructions of a turn of its main loop | products |"]
    lines.append("|---|--:|--:|--:|--:|--:|")
    of_kernel = {row.plan["kernel"]: row.turns for row in rows}
    for arch, name in sorted(resources):
        if arch != "sm_90a" or name not in of_kernel:
            continue
        old, new = resources.get(("sm_80", name), {"REG": "–"}), resources[arch, name]
        for role, turn in of_kernel[name]:
            counts = ["–", "–"]
            if turn:
                least, most = (round(w.instructions) for w in turn)
                counts = [str(most) if least == most else f"{least} to {most}", str(round(turn[0].tensor))]
            of_role = f"`{name}`, {role}" if role else f"`{name}`"
            cells = [of_role, old["REG"], new["REG"], new["STACK"] + new["LOCAL"], *counts]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def render_rows(rows, found):
    lines = ["", "| version | shared memory | warps | per product: instructions | wavefronts "
             "| tensor | issue | shared | memory | waits | **predicted** | measured |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        each = [row.work.instructions, row.work.wavefronts]
        per = [f"{v / row.work.tensor:.1f}" if row.work.tensor else "–" for v in each]
        reason = max(row.times, key=row.times.get)
        cells = [row.plan["version"], row.plan["shared"], row.warps, *per]
        cells += [text_of(row.times[key]) for key in ("tensor", "issue", "shared", "memory", "waits")]
        time = found.get((row.plan["stage"], row.plan["version"]))
        cells += [f"**{text_of(row.times[reason])}** ({reason})", f"{time:,.1f}" if time else "not measured"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def render(nvcc_version, rows, resources, found, card):
    lines = [f"Made by nvcc {nvcc_version} for sm_90a.", ""]
    forward = [row for row in rows if row.plan["version"] in VERSIONS]
    backward = [row for row in rows if row.plan["version"] in BACKWARD]
    lines += render_kernels(forward, resources)
    for stage in (1, 2, 3):
        of_stage = [row for row in forward if row.plan["stage"] == stage]
        p = of_stage[0].plan
        shape = f"{p['images']} × {p['height']} × {p['width']} × {p['channels']} → {p['filters']}"
        lines += ["", f"Stage {stage}: {shape}, {flops_of(p) / 1e9:.1f} GFLOP. Times in µs."]
        lines += render_rows(of_stage, found)
    lines += ["", "The backward:", "", *render_kernels(backward, resources)]
    for stage in (1, 2, 3):
        of_stage = [row for row in backward if row.plan["stage"] == stage]
        p = of_stage[0].plan
        shape = f"{p['branches']} × {p['images']} × {p['height']} × {p['width']} × {p['channels']} ← {p['filters']}"
        flops = lab_backward.flops_of(p)
        lines += ["", f"Stage {stage}, backward: {shape}, {flops / 1e9:.1f} GFLOP. Times in µs.", *render_rows(of_stage, found)]
    if card:
        lines += ["", f"Measured on {card}."]
    return "\n".join(lines)


def tables(check):
    nvcc = find_nvcc()
    with tempfile.TemporaryDirectory() as folder:
        rows, resources, wrong = examine(nvcc, Path(folder))
    table = render(version_of(nvcc), rows, resources, *measured())
    text = README.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise Failure(f"{README} lacks the lines between which the tables stand")
    before, rest = text.split(BEGIN)
    new = f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}"
    if not check:
        README.write_text(new)
        print(table)
    elif new != text:
        wrong.append("kernels/lab/README.md is not up to date: run scripts/lab.py")
    return wrong


def build_for_card(nvcc, folder, arch):
    objects = compile_all(nvcc, folder, arch, "-c")
    gencode = ["-gencode", f"arch={arch.replace('sm', 'compute')},code={arch}"]
    include = f"-I{ROOT / 'kernels' / 'include'}"
    harness, program = folder / "harness.o", folder / "harness"
    without = [] if arch == "sm_90a" else ["-DLAB_NO_WGMMA"]
    run(nvcc, "-std=c++20", "-O3", include, *gencode, *without, "-c", "-x", "cu", "-o", harness, LAB / "harness.cpp")
    run(nvcc, *gencode, f"-L{nvcc.parent.parent / 'lib'}", "-o", program, harness, *objects)
    return program


def take_times(only_build, out):
    nvcc = find_nvcc()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if only_build:
            print(f"built and linked, not run: {build_for_card(nvcc, folder, 'sm_90a').name}")
            return []
        capability = run("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "-i", "0").strip()
        arch = f"sm_{capability.replace('.', '')}" + ("a" if capability == "9.0" else "")
        program = build_for_card(nvcc, folder, arch)
        print(run(program, "check", 1))
        found = json.loads(run(program, "time"))
        rows, resources, wrong = examine(nvcc, folder)
    driver = run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0").strip()
    predicted = {(r.plan["stage"], r.plan["version"]): r.times for r in rows}
    for row in found["rows"]:
        forecast = predicted.get((row["stage"], row["version"]))
        if forecast:
            row["predicted_microseconds"] = 1e6 * max(forecast.values())
            row["predicted_reason"] = max(forecast, key=forecast.get)
    found |= {"driver": driver, "nvcc": version_of(nvcc), "arch": arch}
    name = re.sub(r"[^a-z0-9]+", "-", found["card"].lower()).strip("-")
    out = out or RESULTS / f"{name}-lab.json"
    out.write_text(json.dumps(found, indent=1) + "\n")
    times_found = {(r["stage"], r["version"]): r["microseconds"] for r in found["rows"]}
    print(render(version_of(nvcc), rows, resources, times_found, found["card"]))
    print(f"\nwritten to {out}; scripts/lab.py puts it into {README}")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--build", action="store_true", help="with --time: build only")
    parser.add_argument("--out", type=Path, help="with --time: the file to write")
    parser.add_argument("--self-test", action="store_true")
    arguments = parser.parse_args()
    try:
        if arguments.self_test:
            wrong = self_test() + lab_backward.self_test()
        elif arguments.time:
            wrong = take_times(arguments.build, arguments.out)
        else:
            wrong = tables(arguments.check)
    except Failure as failure:
        wrong = [str(failure)]
    except OSError as error:
        wrong = [f"{error.filename}: {error.strerror}"]
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
