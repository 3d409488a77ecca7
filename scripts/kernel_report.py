#!/usr/bin/env python3
"""What nvcc made of the kernels: registers, local memory, occupancy and tensor-core instructions of each.

    scripts/kernel_report.py [FOLDER]      prints the report and writes it to docs/kernels.md
    scripts/kernel_report.py --check       fails on local memory, on a low-precision kernel that does not use the tensor
                                           cores in its precision and by the instruction of its name, and when
                                           docs/kernels.md is not up to date
    scripts/kernel_report.py --self-test   plants such faults and fails unless they are found

FOLDER holds the cubins and `nvcc.txt`, as build.rs leaves them in `target/*/build/mlnt-*/out/kernels`; without it the
newest of those is read. Needs cuobjdump and nvdisasm beside nvcc or in PATH (scripts/install_nvcc.sh installs them).
"""

import argparse
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, namedtuple
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mlnt_plan import ROOT, NoPlan, plan, program

DOCUMENT = ROOT / "docs" / "kernels.md"

# Of one streaming multiprocessor: most warps and blocks, shared memory per multiprocessor and per block in KiB.
# CUDA C++ programming guide, "Technical specifications per compute capability".
Limits = namedtuple("Limits", "warps blocks shared shared_per_block")
ARCHITECTURES = {
    "sm_80": Limits(64, 32, 164, 163),
    "sm_86": Limits(48, 16, 100, 99),
    "sm_89": Limits(48, 24, 100, 99),
    "sm_90a": Limits(64, 32, 228, 227),
}
# A multiprocessor's registers lie in four partitions and are given to warps in units of 256. Each block takes 1 KiB of
# shared memory for the system; a block's share is a multiple of 128 bytes. (cuda_occupancy.h of the toolkit.)
PARTITIONS, PARTITION_REGISTERS, REGISTER_UNIT = 4, 16384, 256
SYSTEM_SHARED, SHARED_UNIT = 1024, 128

# What the end of a convolution's name promises about its operands. That of other kernels says how tensors lie in memory.
PRECISIONS, CONVOLUTIONS = {"f16", "bf16", "tf32"}, "conv2d_"
# What its beginning promises about the instruction: HGMMA, for which wgmma stands in PTX, or else HMMA.
WARPGROUPS = "conv2d_wgmma_"
# The line by which a source says that it is for one architecture alone.
ONLY_90A = "#define KERNEL_SM_90A"

Kernel = namedtuple("Kernel", "registers stack local shared local_accesses tensor instructions loops")
Fault = namedtuple("Fault", "kernel arch what")


class Failure(Exception):
    """The report cannot be made; the text says why and what to do."""


def parse_resources(text):
    """`cuobjdump --dump-resource-usage`: for each function its numbers by name."""
    functions = {}
    lines = iter(text.splitlines())
    for line in lines:
        if found := re.match(r"\s*Function (\S+):$", line):
            pairs = re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", next(lines, ""))
            functions[found[1]] = {name: int(value) for name, value in pairs}
    return functions


def operands(instruction, arguments=""):
    """The type of a tensor-core instruction's operands, None for other instructions. HFMA2.MMA is not one, nor an HGMMA on no
    descriptor and to no register, which is how ptxas waits."""
    parts = instruction.split(".")
    if parts[0] not in ("HMMA", "HGMMA") or "gdesc[URZ]" in arguments:
        return None
    return "bf16" if "BF16" in parts else "tf32" if "TF32" in parts else "f16"


def parse_sass(text):
    """`cuobjdump -sass`: for each function the number of LDL and STL, of tensor-core instructions by operand type and by name, and
    its loops over them."""
    functions, current = {}, None
    for line in text.splitlines():
        if found := re.match(r"\s*Function : (\S+)$", line):
            current = functions.setdefault(found[1], [])
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", line):
            target = re.search(r"0x([0-9a-f]+)\s*$", found[3]) if found[2].startswith("BRA") else None
            current.append((int(found[1], 16), found[2], int(target[1], 16) if target else None, operands(found[2], found[3])))
    result = {}
    for name, code in functions.items():
        local = Counter(op.split(".")[0] for _, op, _, _ in code if op.split(".")[0] in ("LDL", "STL"))
        tensor = Counter(kind for *_, kind in code if kind)
        instructions = Counter(op.split(".")[0] for _, op, _, kind in code if kind)
        result[name] = local, tensor, instructions, product_loops(code)
    return result


def product_loops(code):
    """Tensor-core and other instructions of every loop that has some of the first, and no such loop within, by address.
    `code` lists address, instruction, of a branch its target, and the type of a tensor-core instruction's operands."""
    loops = {}
    for end, _, start, _ in code:
        if start is not None and start <= end:
            body = [kind for at, _, _, kind in code if start <= at <= end]
            if count := sum(1 for kind in body if kind):
                loops[start, end] = count, len(body) - count
    inner = lambda a, b: a != b and b[0] <= a[0] and a[1] <= b[1]
    return tuple(loops[loop] for loop in sorted(loops) if not any(inner(other, loop) for other in loops))


def inspect(cubin, arch, cuobjdump):
    """The kernels of one cubin, by name."""
    resources = parse_resources(run(cuobjdump, "--dump-resource-usage", cubin))
    sass = parse_sass(run(cuobjdump, "-sass", cubin))
    if resources.keys() != sass.keys():
        raise Failure(f"{cubin}: resources of {sorted(resources)}, but instructions of {sorted(sass)}")
    kernels = {}
    for name, use in resources.items():
        local, tensor, instructions, loops = sass[name]
        # For sm_90 the figure includes the system's share, where there is shared memory at all.
        shared = max(0, use["SHARED"] - (SYSTEM_SHARED if arch == "sm_90a" else 0))
        kernels[name] = Kernel(use["REG"], use["STACK"], use["LOCAL"], shared, local.total(), tensor, instructions, loops)
    return kernels


def run(*command):
    # nvdisasm, which cuobjdump calls, lies beside it.
    path = f"{Path(command[0]).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env={**os.environ, "PATH": path})
    if done.returncode:
        raise Failure(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def round_up(value, unit):
    return -(-value // unit) * unit


def occupancy(arch, threads, registers, shared):
    """Warps that fit a multiprocessor in blocks of `threads`, and the dynamic shared memory in bytes that each block may
    have without making them fewer. `shared` is the static shared memory of a block."""
    limits = ARCHITECTURES[arch]
    warps = math.ceil(threads / 32)
    per_partition = PARTITION_REGISTERS // round_up(registers * 32, REGISTER_UNIT)
    # A block is refused as if all partitions got as many of its warps as the fullest.
    by_registers = per_partition * PARTITIONS // warps if math.ceil(warps / PARTITIONS) <= per_partition else 0
    by_shared = limits.shared * 1024 // round_up(shared + SYSTEM_SHARED, SHARED_UNIT)
    blocks = min(limits.warps // warps, limits.blocks, by_registers, by_shared)
    if blocks == 0:
        return 0, 0
    room = limits.shared * 1024 // blocks // SHARED_UNIT * SHARED_UNIT - SYSTEM_SHARED
    return blocks * warps, min(room, limits.shared_per_block * 1024) - shared


def faults(arch, kernels):
    """What is wrong with kernels of one architecture."""
    found = []
    for name, kernel in kernels.items():
        if kernel.stack or kernel.local or kernel.local_accesses:
            what = f"{kernel.stack} bytes of stack, {kernel.local} of local memory, {kernel.local_accesses} LDL and STL"
            found.append(Fault(name, arch, f"spills or keeps an array in local memory ({what})"))
        precision = name.rsplit("_", 1)[-1]
        if name.startswith(CONVOLUTIONS) and precision in PRECISIONS and not kernel.tensor[precision]:
            others = ", ".join(f"{count} {kind}" for kind, count in sorted(kernel.tensor.items())) or "none at all"
            found.append(Fault(name, arch, f"no HMMA or HGMMA with {precision} operands (found: {others})"))
        promised = "HGMMA" if name.startswith(WARPGROUPS) else "HMMA"
        if other := kernel.instructions.keys() - {promised}:
            found.append(Fault(name, arch, f"{', '.join(sorted(other))} where its name promises {promised} alone"))
    return found


def declared():
    """Threads of every kernel by name, and the module of each, from the lines that build.rs reads; and the modules that are for
    sm_90a alone."""
    threads, modules, only = {}, {}, set()
    for path in sorted((ROOT / "kernels").glob("*.cu")):
        text = path.read_text()
        for name, count in re.findall(r"^KERNEL\(\s*(\w+)\s*,\s*\w+\s*,\s*(\d+)\s*\)", text, re.MULTILINE):
            threads[name], modules[name] = int(count), path.stem
        if ONLY_90A in text.splitlines():
            only.add(path.stem)
    return threads, modules, only


def newest_build():
    """The folder of cubins that the last build left."""
    target = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
    stamps = sorted(target.glob("*/build/mlnt-*/out/kernels/nvcc.txt"), key=lambda path: path.stat().st_mtime)
    if not stamps:
        raise Failure("no build with nvcc was found: run scripts/install_nvcc.sh, then cargo build")
    made = stamps[-1].stat().st_mtime
    for path in (ROOT / "kernels").rglob("*"):
        if path.suffix in (".cu", ".cuh", ".h") and path.stat().st_mtime > made:
            raise Failure(f"{path.relative_to(ROOT)} is newer than the last build: run cargo build")
    return stamps[-1].parent


def compiler(folder):
    """Version and path of the nvcc that made the cubins, and the cuobjdump to read them with."""
    stamp = folder / "nvcc.txt"
    if not stamp.is_file():
        raise Failure(f"{stamp} is missing: this is not a folder of cubins that build.rs made")
    version, path = stamp.read_text().split("\n")[:2]
    nvcc = ROOT / path
    beside = nvcc.parent / "cuobjdump"
    cuobjdump = beside if beside.is_file() else shutil.which("cuobjdump")
    if not cuobjdump:
        raise Failure("cuobjdump was not found beside nvcc or in PATH: scripts/install_nvcc.sh installs it")
    return version, nvcc, cuobjdump


def read(folder, cuobjdump, modules, only):
    """For each architecture the kernels of all cubins. They are those that the sources declare for it, no more and no less."""
    tables = {}
    for arch in ARCHITECTURES:
        table = {}
        for module in sorted(set(modules.values()) - (only if arch != "sm_90a" else set())):
            cubin = folder / f"{module}.{arch}.cubin"
            if not cubin.is_file():
                raise Failure(f"{cubin} is missing: run cargo build")
            kernels = inspect(cubin, arch, cuobjdump)
            expected = {name for name, home in modules.items() if home == module}
            if kernels.keys() != expected:
                raise Failure(f"{cubin} holds {sorted(kernels)}, its source declares {sorted(expected)}")
            table.update(kernels)
        tables[arch] = dict(sorted(table.items()))
    return tables


def in_step(uses, tables, portable):
    """Kernels as a step uses them, with the warps that fit a multiprocessor with the shared memory that they ask for. `uses`: of
    `mlnt plan` by kernel; `portable`: for the other architectures, else for sm_90a."""
    archs = [arch for arch in tables if (arch == "sm_90a") != portable]
    lines = ["| kernel | launches | blocks | threads | shared | " + " | ".join(f"warps, {arch}" for arch in archs) + " |"]
    lines += ["|---|--:|--:|--:|--:|" + "--:|" * len(archs)]
    span = lambda ends: str(ends[0]) if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
    for name, use in sorted(uses.items()):
        cells = [f"`{name}`", use["launches"], span(use["blocks"]), use["threads"], span(use["shared"])]
        for arch in archs:
            kernel = tables[arch][name]
            ends = [occupancy(arch, use["threads"], kernel.registers, kernel.shared + shared)[0] for shared in use["shared"]]
            share = round(100 * min(ends) / ARCHITECTURES[arch].warps)
            cells.append(f"{span(sorted(set(ends)) if len(set(ends)) > 1 else ends)} ({share} %)")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines + [""]


def render(version, threads, tables, steps):
    """The text of docs/kernels.md. `steps`: how a step uses kernels, with those for sm_90a and without."""
    lines = [
        "# What nvcc made of the kernels",
        "",
        f"Written by `scripts/kernel_report.py` from the machine code that nvcc {version} made; not to be edited.",
        "",
    ]
    if not threads:
        return "\n".join(lines + ["There are no kernels.", ""])
    lines += [
        "- *warps*: those that fit a multiprocessor by registers and threads, and their part of the most it can hold.",
        "- *shared*: bytes of shared memory that a block may ask for at its launch without making the warps fewer.",
        "- *local*: bytes of stack and local memory / number of LDL and STL instructions; must be 0 / 0.",
        "- *tensor*: HMMA and HGMMA instructions in the code (not: executed), by the type of their operands.",
        "- *loops*: the ratio of those to all other instructions in each innermost loop over them, with branches that are seldom taken. A kernel",
        "  of both gradients has a loop of each, one of a tangent a loop of each kind of operand.",
        "",
    ]
    for arch, kernels in tables.items():
        lines += [f"## {arch}", ""]
        lines += ["| kernel | threads | registers | warps | shared | static shared | local | tensor | loops |"]
        lines += ["|---|--:|--:|--:|--:|--:|--:|---|--:|"]
        for name, kernel in kernels.items():
            warps, room = occupancy(arch, threads[name], kernel.registers, kernel.shared)
            share = round(100 * warps / ARCHITECTURES[arch].warps)
            tensor = ", ".join(f"{count} {kind}" for kind, count in sorted(kernel.tensor.items())) or "–"
            local = f"{kernel.stack + kernel.local} / {kernel.local_accesses}"
            loop = ", ".join(f"{products} : {others}" for products, others in kernel.loops) or "–"
            cells = [f"`{name}`", threads[name], kernel.registers, f"{warps} ({share} %)", room, kernel.shared, local, tensor]
            cells.append(loop)
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    lines += [
        "## In a step",
        "",
        "PreAct ResNet-32, k = 128, M = 10, exact, `released` recipe, f16, as `mlnt plan --json` counts it: launches of a step, blocks of a",
        "launch, bytes of shared memory that a block asks for, and the warps that then fit a multiprocessor, by registers, threads and shared memory.",
        "",
        "### sm_90a",
        "",
        *in_step(steps[0], tables, False),
        "### Every other",
        "",
        *in_step(steps[1], tables, True),
    ]
    return "\n".join(lines)


def report(folder, check):
    """Makes the report of a folder. Returns what is wrong, in words; with `check` nothing is written."""
    folder = Path(folder) if folder else newest_build()
    version, _, cuobjdump = compiler(folder)
    threads, modules, only = declared()
    tables = read(folder, cuobjdump, modules, only)
    try:
        steps = [plan(program(), *flags)["kernels"] for flags in (["--kernels", "hopper"], [])]
    except NoPlan as why:
        raise Failure(why) from why
    text = render(version, threads, tables, steps)
    if not check:
        print(text)
        DOCUMENT.write_text(text)
        return []
    wrong = [f"{f.kernel} on {f.arch}: {f.what}" for arch, kernels in tables.items() for f in faults(arch, kernels)]
    known = DOCUMENT.read_text() if DOCUMENT.is_file() else ""
    if known != text:
        made = re.search(r"nvcc ([\d.]+\d)", known)
        other = f" (it was made with nvcc {made[1]}, this build with {version})" if made and made[1] != version else ""
        wrong.append(f"docs/kernels.md is not up to date{other}: run scripts/kernel_report.py")
    return wrong


PLANTED = r"""
#include <cstdint>

struct Params {
    const uint32_t* a;
    float* d;
};

#define KERNEL(name) extern "C" __global__ void __launch_bounds__(128) name(const __grid_constant__ Params p)
#define MMA(instruction)                                                                                     \
    float d[4] = {0, 0, 0, 0};                                                                               \
    const uint32_t* a = p.a + threadIdx.x * 6;                                                               \
    asm volatile("mma.sync.aligned." instruction " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"    \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]));                        \
    p.d[threadIdx.x] = d[0] + d[1] + d[2] + d[3];

KERNEL(conv2d_good_f16) { MMA("m16n8k16.row.col.f32.f16.f16.f32") }
KERNEL(conv2d_good_bf16) { MMA("m16n8k16.row.col.f32.bf16.bf16.f32") }
KERNEL(conv2d_good_tf32) { MMA("m16n8k8.row.col.f32.tf32.tf32.f32") }
KERNEL(good_f32) { p.d[threadIdx.x] = p.a[threadIdx.x]; }
KERNEL(local_f32) {
    float list[200];
    for (int i = 0; i < 200; i++) list[i] = p.a[i];
    p.d[threadIdx.x] = list[p.a[threadIdx.x] % 200];
}
KERNEL(stored_f16) { p.d[threadIdx.x] = p.a[threadIdx.x] * 3.0f; }
KERNEL(conv2d_scalar_f16) { p.d[threadIdx.x] = p.a[threadIdx.x] * 2.0f; }
KERNEL(conv2d_other_bf16) { MMA("m16n8k16.row.col.f32.f16.f16.f32") }
KERNEL(conv2d_wgmma_slow_f16) { MMA("m16n8k16.row.col.f32.f16.f16.f32") }
"""

# For sm_90a alone.
PLANTED_90A = r"""
#define WGMMA                                                                                                        \
    float d[4] = {0, 0, 0, 0};                                                                                       \
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");                                                          \
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;"           \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(uint64_t(p.a[0])), "l"(uint64_t(p.a[1])));   \
    asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory");                  \
    p.d[threadIdx.x] = d[0] + d[1] + d[2] + d[3];

KERNEL(conv2d_wgmma_good_f16) { WGMMA }
KERNEL(conv2d_group_f16) { WGMMA }
"""


def self_test():
    """Compiles planted faults with the nvcc of the last build. Returns what was not found, or found for nothing."""
    wrong = []
    # A warp of 40 registers takes 1280 of a partition's 16384: 12 warps each, 48 in all.
    for arguments, expected in {
        ("sm_80", 256, 32, 0): (64, 19968),
        ("sm_80", 256, 40, 0): (48, 26880),
        ("sm_80", 128, 128, 0): (16, 40960),
        ("sm_86", 1024, 32, 0): (32, 101376),
        ("sm_89", 32, 16, 0): (24, 3200),
        ("sm_90a", 384, 168, 0): (12, 232448),
        ("sm_90a", 128, 32, 100 * 1024): (8, 13312),
        ("sm_80", 1024, 128, 0): (0, 0),
    }.items():
        if occupancy(*arguments) != expected:
            wrong.append(f"occupancy{arguments}: {occupancy(*arguments)}, expected {expected}")
    kernel = Kernel(128, 0, 0, 0, 0, {}, {}, ())
    use = {"launches": 3, "threads": 128, "blocks": [1, 2], "shared": [0, 100 * 1024]}
    row = in_step({"a": use}, {"sm_80": {"a": kernel}, "sm_90a": {"a": kernel}}, True)[2]
    if row != "| `a` | 3 | 1 to 2 | 128 | 0 to 102400 | 4 to 16 (6 %) |":
        wrong.append(f"a kernel in a step: {row}")
    if operands("HFMA2.MMA") or operands("HGMMA.64x64x16.F32.BF16") != "bf16":
        wrong.append("HFMA2.MMA is not a tensor-core instruction, HGMMA is")
    if operands("HGMMA.64x8x16.F16", " RZ, gdesc[URZ], RZ, !UPT, gsb0"):
        wrong.append("an HGMMA that only waits counts as a product")
    text = """Function : f
        /*0000*/ MOV R1, R2 ;
        /*0010*/ HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0020*/ FADD R1, R1, R2 ;
        /*0030*/ @P0 BRA 0x10 ;
        /*0040*/ HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0050*/ BRA 0x40 ;
        /*0060*/ BRA 0x0 ;
        /*0070*/ BRA 0x80 ;"""
    if (loops := parse_sass(text)["f"][3]) != ((1, 2), (1, 1)):
        wrong.append(f"loops over tensor-core instructions: {loops}")
    _, nvcc, cuobjdump = compiler(newest_build())
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "planted.cu"
        for arch in ARCHITECTURES:
            only = arch == "sm_90a"
            source.write_text(PLANTED + (PLANTED_90A if only else ""))
            cubin = Path(folder) / f"planted.{arch}.cubin"
            gencode = f"arch={arch.replace('sm', 'compute')},code={arch}"
            run(nvcc, "-std=c++20", "-O3", "-cubin", "-gencode", gencode, "-o", cubin, source)
            found = {fault.kernel: fault.what for fault in faults(arch, inspect(cubin, arch, cuobjdump))}
            planted = {"local_f32": "spills", "conv2d_scalar_f16": "none at all", "conv2d_other_bf16": "found: 1 f16"}
            planted["conv2d_wgmma_slow_f16"] = "HMMA where its name promises HGMMA"
            if only:
                planted["conv2d_group_f16"] = "HGMMA where its name promises HMMA"
            for name, part in planted.items():
                if part not in found.pop(name, ""):
                    wrong.append(f"{name} on {arch}: the planted fault was not found")
            wrong += [f"{name} on {arch}: found for nothing: {what}" for name, what in found.items()]
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--self-test", action="store_true")
    arguments = parser.parse_args()
    try:
        wrong = self_test() if arguments.self_test else report(arguments.folder, arguments.check)
    except Failure as failure:
        wrong = [str(failure)]
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
