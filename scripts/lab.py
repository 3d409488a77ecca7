#!/usr/bin/env python3
"""The laboratory of convolution kernels, kernels/lab: what nvcc makes of each version, the time predicted, the time taken.

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
import math
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
from kernel_report import ARCHITECTURES, ROOT, Failure, parse_resources, run

LAB = ROOT / "kernels" / "lab"
README = LAB / "README.md"
RESULTS = ROOT / "benches" / "results"
BEGIN, END = "<!-- tables: scripts/lab.py -->", "<!-- end of tables -->"

# The card, an H200. The roof of dense f16 and the part of it that mma.sync reaches are those of docs/roofline.md; 4096
# operations a clock and multiprocessor (512 multiply-adds in each of four tensor cores) make it a clock.
MULTIPROCESSORS, PARTITIONS = 132, 4
ROOF, MMA_PART, BANDWIDTH = 790e12, 0.63, 4.8e12
MMA_FLOPS = 2 * 16 * 8 * 16
CLOCK = ROOF / (MULTIPROCESSORS * 4096)
# Clocks from a load to its use, from the L2 cache and from memory: measured by others on an H100, arXiv 2402.13499.
L2, DRAM = 263, 479

# What a warp does on a path through the code: instructions issued, wavefronts of 128 bytes through the memory pipe of
# its multiprocessor, products on tensor cores in units of an m16n8k16.
Work = namedtuple("Work", "instructions wavefronts tensor")
NOTHING = Work(0, 0, 0)


def add(a, b, times=1.0):
    return Work(*(x + times * y for x, y in zip(a, b)))


# ---- The versions ----

# Loops of a kernel, in order of their beginning in the code: how often a warp goes round in each, for a launch of `plan`;
# "taps" is the one with the tensor-core instructions of all taps of a slice, whose turns follow from those instructions.
# `waits`: clocks of loads that a block waits for one after the other. `spread`: wavefronts of a 16-bit load from global memory.
Version = namedtuple("Version", "loops waits spread", defaults=(1,))


def slices(plan):
    return math.ceil(plan["channels"] / 32)


def pieces(plan):
    return math.ceil(plan["halo"] / 32)


def steps(plan):
    return math.ceil(9 * plan["channels"] / 32)


def pipelined(plan):
    """Clocks that the steps of versions 3 to 5 last at least: what they ask for comes within a step."""
    every = slices(plan) * plan["run"]
    from_memory = (every - 1) * pieces(plan)
    weights_stay = plan["run"] > 1 and slices(plan) == 1
    return from_memory * DRAM + (0 if weights_stay else (9 * every - from_memory) * L2)


def fetching(plan):
    """The part of the steps of versions 3 to 5 in which a piece of a halo is fetched: in all slices but the last."""
    return (1 - 1 / (slices(plan) * plan["run"])) * pieces(plan) / 9


def halves(plan):
    """Of version 6: how often a thread goes for three pieces of a halo, of 64 pixels each."""
    return math.ceil(math.ceil(plan["halo"] / 64) / 3)


def filters_of(plan):
    """Of version 6: eighths of weights that a thread fetches for a slice."""
    return 9 * (64 if plan["filters"] > 32 else 32) * 4 // plan["threads"]


def again(plan):
    """Of version 6: turns of four such weights for a slice that comes later; where there is one slice they stay."""
    return filters_of(plan) // 4 if slices(plan) > 1 else 0


VERSIONS = {
    "v0_reference": Version(lambda p: [9, p["channels"] / 16, 0], lambda p: 0, 16.5),
    "v0_reference with norm": None,
    "v1_gathered": Version(lambda p: ["taps"], lambda p: steps(p) * L2),
    "v2_halo": Version(
        lambda p: [slices(p), pieces(p), "taps"], lambda p: slices(p) * (pieces(p) * DRAM + 9 * L2)
    ),
    "v3_pipelined": Version(lambda p: [pieces(p), slices(p), "taps"], lambda p: DRAM + pipelined(p)),
    "v4_norm": Version(
        lambda p: [math.ceil(pieces(p) / 4), slices(p), "taps"],
        lambda p: L2 + math.ceil(pieces(p) / 4) * DRAM + pipelined(p),
    ),
    "v5_runs": Version(
        lambda p: [math.ceil(pieces(p) / 4), p["run"], slices(p), "taps"],
        lambda p: L2 + math.ceil(pieces(p) / 4) * DRAM + pipelined(p),
    ),
    "v6_wgmma": Version(
        lambda p: [filters_of(p) % 4, filters_of(p) // 4, halves(p), p["run"], slices(p), again(p), halves(p)],
        lambda p: L2 + (1 + slices(p) * p["run"]) * halves(p) * DRAM,
    ),
    "v4_norm alone": Version(lambda p: [], lambda p: DRAM),
}


def tensor_work(version, plan):
    """Products that a warp has of one slice; of version 1: in all."""
    if version == "v1_gathered":
        return steps(plan) * 16
    return 9 * 2 * 2 * (64 if plan["filters"] > 32 else 32) // 8


# ---- Machine code ----

Instruction = namedtuple("Instruction", "at op predicate target work")
# First and last instruction of a loop.
Loop = namedtuple("Loop", "start end")


def wavefronts(op, predicate, spread):
    """Of a warp's instruction whose lanes access neighbouring memory."""
    kind, *rest = op.split(".")
    if kind == "HGMMA":
        # A warpgroup's product reads both operands from shared memory: 64 and N lines of 32 bytes, a quarter for each warp.
        return (64 + int(rest[0].split("x")[1])) * 32 / 128 / 4
    if predicate == "@!PT" or kind not in ("LDS", "LDSM", "STS", "LDG", "STG", "LDGSTS"):
        return 0
    if kind == "LDSM":
        return 4 if rest[-1] == "4" else 2 if rest[-1] == "2" else 1
    if "128" in rest:
        return 4
    if "64" in rest:
        return 2
    return spread if kind == "LDG" and "U16" in rest else 1


def parse(text, spread=1):
    """`cuobjdump -sass`: the instructions of each function."""
    functions, current = {}, None
    for line in text.splitlines():
        if found := re.match(r"\s*Function : (\S+)$", line):
            current = functions.setdefault(found[1], [])
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", line):
            op, predicate = found[3], (found[2] or "").strip()
            target = re.search(r"0x([0-9a-f]+)\s*$", found[4]) if op.startswith("BRA") else None
            tensor = 1 if kernel_report.operands(op) else 0
            if op.startswith("HGMMA."):
                m, n, k = (int(size) for size in op.split(".")[1].split("x"))
                tensor = m * n * k // (16 * 8 * 16) // 4
            work = Work(1, wavefronts(op, predicate, spread), tensor)
            current.append(Instruction(int(found[1], 16), op, predicate, int(target[1], 16) if target else None, work))
    return functions


def loops_of(code):
    """The loops, in order of their beginning."""
    ends = {}
    for i in code:
        # What jumps to itself fills the end of a function.
        if i.target is not None and i.target < i.at:
            ends[i.target] = max(ends.get(i.target, 0), i.at)
    return [Loop(start, end) for start, end in sorted(ends.items())]


def walk(code, loops, loop, turn, longest):
    """Work on the shortest or longest path through a loop, or through all of the code if `loop` is None. `turn(inner)` is
    the work of all turns of a loop within."""
    inside = [i for i in code if loop is None or loop.start <= i.at <= loop.end]
    nested = {}
    for other in loops:
        if other != loop and (loop is None or loop.start <= other.start and other.end <= loop.end):
            within = any(n.start <= other.start and other.end <= n.end for n in nested.values())
            if not within:
                nested[other.start] = other
    entered = lambda at: next((n.start for n in nested.values() if n.start <= at <= n.end), at)
    reached, last = {inside[0].at: NOTHING}, None

    def reach(at, work):
        at = entered(at)
        known = reached.get(at)
        if known is None or (work.instructions > known.instructions) == longest:
            reached[at] = work

    skip = -1
    for place, i in enumerate(inside):
        if i.at <= skip or i.at not in reached:
            continue
        so_far = reached[i.at]
        if i.at in nested:
            inner = nested[i.at]
            skip = inner.end
            after = add(so_far, turn(inner))
            exits = {j.target for j in inside if inner.start <= j.at <= inner.end and j.target and j.target > inner.end}
            follows = next((j.at for j in inside if j.at > inner.end), None)
            for at in exits | ({follows} if follows else set()):
                reach(at, after)
            continue
        work = add(so_far, i.work)
        ends = i.op.startswith("EXIT") and not i.predicate
        if (loop is None and ends) or (loop and i.at == loop.end):
            last = work
            if loop is None and not longest:
                return last
        if i.target is not None and i.target > i.at:
            reach(i.target, work)
        leaves = ends or (i.op.startswith("BRA") and not i.predicate and "DIV" not in i.op)
        if not leaves and place + 1 < len(inside):
            reach(inside[place + 1].at, work)
    if last is None:
        raise Failure("a path through a kernel was not found")
    return last


def work_of(code, version, plan, known):
    """Work of a warp of a launch, and that of a turn of the loop with the tensor-core instructions: shortest, longest."""
    loops = loops_of(code)
    turns = known.loops(plan)
    if len(turns) != len(loops):
        raise Failure(f"{plan['kernel']} has {len(loops)} loops, scripts/lab.py knows {len(turns)}")
    of_turn = None

    def turn(loop):
        nonlocal of_turn
        times = turns[loops.index(loop)]
        most = walk(code, loops, loop, turn, True)
        least = walk(code, loops, loop, turn, False) if most.tensor else most
        if most.tensor and not of_turn:
            of_turn = least, most
        if times != "taps":
            return add(NOTHING, most, times)
        if most.tensor == 0 or most.tensor != least.tensor:
            raise Failure(f"{plan['kernel']}: the loop over taps is not where scripts/lab.py looks for it")
        part = fetching(plan) if version in ("v3_pipelined", "v4_norm", "v5_runs") else 1
        middle = add(least, add(most, least, -1), part)
        return add(NOTHING, middle, tensor_work(version, plan) / most.tensor)

    return walk(code, loops, None, turn, True), of_turn


# ---- Times ----


def bytes_of(version, plan):
    """What comes from memory and goes there once."""
    rows = plan["images"] * plan["height"] * plan["width"]
    x, y = rows * plan["channels"] * 2, rows * plan["filters"] * 2
    if version == "v4_norm alone":
        return 2 * x
    return x + y + 9 * plan["channels"] * plan["filters"] * 2


def flops_of(plan):
    return 2 * 9 * plan["images"] * plan["height"] * plan["width"] * plan["channels"] * plan["filters"]


def times(version, plan, work, warps):
    """Predicted times in seconds, by what would be their reason."""
    of_block = plan["threads"] // 32
    everywhere = plan["blocks"] * of_block
    rounds = plan["blocks"] / (MULTIPROCESSORS * (warps // of_block))
    return {
        "tensor": everywhere * work.tensor * MMA_FLOPS / (ROOF * (1 if "wgmma" in version else MMA_PART)),
        "issue": everywhere * work.instructions / (MULTIPROCESSORS * PARTITIONS * CLOCK),
        "shared": everywhere * work.wavefronts / (MULTIPROCESSORS * CLOCK),
        "memory": bytes_of(version, plan) / BANDWIDTH,
        "waits": rounds * VERSIONS[version].waits(plan) / CLOCK,
    }


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
    return sorted(LAB.glob("v*.cu"))


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

Row = namedtuple("Row", "plan registers warps work turn times")


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
        known = VERSIONS[plan["version"]]
        if known is None:
            continue
        registers = resources["sm_90a", plan["kernel"]]["REG"]
        warps, _ = kernel_report.occupancy("sm_90a", plan["threads"], registers, plan["shared"])
        work, turn = work_of(code[plan["kernel"]], plan["version"], plan, known)
        rows.append(Row(plan, registers, warps, work, turn, times(plan["version"], plan, work, warps)))
    return rows, resources, wrong


def measured():
    """Medians in µs by stage and version, of an H200's newest result; empty where there is none."""
    files = sorted(RESULTS.glob("*-lab.json"), key=lambda path: path.stat().st_mtime)
    for path in reversed(files):
        found = json.loads(path.read_text())
        if "H200" in found["card"]:
            return {(r["stage"], r["version"]): r["microseconds"] for r in found["rows"]}, found["card"]
    return {}, None


def render(nvcc_version, rows, resources, found, card):
    text = lambda seconds: f"{1e6 * seconds:,.1f}" if seconds < 1e-2 else f"{1e6 * seconds:,.0f}"
    lines = [f"Made by nvcc {nvcc_version} for sm_90a.", ""]
    lines.append("| kernel | registers, sm_80 | sm_90a | local memory | instructions of a turn of its main loop | products |")
    lines.append("|---|--:|--:|--:|--:|--:|")
    turns = {row.plan["kernel"]: row.turn for row in rows}
    for arch, name in sorted(resources):
        if arch == "sm_90a" and name in turns:
            turn = turns[name]
            counts = ["–", "–"]
            if turn:
                least, most = (round(w.instructions) for w in turn)
                counts = [str(most) if least == most else f"{least} to {most}", str(round(turn[0].tensor))]
            old, new = resources.get(("sm_80", name), {"REG": "–"}), resources[arch, name]
            cells = [f"`{name}`", old["REG"], new["REG"], new["STACK"] + new["LOCAL"], *counts]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    for stage in (1, 2, 3):
        of_stage = [row for row in rows if row.plan["stage"] == stage]
        p = of_stage[0].plan
        shape = f"{p['images']} × {p['height']} × {p['width']} × {p['channels']} → {p['filters']}"
        lines += ["", f"Stage {stage}: {shape}, {flops_of(p) / 1e9:.1f} GFLOP. Times in µs."]
        lines += ["", "| version | shared memory | warps | per product: instructions | wavefronts "
                  "| tensor | issue | shared | memory | waits | **predicted** | measured |"]
        lines.append("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
        for row in of_stage:
            each = [row.work.instructions, row.work.wavefronts]
            per = [f"{v / row.work.tensor:.1f}" if row.work.tensor else "–" for v in each]
            reason = max(row.times, key=row.times.get)
            cells = [row.plan["version"], row.plan["shared"], row.warps, *per]
            cells += [text(row.times[key]) for key in ("tensor", "issue", "shared", "memory", "waits")]
            time = found.get((stage, row.plan["version"]))
            cells += [f"**{text(row.times[reason])}** ({reason})", f"{time:,.1f}" if time else "not measured"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
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


INVENTED = """
        Function : k
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA 0x0040 ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   STS.128 [R0], R4 ;
        /*0040*/                   LDSM.16.M88.4 R8, [R0] ;
        /*0050*/               @P1 BRA 0x0080 ;
        /*0060*/              @!PT LDS RZ, [RZ] ;
        /*0070*/                   LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64] ;
        /*0080*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0090*/               @P2 BRA 0x0040 ;
        /*00a0*/               @P3 EXIT ;
        /*00b0*/                   STG.E desc[UR4][R2.64], R4 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   BRA 0xd0 ;
"""


def self_test():
    code = parse(INVENTED)["k"]
    loops = loops_of(code)
    ten = lambda longest: lambda loop: add(NOTHING, walk(code, loops, loop, None, longest), 10)
    found = {
        "loops": (loops, [Loop(0x40, 0x90)]),
        "a turn": (walk(code, loops, loops[0], None, False), Work(4, 4, 1)),
        "the longest turn": (walk(code, loops, loops[0], None, True), Work(6, 8, 1)),
        "all, the short way": (walk(code, loops, None, ten(False), False), Work(2 + 40 + 3, 41, 10)),
        "all, the long way": (walk(code, loops, None, ten(True), True), Work(4 + 60 + 3, 8 + 80 + 1, 10)),
    }
    group = parse("Function : g\n /*0000*/ HGMMA.64x32x16.F32 R24, gdesc[UR16], R24 ;")["g"][0].work
    found["a warpgroup's product"] = (group, Work(1, 6, 4))
    return [f"{what}: {have}, expected {want}" for what, (have, want) in found.items() if have != want]


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
            wrong = self_test()
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
