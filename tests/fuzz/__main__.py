"""Fuzz what reads files of others: recipes, data, checkpoints, templates, and what a run reads back on resuming.

python -m tests.fuzz --inputs 100000 --seed 1 --keep finds     # from the repository's root
python -m tests.fuzz --only gguf --only jsonl --inputs 5000

A line a reader: inputs, how many were refused with a clear error, seconds, the slowest input, the most memory that one
added, and finds. Exit codes: 0 when nothing was found, 1 when something was; `--keep` gets a folder for each find.
Some memory and a second process are taken while it runs; nothing but --keep is written outside of a temporary folder.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "ARROW_NUM_THREADS": "1",
}


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--inputs", type=int, default=10_000, help="in all, spread over the readers by how quick they are"
    )
    parser.add_argument("--seed", type=int, default=0, help="what decides every input")
    parser.add_argument("--only", action="append", help="name of a reader; may be given several times")
    parser.add_argument("--keep", type=Path, help="folder for the inputs of finds")
    arguments = parser.parse_args()

    from transformers.utils import logging as transformers_logging

    from tests.fuzz.campaign import run
    from tests.fuzz.readers import READERS

    logging.getLogger("smolfactory").setLevel(logging.ERROR)
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    names = [reader.name for reader in READERS]
    if unknown := set(arguments.only or ()) - set(names):
        parser.error(f"no reader is named {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    chosen = [reader for reader in READERS if not arguments.only or reader.name in arguments.only]
    shares = sum(reader.share for reader in chosen)
    total = refused = found = 0
    print(
        f"{'reader':<24} {'inputs':>7} {'refused':>7} {'seconds':>8} {'slowest':>8} {'MiB':>6} {'finds':>6}", flush=True
    )
    for reader in chosen:
        outcome = run(reader, max(1, arguments.inputs * reader.share // shares), arguments.seed)
        total, refused, found = total + outcome.inputs, refused + outcome.refused, found + len(outcome.finds)
        print(
            f"{reader.name:<24} {outcome.inputs:>7} {outcome.refused:>7} {outcome.seconds:>8.1f} "
            f"{outcome.slowest_s:>8.2f} {outcome.largest_mib:>6.0f} {len(outcome.finds):>6}",
            flush=True,
        )
        for number, find in enumerate(outcome.finds.values()):
            print(f"  FIND {find.what} x{find.count} at {find.where}: {find.said}", flush=True)
            if arguments.keep:
                from tests.fuzz.reader import write_files

                write_files(find.input, arguments.keep / f"{reader.name.replace(' ', '-')}-{number}")
    print(f"{total} inputs, {refused} refused with a clear error, {found} finds")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
