"""The model of scripts/lab.py for the backward's versions: `lab_model.py` says what it is, kernels/lab/README.md
describes it. A launch has up to two roles, each with loops of its own in the machine code of one kernel."""

import math
from collections import namedtuple

from kernel_report import Failure
from lab_model import BANDWIDTH, CLOCK, DRAM, L2, MMA_FLOPS, MMA_PART, MULTIPROCESSORS, NOTHING, PARTITIONS, ROOF
from lab_model import Work, add, loops_of, parse, walk

# A role of a launch of `plan`: its blocks; how often a warp goes round in each of its loops, in order of their
# beginning in the code, or (turns, part): part of what a turn does only at times is done; the products of a warp;
# clocks of loads that a block waits for one after the other.
Role = namedtuple("Role", "name blocks loops products waits")
# Work of a warp of a role, and of a turn of its innermost loop of products: shortest, longest.
Found = namedtuple("Found", "role work turn")


def ceil(a, b):
    return math.ceil(a / b)


def slices(channels):
    return ceil(channels, 32)


def b0_reference(p):
    pixels = p["height"] * p["width"]
    return [
        Role("dgrad", p["dgrad_blocks"], [9, p["filters"] / 4], 0, 0),
        # A thread's turns are one after the other.
        Role("wgrad", p["wgrad_blocks"], [p["images"], p["height"], p["width"]], 0, p["images"] * pixels * L2),
    ]


def b1_roles(p):
    of_k, pieces, width = slices(p["filters"]), ceil(p["halo"], 32), 64 if max(p["filters"], p["channels"]) > 32 else 32
    # Pieces of a halo are fetched in all slices but the last, weights two steps ahead.
    part = (1 - 1 / of_k) * pieces / 9
    first = L2 + ceil(pieces, 4) * DRAM
    n = p["patches"] / p["splits"]
    # Of eight steps some fetch a piece of h, four one of δ.
    both = (min(pieces, 8) + 4) / 16 * (1 - 1 / n)
    return [
        Role(
            "dgrad", p["dgrad_blocks"], [1, ceil(pieces, 4), of_k, (9, part)], of_k * 9 * width // 2,
            first + (of_k - 1) * pieces * DRAM + (9 * of_k - (of_k - 1) * pieces) * L2 / 2,
        ),
        Role(
            "wgrad", p["wgrad_blocks"], [1, 1, ceil(pieces, 4), n, (8, both), max(0, pieces - 8), 1], n * 144,
            first + DRAM + (n - 1) * pieces * DRAM,
        ),
    ]


def b2_wgmma_roles(p):
    width = 64 if max(p["filters"], p["channels"]) > 32 else 32
    of_k, halo = slices(p["filters"]), ceil(p["halo"], 64)
    weights, places, product = 9 * 32 / (256 / (width // 8)), ceil(p["halo"], 256), width // 8
    runs = p["dgrad_blocks"] / (p["branches"] * ceil(p["channels"], width))
    run, n = p["patches"] / runs, p["patches"] / p["splits"]
    deltas, inputs, own = ceil(halo, 2), ceil(halo, 3), width // 8 // 2
    later, again = 1 - 1 / (run * of_k), 1 - 1 / n
    return [
        Role(
            "dgrad", p["dgrad_blocks"],
            [1, places, weights, deltas, run, of_k, weights * later if of_k > 1 else 0, deltas * later],
            run * of_k * 36 * product, L2 + run * of_k * deltas * DRAM,
        ),
        Role(
            "wgrad", p["wgrad_blocks"], [1, 1, places, inputs, own, n, 4, inputs * again, own * again, 1],
            n * 48 * product, L2 + n * (inputs + own) * DRAM,
        ),
    ]


def b3_wgmma_tile(p):
    images, height, width = p["patch"]
    own = images * (height + 1) * width
    deltas, inputs, n = ceil(ceil(p["halo"], 64), 2), ceil(ceil(own, 64), 3), p["patches"] / p["splits"]
    loops = [1, 1, ceil(p["halo"], 256), ceil(own, 256), 9 * 32 / 64, deltas, inputs]
    loops += [n, 2, deltas * (1 - 1 / n), inputs * (1 - 1 / n), 1]
    return [Role("both", p["dgrad_blocks"], loops, n * (36 * 4 + 24 * 8), L2 + n * (deltas + inputs) * DRAM)]


def b4_tile(p):
    pieces, n = ceil(p["halo"], 32), p["patches"] / p["splits"]
    later = 1 - 1 / n
    loops = [1, 1, ceil(pieces, 4), n, (9, pieces / 9 * later), (8, 4 / 8 * later), 1]
    return [Role("both", p["dgrad_blocks"], loops, n * 288, L2 + (ceil(pieces, 4) + 1 + (n - 1) * (pieces + 4)) * DRAM)]


BACKWARD = {f.__name__: f for f in (b0_reference, b1_roles, b2_wgmma_roles, b3_wgmma_tile, b4_tile)}
ELSEWHERE = -1e6


def only(code, loops, others):
    """The code, but for what lies among other roles' loops: no longest path goes there."""
    if not others:
        return code
    start, end = min(loop.start for loop in others), max(loop.end for loop in others)
    forbidden = lambda i: start <= i.at <= end
    return [i._replace(work=i.work._replace(instructions=ELSEWHERE)) if forbidden(i) else i for i in code]


def works_of(code, plan, roles):
    """What a warp of each role of a launch executes."""
    loops = loops_of(code)
    if sum(len(role.loops) for role in roles) != len(loops):
        raise Failure(f"{plan['kernel']} has {len(loops)} loops, scripts/lab_backward.py knows others")
    found, at = [], 0
    for role in roles:
        own = loops[at : at + len(role.loops)]
        mine = only(code, loops, [loop for loop in loops if loop not in own])
        turns, at, inner = dict(zip(own, role.loops)), at + len(own), None

        def turn(loop):
            nonlocal inner
            if loop not in turns:
                return NOTHING
            most = walk(mine, loops, loop, turn, True)
            least = walk(mine, loops, loop, turn, False) if most.tensor else most
            if most.tensor and not inner:
                inner = least, most
            times = turns[loop]
            if isinstance(times, tuple):
                return add(NOTHING, add(least, add(most, least, -1), times[1]), times[0])
            return add(NOTHING, most, times)

        work = walk(mine, loops, None, turn, True)
        if abs(work.tensor - role.products) > 1e-6 * role.products or work.instructions < 0:
            raise Failure(f"{plan['kernel']}: {work.tensor} products were found of {role.name}, not {role.products}")
        found.append(Found(role, work, inner))
    return found


def bytes_of(plan):
    """What comes from memory and goes there once: dy, y, x and dx, w, dw, and the parts of that there and back."""
    rows = plan["branches"] * plan["images"] * plan["height"] * plan["width"]
    weights = 9 * plan["channels"] * plan["filters"]
    sums = plan["branches"] * weights * 4 * (1 + 2 * plan["splits"] if plan["splits"] > 1 else 1)
    return rows * 2 * (2 * plan["filters"] + 2 * plan["channels"]) + 2 * weights + sums


def flops_of(plan):
    rows = plan["branches"] * plan["images"] * plan["height"] * plan["width"]
    return 2 * 2 * 9 * rows * plan["channels"] * plan["filters"]


def total_of(plan, found):
    """The work of all warps of a launch."""
    total = NOTHING
    for one in found:
        total = add(total, one.work, one.role.blocks * plan["threads"] // 32)
    return total


def times(version, plan, found, warps):
    """Predicted times in seconds, by what would be their reason."""
    total, at_once = total_of(plan, found), MULTIPROCESSORS * (warps // (plan["threads"] // 32))
    waits = sum(one.role.blocks / at_once * one.role.waits for one in found)
    # No launch is shorter than a block; and at its end the last block of a tile adds up what all have left.
    waits = max([waits] + [one.role.waits for one in found]) + (plan["splits"] * L2 if plan["splits"] > 1 else 0)
    return {
        "tensor": total.tensor * MMA_FLOPS / (ROOF * (1 if "wgmma" in version else MMA_PART)),
        "issue": total.instructions / (MULTIPROCESSORS * PARTITIONS * CLOCK),
        "shared": total.wavefronts / (MULTIPROCESSORS * CLOCK),
        "memory": bytes_of(plan) / BANDWIDTH,
        "waits": waits / CLOCK,
    }


INVENTED = """
        Function : k
        /*0000*/               @P0 BRA 0x0080 ;
        /*0010*/                   LDSM.16.M88.4 R8, [R0] ;
        /*0020*/               @P1 BRA 0x0040 ;
        /*0030*/                   LDS.128 R4, [R0] ;
        /*0040*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0050*/               @P2 BRA 0x0010 ;
        /*0060*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0070*/                   EXIT ;
        /*0080*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0090*/                   HGMMA.64x64x16.F32 R24, gdesc[UR48].tnspA.tnspB, R24 ;
        /*00a0*/                   HGMMA.64x8x16.F16 RZ, gdesc[URZ], RZ, !UPT, gsb0 ;
        /*00b0*/               @P2 BRA 0x0080 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   BRA 0xd0 ;
"""


def self_test():
    """What is wrong with what is found in invented machine code of two roles."""
    code = parse(INVENTED)["k"]
    roles = [Role("dgrad", 8, [(10, 0.5)], 10, 3000), Role("wgrad", 2, [3], 24, 9000)]
    plan = {"kernel": "k", "threads": 64, "splits": 1}
    works = works_of(code, plan, roles)
    found = {
        "the first role": (works[0].work, Work(1 + 45 + 2, 60 + 1, 10)),
        "a turn of its loop": (works[0].turn, (Work(4, 4, 1), Work(5, 8, 1))),
        "the second role": (works[1].work, Work(1 + 12 + 1, 3 * (4 + 8), 24)),
        "both": (total_of(plan, works), Work(16 * 48 + 4 * 14, 16 * 61 + 4 * 36, 16 * 10 + 4 * 24)),
    }
    try:
        works_of(code, plan, [roles[0], roles[1]._replace(products=25)])
        found["products that are not there"] = (None, Failure)
    except Failure:
        pass
    return [f"{what}: {have}, expected {want}" for what, (have, want) in found.items() if have != want]
