"""The model of scripts/lab.py: what a warp executes on a path through the machine code of a version of kernels/lab, and
the times that follow on an H200. Described in kernels/lab/README.md."""

import math
import re
from collections import namedtuple

import kernel_report
from kernel_report import Failure

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
    """Of versions 6 and 7: how often a thread goes for three pieces of a halo, of 64 pixels each."""
    return math.ceil(math.ceil(plan["halo"] / 64) / 3)


def filters_of(plan):
    """Of versions 6 and 7: eighths of weights that a thread fetches for a slice."""
    return 9 * (64 if plan["filters"] > 32 else 32) * 4 // plan["threads"]


def again(plan):
    """Of versions 6 and 7: turns of four such weights for a slice that comes later; where there is one slice they stay."""
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
    "v7_wgmma_once": Version(
        lambda p: [math.ceil(p["halo"] / 256), filters_of(p) % 4, filters_of(p) // 4, halves(p), p["run"], slices(p), again(p), halves(p)],
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
            if op.startswith("HGMMA.") and "gdesc[URZ]" in found[4]:
                # A product of nothing, that only marks the end of a group.
                work = Work(1, 0, 0)
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
            # Of several ends the longest path's.
            last = work if last is None or work.instructions > last.instructions else last
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
