"""Locks between processes, which the system frees when their holder ends, however it ends.

lock = Lock.take(folder / "lock")        # None: another process holds it
if lock is not None:
    with lock:
        ...
"""

import fcntl
import io
import os
from pathlib import Path


class Lock:
    """A lock that is held, on a file that is there for this alone; other programs are not kept from anything."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file

    @classmethod
    def take(cls, path: Path, *, shared: bool = False) -> "Lock | None":
        """Take the lock without waiting, making its file where there is none.

        Args:
            shared: whether others may hold it as well, who take it shared too.
        Returns:
            None where another holds it, or where its file or folder is removed meanwhile.
        """
        try:
            file = io.FileIO(path, "a")
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            # A lock on a file that its last holder has removed keeps nobody out.
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return cls(file)
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError:
            file.close()
            raise
        file.close()
        return None

    def release(self) -> None:
        """Let others take it; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
