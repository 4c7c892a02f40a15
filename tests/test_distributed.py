"""How many threads a process computes with on a CPU."""

import os
import subprocess
import sys

import psutil
import pytest

from tests.tiny_run import ROOT

CORES = min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1)
LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}  # what `accelerate launch` sets unasked


@pytest.mark.parametrize(
    ("asked", "environment", "threads"),
    [
        ("None", LAUNCHED, CORES),
        ("None", LAUNCHED | {"LOCAL_WORLD_SIZE": str(CORES)}, 1),
        ("None", {"OMP_NUM_THREADS": "1"}, 1),
        ("3", LAUNCHED, 3),
    ],
)
def test_threads_are_this_processs_share_unless_told(asked, environment, threads):
    code = f"import torch; from utils.distributed import use_cores; print(use_cores({asked}), torch.get_num_threads())"
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(threads)] * 2
