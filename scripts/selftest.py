"""Prove that this installation trains right, in under a minute, on tiny random models, without network.

python scripts/selftest.py
python scripts/selftest.py --only packing --only resume

A line a check: its name, what was compared, the largest difference and the bound, seconds. Exit codes: 0 when all hold,
1 when one does not. Of several GPUs, the first is tried unless CUDA_VISIBLE_DEVICES says otherwise.
"""

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def report(names: Sequence[str]) -> int:
    """Print a line a check, and one that counts them; the exit code."""
    import torch

    from src.selftest.checks import run_check
    from src.selftest.verdict import SelftestError
    from utils.distributed import accelerator_name

    failed = 0
    for name in names:
        started = time.perf_counter()
        try:
            verdict = run_check(name)
        except SelftestError as error:
            failed += 1
            print(f"FAIL {name}: {error}", flush=True)
            continue
        seconds = time.perf_counter() - started
        figures = f"{verdict.difference:<7.2g} <= {verdict.bound:<6.2g} {seconds:4.1f} s"
        print(f"ok   {name:<12} {figures}  {verdict.detail}", flush=True)
    print(f"{len(names) - failed} of {len(names)} checks hold on {accelerator_name()}, torch {torch.__version__}")
    return 1 if failed else 0


def main() -> int:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # SFTTrainer refuses several in one process
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from src.selftest.checks import CHECKS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=CHECKS, help="check to run; may be given several times")
    names = parser.parse_args().only or list(CHECKS)
    torch.set_num_threads(1)  # the fastest for models this small; several wait for each other on a busy machine
    torch.set_float32_matmul_precision("highest")  # the bounds are float32's; TF32 keeps 11 bits of 24
    logging.getLogger("smolfactory").setLevel(logging.ERROR)
    set_verbosity_error()
    disable_progress_bar()
    warnings.simplefilter("ignore")
    return report(names)


if __name__ == "__main__":
    sys.exit(main())
