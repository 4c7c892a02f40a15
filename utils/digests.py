"""SHA-256 of files, remembered from run to run while nothing says that a file changed.

digests = Digests(Path("outputs/.data/digests.json"))
digests.sha256(Path("rows.jsonl"))     # reads the file; the next process only looks at its times
digests.save()

A file is taken for the same while its size, times of change, inode and device are. Times of a file system move in
ticks, so a file that was written to shortly before its digest was taken may be written to again without a sign of it;
such a digest is not remembered.

Source: git's "racy" index entries, https://git-scm.com/docs/racy-git.
"""

import os
import time
from collections.abc import Iterable
from pathlib import Path

from utils.files import sha256_of_file, write_json
from utils.json_text import parse_json
from utils.logging import get_logger

log = get_logger(__name__)

RACY_NS = 2_000_000_000
"""Nanoseconds between a file's last change and its digest that make it sure that a later change shows: the coarsest
tick of a file system in use, FAT's."""

Signature = tuple[int, int, int, int, int]


class Digests:
    """The digests of files that this process asked for, and those in a JSON file that earlier ones did."""

    def __init__(self, path: Path | None = None) -> None:
        """
        Args:
            path: where digests are kept; None: nowhere.
        """
        self.path = path
        self._known = _read(path) if path else {}
        self._taken: dict[str, tuple[Signature, str]] = {}
        self._new = False

    def sha256(self, file: Path) -> str:
        """The SHA-256 of a file's bytes, which is read unless it is as it was when that was taken last."""
        name = os.path.abspath(file)
        known = self._known.get(name)
        if known is None or known[0] != _signature(file):
            known, lasting = _read_file(file)
            if lasting:
                self._known[name] = known
                self._new = True
        self._taken[name] = known
        return known[1]

    def changed(self, files: Iterable[Path]) -> list[Path]:
        """Those of `files` whose bytes are not what they were when `sha256` was asked for them."""
        found = []
        for file in files:
            signature, digest = self._taken[os.path.abspath(file)]
            if not file.is_file() or (_signature(file) != signature and sha256_of_file(file) != digest):
                found.append(file)
        return found

    def save(self) -> None:
        """Write what is new beside what other processes have written meanwhile; files that are gone are forgotten."""
        if self.path is None or not self._new:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entries = {name: entry for name, entry in (_read(self.path) | self._known).items() if os.path.isfile(name)}
        write_json(self.path, {name: [*signature, digest] for name, (signature, digest) in sorted(entries.items())})
        self._new = False

    def save_or_tell(self) -> None:
        """As `save`, for those who can go on where it cannot be written."""
        try:
            self.save()
        except OSError as error:
            log.warning("%s could not be written (%s); the next run reads these files once more", self.path, error)


def _signature(file: Path) -> Signature:
    """What a change of a file's bytes changes: size, mtime and ctime in nanoseconds, inode, device."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev


def _read_file(file: Path) -> tuple[tuple[Signature, str], bool]:
    """A file's signature and digest, and whether any later change of its bytes is sure to show in the first."""
    while True:
        signature, started = _signature(file), time.time_ns()
        digest = sha256_of_file(file)
        if _signature(file) == signature:
            return (signature, digest), started - max(signature[1:3]) >= RACY_NS


def _read(path: Path) -> dict[str, tuple[Signature, str]]:
    """The remembered digests by absolute path; none where the file is missing or is no such record."""
    try:
        entries = parse_json(path.read_text(encoding="utf-8"))
        known = {name: (tuple(entry[:5]), entry[5]) for name, entry in entries.items()}
    except (FileNotFoundError, ValueError, AttributeError, LookupError, TypeError):
        return {}
    return known if all(isinstance(digest, str) for _, digest in known.values()) else {}
