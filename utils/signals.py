"""Signals that ask a process to end, noted until there is a good moment for it.

asked = AskedToEnd()
asked.listen()
...
if asked.signal: ...          # the number of the signal that came first; 0: none came
asked.restore()

keep_interrupts()
raise_lost_interrupt()        # KeyboardInterrupt, if one came before and a library has swallowed it
"""

import os
import signal
from types import FrameType

from utils.launch import is_main_process

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
"""What batch systems, clouds and people send: Slurm sends what `--signal` names, mostly USR1, and TERM at the end."""


class _Interrupt:
    """What SIGINT does in Python, and a note of it: `datasets` has blocks that catch every error, this one too."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        raise KeyboardInterrupt


def keep_interrupts() -> None:
    """Note each SIGINT from here on, unless it is ignored, as in a shell's background."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _Interrupt())


def raise_lost_interrupt() -> None:
    """
    Raises:
        KeyboardInterrupt: a SIGINT was noted.
    """
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, _Interrupt) and handler.came:
        raise KeyboardInterrupt


class AskedToEnd:
    """Notes a signal in place of what it does; a second SIGINT does it."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, object] = {}

    def listen(self) -> None:
        """Take the signals from here on, for which the main thread of Python calls this.

        Raises:
            KeyboardInterrupt: one came before, and a library has swallowed it.
        """
        raise_lost_interrupt()
        for number in SIGNALS if not self._before else ():
            self._before[number] = signal.signal(number, self._note)

    def restore(self) -> None:
        """Let the signals do what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was none of Python's
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        # The system's own action, as Python's would wait for code outside of Python, such as that of a collective.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.signal:
            return
        self.signal = number
        if is_main_process():
            # Not by the logger: what it writes to may be in the midst of a line.
            name = signal.Signals(number).name
            os.write(2, f"{name}: the run is saved after the step under way; SIGINT ends it at once\n".encode())
