"""A function in several processes that start at once: a server imports the program, and forks one for each.

start_processes(one_of_two, folder)   # one_of_two(rank, folder) in two processes
launch_processes(train, folder)       # train(folder), as `torchrun` starts it

The environment is that of the first call.
"""

import gc
import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from utils.distributed import leave_group

IMPORTED = ["src.assembly", "src.trainer", "src.streaming", "tests.tiny_run", "torch.distributed.fsdp"]


def start_processes(function: Callable[..., object], *args: Any, processes: int = 2) -> None:
    """Call `function(rank, *args)` in each process, and wait for all; an error of one is raised."""
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    torch.multiprocessing.start_processes(_alone, (function, args), nprocs=processes, start_method="forkserver")


def launch_processes(function: Callable[..., object], *args: Any, processes: int = 2) -> None:
    """As `start_processes`, with `function(*args)` in an environment as `torchrun` makes it, whose group is left at the
    end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(_launched, processes, port, function, args, processes=processes)


def _alone(rank: int, function: Callable[..., object], args: tuple) -> None:
    gc.freeze()  # tests/conftest.py says why
    function(rank, *args)


def _launched(rank: int, processes: int, port: int, function: Callable[..., object], args: tuple) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in (place | meeting).items()})
    function(*args)
    leave_group()
