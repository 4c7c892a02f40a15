"""One run at a time in a run directory: the second is told who has it.

with run_lock(config.output):
    train(config)

The system holds the lock, and frees it however its holder ends; what the file says of the holder is for the message
alone. It is as good as `flock` is where the directory stands: on NFS that needs Linux 2.6.12 and a server with locks.
"""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from config.schema import OutputConfig
from utils.errors import UserError
from utils.launch import is_main_process
from utils.locks import Lock
from utils.logging import get_logger

log = get_logger(__name__)

FILE = ".lock"
"""The file in a run directory that the process which writes there holds locked; it goes when the run ends."""

TRIES = 5
"""Looks at a lock whose holder is just giving it up, and so removes its file."""

BETWEEN_TRIES_S = 0.05

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system without locks answers."""


def run_folder(config: OutputConfig) -> Path:
    """The directory of a run.

    Raises:
        UserError: nothing can be written there.
    """
    path = Path(config.folder) / config.name
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        what = "may not be written to" if there.is_dir() else "is a file"
        raise UserError(f"{path} cannot be made, as {there} {what}; give another output.folder or output.name")
    return path


@contextlib.contextmanager
def run_lock(config: OutputConfig) -> Iterator[None]:
    """Keep other runs out of the run directory during the block.

    The main process takes the lock for all processes of its run. Folders that are made for it, and stay empty, go
    again.

    Raises:
        UserError: another run has the directory, or nothing can be written there.
    """
    if not is_main_process():
        yield
        return
    path = run_folder(config)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    lock = _taken(path)
    try:
        yield
    finally:
        if lock:
            with contextlib.suppress(OSError):  # of a folder that is gone, or can only be read by now
                (path / FILE).unlink()
            lock.release()
        for folder in made:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


def _taken(path: Path) -> Lock | None:
    """The lock of a run directory, with its holder written into it; None where there are no locks.

    Raises:
        UserError: another run has it, or its file cannot be written.
    """
    for _ in range(TRIES):
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = Lock.take(path / FILE)
        except OSError as error:
            if error.errno in NO_LOCKS:
                log.warning("%s cannot be locked (%s); see to it that no other run writes there", path, error)
                return None
            raise UserError(
                f"{path} cannot be written to ({error}); free some space, or give another output.folder"
            ) from error
        if lock is not None:
            _write_holder(path)
            return lock
        time.sleep(BETWEEN_TRIES_S)
    raise UserError(
        f"{path} is in use by another run ({_holder(path)}); wait until it ends, or start this one beside it by "
        "--output.name NAME"
    )


def _write_holder(path: Path) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        (path / FILE).write_text(json.dumps(holder) + "\n", encoding="utf-8")  # in place: the lock is on this very file
    except OSError as error:
        log.warning("%s could not be written (%s), so that another run would not be told of this one", path, error)


def _holder(path: Path) -> str:
    """Who has a run directory, in words."""
    try:
        holder = json.loads((path / FILE).read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it does not say which"
