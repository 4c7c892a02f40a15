"""`train.py` where weights are sharded on a CPU too: what a trial of sharded runs is started by here."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from tests.sharded_run import sharding_here

if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    with sharding_here():
        sys.exit(train.main())
