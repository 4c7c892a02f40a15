"""An end to code of others that may never come to one.

with time_limit(10):
    template.render(messages)       # TimeoutError after 10 s
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError within the block once it has taken `seconds` by the clock.

    It ends what runs in Python; a single operation of the interpreter, such as a power of huge numbers, is not ended.
    In a thread beside the main one, or where the system has no such alarm or one is set already, nothing is limited.
    """
    usable = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not usable or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def ring(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeoutError(f"{seconds:g} s have passed")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
