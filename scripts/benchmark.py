"""Measure the project beside its peers: the training step, its loss, the preparation of rows, and memory as rows grow.

python scripts/benchmark.py step --preset cpu-15m --repeats 3    # how fast training steps are
python scripts/benchmark.py gains                                # what each part of a step gains
python scripts/benchmark.py growth                               # how time and memory grow with length and size
python scripts/benchmark.py loss --repeats 5                     # how fast the head's loss and gradients are
python scripts/benchmark.py data --repeats 3                     # how fast rows are prepared
python scripts/benchmark.py scale                                # in how much memory a million rows are

Nothing is downloaded. Each says more with --help; with --output its record is written to NAME.json and NAME.md.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.errors import UserError, tell_error


def recorded_command(argv: Sequence[str]) -> str:
    """The command as it can be given again; where its record went is no part of it."""
    kept, skip = [], False
    for word in argv:
        if not skip and not word.startswith("--output"):
            kept.append(word)
        skip = word == "--output"
    return shlex.join(["python", "scripts/benchmark.py", *kept])


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 when all was measured, 1 when something failed, 2 when the command is wrong."""
    try:
        match argv[:1]:
            case ["step"]:
                from scripts.benchmarking.step import main as measure
            case ["loss"]:
                from scripts.benchmarking.loss_kernels import main as measure
            case ["data"]:
                from scripts.benchmarking.preparation import main as measure
            case ["scale"]:
                from scripts.benchmarking.scale import main as measure
            case ["gains"]:
                from scripts.benchmarking.gains import main as measure
            case ["growth"]:
                from scripts.benchmarking.growth import main as measure
            case _:
                print(__doc__)
                return 0 if argv[:1] in (["--help"], ["-h"]) else 2
        return measure(argv[1:], recorded_command(argv))
    except UserError as error:
        tell_error(error)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
