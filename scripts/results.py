#!/usr/bin/env python3
"""Runs the comparisons of docs/results.md with `mlnt compare` and puts their tables into it.

    cargo build --release && python3 scripts/results.py target/release/mlnt

Every method is trained in four settings of noise with three seeds, below runs/results. Ctrl-C stops; the same command
goes on. With --tables nothing is trained: the tables of the comparisons that are there are put in, as they are.
Needs Python 3.9 or later.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results.md"
METHODS = "mlnt,mlnt-first-order,iterative-ce,ce,elr,co-teaching,joint-opt"
SETTINGS = [("symmetric", "0.2"), ("symmetric", "0.5"), ("symmetric", "0.8"), ("asymmetric", "0.4")]
COMMON = "--seeds 1,2,3 --train-size 500 --widths 8,16,32 --branches 1 --device cpu"


def main():
    parser = argparse.ArgumentParser(description="Runs the comparisons of docs/results.md.")
    parser.add_argument("mlnt", nargs="?", help="the program; not needed with --tables")
    parser.add_argument("--out", type=Path, default=Path("runs/results"), help="folder of the comparisons [runs/results]")
    parser.add_argument("--threads", default="0", help="threads of the program; 0 = one per core")
    parser.add_argument("--tables", action="store_true", help="train nothing, put in what is there")
    args = parser.parse_args()
    if not args.tables and not args.mlnt:
        parser.error("takes the program, or --tables")
    text = PAGE.read_text(encoding="utf-8")
    for noise, rate in SETTINGS:
        out = args.out / f"{noise}-{rate}"
        if not args.tables:
            flags = f"--methods {METHODS} --noise {noise} --noise-rate {rate} {COMMON} --threads {args.threads}"
            done = subprocess.run([args.mlnt, "compare", *flags.split(), "--out", str(out)])
            if done.returncode:
                sys.exit(done.returncode)
        table = out / "compare.md"
        if not table.is_file():
            print(f"{table} is not there: that table stays")
            continue
        place = re.compile(rf"(<!-- {noise} {rate} -->\n).*?(<!-- end -->)", re.S)
        if not place.search(text):
            sys.exit(f"{PAGE} has no place for {noise} {rate}")
        block = f"\n{table.read_text(encoding='utf-8')}\n"
        text = place.sub(lambda found: found[1] + block + found[2], text)
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
