"""The step that documents describe, as `mlnt plan` counts it: PreAct ResNet-32, k = 128, M = 10, exact second order, f16."""

import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEP = "--preset cifar10 --recipe released --device cuda --precision f16 --json".split()


class NoPlan(Exception):
    """There is no plan; the text says why."""


def program(given=None):
    """The newest mlnt that cargo has built, or the one that is given."""
    places = [given] if given else [ROOT / "target" / profile / "mlnt" for profile in ("debug", "release")]
    found = [path for path in places if path.is_file()]
    if not found:
        raise NoPlan("no mlnt: cargo build makes it, --mlnt says where it is")
    return max(found, key=lambda path: path.stat().st_mtime)


def plan(mlnt, *flags):
    """The object that `mlnt plan` prints."""
    command = [str(mlnt), "plan", *STEP, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoPlan(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout)
