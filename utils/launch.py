"""What the launcher says of this process, without importing torch.

if is_main_process():
    ...
"""

import os
import socket


def process_rank() -> int:
    """This process's place among those that the launcher started, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this process is the first of those that the launcher started."""
    return process_rank() == 0


def is_first_of_machine() -> bool:
    """Whether this process is the first of those that the launcher started on this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def processes_started() -> int:
    """Processes that the launcher started, by its own account."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def this_process() -> str:
    """This process's name for a reader of several processes' messages."""
    return f"process {process_rank()} of {processes_started()}, on {socket.gethostname()}"
