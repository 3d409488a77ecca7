#!/usr/bin/env python3
"""Draws a training run: test accuracy per epoch of cross entropy, the MLNT student and its teacher (solid), and the
accuracy on the noisy training labels (dashed), which rises where a network memorises the noise.

Reads `metrics.jsonl` and `config.toml` of a run directory. Needs Python 3.11 or later and matplotlib.

    python scripts/plot_run.py runs/NAME --out docs/run.png
"""

import argparse
import json
import tomllib
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# (phase, field, label, colour, line style); colours told apart by colour-blind readers too. The order makes the
# legend's columns: cross entropy, student, teacher.
CURVES = (
    ("cross-entropy", "test_accuracy", "cross entropy, test", "#b2182b", "-"),
    ("cross-entropy", "train_accuracy", "cross entropy, training", "#b2182b", "--"),
    ("mlnt", "test_accuracy", "MLNT student, test", "#e69f00", "-"),
    ("mlnt", "train_accuracy", "MLNT student, training", "#e69f00", "--"),
    ("mlnt", "teacher_test_accuracy", "MLNT teacher, test", "#0072b2", "-"),
)


def read_metrics(path):
    """Records of each phase, with `epoch` counted from 1 and on through the iterations."""
    phases = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            records = phases.setdefault(record["phase"], [])
            record["epoch"], record["own_epoch"] = int(record["epoch"]), int(record["epoch"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise SystemExit(f"{path}:{number}: not a metrics record ({error})")
        if not records:
            record["epoch"] = 1
        elif record["own_epoch"] > records[-1]["own_epoch"]:
            record["epoch"] = records[-1]["epoch"] + record["own_epoch"] - records[-1]["own_epoch"]
        else:  # the next iteration starts again
            record["epoch"] = records[-1]["epoch"] + 1
        records.append(record)
    return phases


def noise_text(path):
    """The label noise in words, e.g. `50 % symmetric label noise`."""
    config = tomllib.loads(path.read_text())
    kind, rate = config.get("noise", "none"), config.get("noise-rate", 0.0)
    if kind == "none" or rate == 0:
        return "Labels as given"
    words = {"symmetric-exclusive": "symmetric (exclusive)", "pair": "pair-flip"}.get(kind, kind)
    return f"{100 * rate:g} % {words} label noise"


def draw(phases, noise, out):
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(10, 5.6), dpi=100, layout="constrained")
    last = 1
    for phase, field, label, colour, style in CURVES:
        points = [(r["epoch"], 100 * r[field]) for r in phases.get(phase, ()) if r.get(field) is not None]
        if not points:
            continue
        epochs, values = zip(*points)
        last = max(last, epochs[-1])
        marker = "o" if len(points) == 1 else None
        width = 2.2 if style == "-" else 1.5
        axes.plot(epochs, values, style, color=colour, linewidth=width, marker=marker, label=f"{label}: {values[-1]:.1f} %")
    if not axes.lines:
        raise SystemExit("the metrics hold no accuracy to draw")
    axes.set_xlim(1, max(last, 2))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy, %")
    axes.set_title(f"{noise}: accuracy on the test set, and on the given training labels (dashed)", loc="left", fontsize=12)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=10, title="accuracy after the last epoch")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def main():
    parser = argparse.ArgumentParser(description="Draws the accuracy curves of a training run.")
    parser.add_argument("run", type=Path, help="run directory, with metrics.jsonl and config.toml")
    parser.add_argument("--out", type=Path, default=Path("docs/run.png"))
    args = parser.parse_args()
    for name in ("metrics.jsonl", "config.toml"):
        if not (args.run / name).is_file():
            parser.error(f"{args.run / name}: no such file")
    draw(read_metrics(args.run / "metrics.jsonl"), noise_text(args.run / "config.toml"), args.out)
    print(args.out)


if __name__ == "__main__":
    main()
