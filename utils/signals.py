"""Signals that ask a process to end, noted until there is a good moment for it.

asked = AskedToEnd()
asked.listen()
...
if asked.signal: ...          # the number of the signal that came first; 0: none came
asked.restore()
"""

import os
import signal
from types import FrameType

from utils.launch import is_main_process

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
"""What batch systems, clouds and people send: Slurm sends what `--signal` names, mostly USR1, and TERM at the end."""


class AskedToEnd:
    """Notes a signal in place of what it does; a second SIGINT does it."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, object] = {}

    def listen(self) -> None:
        """Take the signals from here on, for which the main thread of Python calls this."""
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
