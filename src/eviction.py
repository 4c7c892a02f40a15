"""The room that prepared rows may take: what was not used for the longest time makes way for what is.

    keep_within(Path("outputs/.data"), 32.0, keep=entry)      # GiB

An entry is a folder of the cache that is named by a key. One that a live process reads, waits for or prepares is never
removed: each such process holds the lock of `src.cache.IN_USE`, shared.
"""

import os
import re
import shutil
from pathlib import Path

from src.cache import IN_USE
from utils.locks import Lock
from utils.logging import get_logger

log = get_logger(__name__)

KEY = re.compile(r"[0-9a-f]{32}")
REMOVED = ".removed-"
"""What begins the name of an entry that is being removed: it has no key any more, so that nobody finds a part of it."""

GIB = 2**30


def keep_within(cache: Path, limit_gib: float | None, *, keep: Path) -> None:
    """Remove entries, the least recently used first, until those that are left take `limit_gib` at most.

    Args:
        cache: the folder of all entries; whatever else is in it stays.
        limit_gib: None: no limit, so nothing is removed.
        keep: the entry that this run reads, which stays even if it is larger.
    """
    for rest in cache.glob(f"{REMOVED}*"):  # of a process that was killed here
        _remove_rest(rest)
    if limit_gib is None:
        return
    entries = [path for path in cache.iterdir() if KEY.fullmatch(path.name) and path.is_dir()]
    sizes = {entry: _bytes_below(entry) for entry in entries}
    left, removed = sum(sizes.values()), []
    for entry in sorted(entries, key=_last_used):
        if left <= limit_gib * GIB:
            break
        if entry != keep and _remove(entry):
            left -= sizes[entry]
            removed.append(entry)
    if removed:
        log.info(
            "removed %d prepared data sets of %.2f GiB from %s, those not used for the longest time; %.2f GiB are left "
            "(data.cache_gib=%g)",
            len(removed),
            sum(sizes[entry] for entry in removed) / GIB,
            cache,
            left / GIB,
            limit_gib,
        )
    if left > limit_gib * GIB:
        log.warning(
            "prepared data sets take %.2f GiB in %s, above data.cache_gib=%g: %.2f GiB are this run's own, and other "
            "runs or users have the rest",
            left / GIB,
            cache,
            limit_gib,
            sizes.get(keep, 0) / GIB,
        )


def _remove(entry: Path) -> bool:
    """Remove an entry, unless a process uses it or it is another user's."""
    gone = entry.with_name(f"{REMOVED}{entry.name}-{os.getpid()}")
    try:
        lock = Lock.take(entry / IN_USE)
        if lock is None:
            return False
        with lock:
            entry.rename(gone)
    except PermissionError:
        return False
    _remove_rest(gone)
    return True


def _remove_rest(gone: Path) -> None:
    """Remove what nobody finds any more; another process may be at it too, and what stays goes at the next time."""
    shutil.rmtree(gone, ignore_errors=True)


def _last_used(entry: Path) -> float:
    """When a process last began to use an entry, in seconds since the epoch; 0 where none says so."""
    try:
        return (entry / IN_USE).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _bytes_below(folder: Path) -> int:
    """Bytes of all files below a folder, of which some may go meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_size
            except FileNotFoundError:
                continue
    return total
