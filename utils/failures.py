"""What a process that fails says, where it is one of several that write to the same stream.

name_failing_process()
"""

import contextlib
import functools
import io
import sys
import time
from collections.abc import Callable
from types import TracebackType

from utils.launch import processes_started, this_process

OTHERS_WAIT_S = 5
"""What stops the main process mostly stops the others too. It speaks first, and the launcher then ends them; what an
other process alone has met, such as a file that is missing on its machine, it says itself after this time. So does a
process that has merely lost another one, for which that one's failure is the reason."""

_LOST = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "TCPStore", "recvValue failed")
"""Words of torch.distributed's errors in a process whose partner has gone."""


def name_failing_process() -> None:
    """From now on, an exception that ends this process is told whole and in one piece, with the process's name.

    Python alone writes a traceback line by line, and those of several processes run into each other. What is told of it
    stays with the hook that is there. Nothing changes for a process that is alone.
    """
    if processes_started() > 1:
        sys.excepthook = functools.partial(_tell, sys.excepthook)


def _tell(
    hook: Callable[..., object], kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if _has_lost_another(error):
        time.sleep(OTHERS_WAIT_S)
    with contextlib.redirect_stderr(io.StringIO()) as told:
        hook(kind, error, trace)
    sys.stderr.write(f"\nerror: {this_process()}, has failed:\n{told.getvalue()}")
    sys.stderr.flush()


def _has_lost_another(error: BaseException) -> bool:
    """Whether an error says that another process has gone, and not why."""
    if type(error).__module__.startswith("torch.distributed"):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST)
