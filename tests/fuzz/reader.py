"""What is fuzzed: a reader, valid inputs of it, and which errors are its answer to one that is not valid.

An input is a folder of files. A find is an input that makes its reader raise anything but the errors that a command
turns into `error: ...`, say more than a person reads, take more than `SECONDS`, or take far more memory than the files.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from config.constraints import ConfigError
from src.checkpoints.certificate import CertificateError
from tests.fuzz.mutations import mutated
from utils.errors import UserError

Files = dict[str, bytes]
"""A folder's files by name."""

ALLOWED = (UserError, ConfigError, CertificateError)
"""What train.py and the scripts print as `error: ...` before they exit with 2 or 1."""

SECONDS = 5
"""Of the processor's time that an input may take."""

MEMORY_MIB = 192
"""That an input of a few KiB may add to what the process holds: libraries warm up, and a zstd window may be 128 MiB."""

CHARACTERS = 4000
"""Of a message."""

BATCH = 100
"""Inputs that are made from one seed."""


@dataclass(frozen=True)
class Reader:
    """One thing that reads files.

    `seeds` writes valid inputs, each a folder of its own, below the folder it is given. `read` reads one. `share` is
    how many of 1,000 inputs it gets, by how quick it is and how much there is to break. `keeps` are names of files
    that are not changed. `makes` gives further inputs, made from nothing by a seed, in place of changed ones.
    """

    name: str
    seeds: Callable[[Path], None]
    read: Callable[[Path], object]
    share: int
    keeps: tuple[str, ...] = ()
    makes: Callable[[int], Iterator[Files]] | None = None


def files_of(folder: Path) -> Files:
    """A folder's files by their names below it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def write_files(files: Files, folder: Path) -> None:
    """Put files into a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def batch(reader: Reader, seeds: list[Files], seed: str) -> Iterator[Files]:
    """`BATCH` inputs that the seed alone decides."""
    random = Random(seed)
    if reader.makes and random.random() < 0.25:  # they take longer to make than to read
        yield from reader.makes(random.getrandbits(32))
        return
    for _ in range(BATCH):
        files = dict(random.choice(seeds))
        names = [name for name in files if name.rpartition("/")[2] not in reader.keeps]
        for name in random.sample(names, min(len(names), random.choice((1, 1, 1, 2)))):
            files[name] = mutated(name, files[name], random)
        yield files


def fault(error: BaseException) -> str | None:
    """Why an error is a find; None: it is a clear refusal."""
    if not isinstance(error, ALLOWED):
        return type(error).__name__
    text = str(error)
    problems = getattr(error, "problems", [text])
    longest = max(map(len, problems), default=0)
    if longest > CHARACTERS:
        return "a message that nobody reads"
    return None if text.strip() else "an empty message"
