"""Work that a thread does before its result is asked for, so that who asks need not wait.

    halt = Halt()
    with contextlib.closing(Ahead(numbers(), halt, most=2)) as ahead:
        for number in ahead:                 # while this one is used, the next two are made
            use(number)

A thread is enough where the work waits for files, or is done by numpy, torch or Rust, which let Python go on.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

from utils.logging import get_logger

log = get_logger(__name__)

Item = TypeVar("Item")

LEAVE_S = 10.0
"""Seconds that a thread has to give up its work, which asks `Halt.check` often. Only what it waits for, such as a
server that does not answer, can take longer; it then ends with the process."""


class HaltedError(Exception):
    """The work was given up, as nobody wants its result any more."""


class Halt:
    """What tells the threads of one purpose that nobody wants their work any more."""

    def __init__(self) -> None:
        self.called = False
        self.changed = threading.Condition()
        """Notified of each item that is made or taken, and of the call."""

    def call(self) -> None:
        """Tell them."""
        with self.changed:
            self.called = True
            self.changed.notify_all()

    def check(self) -> None:
        """To be called often by long work.

        Raises:
            HaltedError: nobody wants it any more.
        """
        if self.called:
            raise HaltedError


class Ahead(Iterator[Item], Generic[Item]):
    """The items of a generator, in their order, made by a thread of their own.

    What ends the generator, be it an error, reaches the caller in the place of the item that it was about.
    """

    def __init__(self, items: Generator[Item, None, None], halt: Halt, *, most: int = 1) -> None:
        """
        Args:
            items: runs, and is closed, in the thread.
            halt: ends the thread.
            most: items that are made, or in the making, before they are asked for.
        """
        self._halt = halt
        self._most = most
        self._made: deque[Item] = deque()
        self._end: BaseException | None = None
        # A daemon, so that no end of the process waits for one that nobody has closed.
        self._thread = threading.Thread(target=self._make, args=(items,), name="ahead", daemon=True)
        self._thread.start()

    def __next__(self) -> Item:
        with self._halt.changed:
            self._halt.changed.wait_for(lambda: self._made or self._end is not None)
            if not self._made:
                raise self._end
            item = self._made.popleft()
            self._halt.changed.notify_all()
            return item

    def close(self) -> None:
        """End the thread, and all others of the same purpose, and wait for it."""
        self._halt.call()
        self._thread.join(LEAVE_S)
        if self._thread.is_alive():
            log.warning(
                "what is read ahead of training did not stop within %.0f s: a file or a server does not answer; it "
                "ends with the process",
                LEAVE_S,
            )

    def _make(self, items: Generator[Item, None, None]) -> None:
        end: BaseException = HaltedError()
        try:
            with contextlib.closing(items):
                while self._may_make_one():
                    self._give(next(items))
        except BaseException as error:  # noqa: BLE001  whatever it is, it is raised where the item is asked for
            end = error
        with self._halt.changed:
            self._end = end
            self._halt.changed.notify_all()

    def _may_make_one(self) -> bool:
        """Wait until there is room for one more; whether it is wanted then."""
        with self._halt.changed:
            self._halt.changed.wait_for(lambda: self._halt.called or len(self._made) < self._most)
            return not self._halt.called

    def _give(self, item: Item) -> None:
        with self._halt.changed:
            self._made.append(item)
            self._halt.changed.notify_all()
