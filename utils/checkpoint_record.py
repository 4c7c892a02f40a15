"""What a checkpoint was when it was written, by which a reader tells whether it still is.

write_record(folder, step=100, config=run / "config.json")  # its files, synced, and at last checkpoint.json
damage(folder)                                              # None, or what is wrong with which file
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from utils.errors import in_one_line
from utils.files import sha256_of_file, sync, sync_tree, write_json
from utils.json_text import ANOTHER_CHECKPOINT, parse_json, read_json_file
from utils.reproducibility import versions

RECORD = "checkpoint.json"
"""The file that names the others."""

THREADS = 4
"""Files that are read at once; hashing lets go of the interpreter's lock. Two of them, the weights and the optimizer's
state, are nearly all of a checkpoint."""


def write_record(folder: Path, *, step: int, config: Path) -> None:
    """Force a checkpoint's files to the disk, and write beside them what they are.

    The files are hashed while the disk takes them, from the memory that still holds them: what is recorded is what was
    meant to be written, and the training waits for the slower of both, not for their sum.

    Args:
        step: the optimizer step that the checkpoint holds.
        config: the run's settings, of which the digest is recorded; it need not exist.
    Raises:
        OSError: a file cannot be read or written.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(sha256_of_file, paths)  # begins at once
        sync_tree(folder)
        files = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, digests, strict=True)
        }
    record = {
        "step": step,
        "config_sha256": sha256_of_file(config) if config.is_file() else None,
        "versions": versions(),
        "files": files,
    }
    write_json(folder / RECORD, record)
    sync(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint that has a record: each file that is not as it was written. None: nothing.

    Every byte is read, unless a size tells already; the files of a checkpoint are read once more when they load.
    """
    try:
        record = parse_json((folder / RECORD).read_text(encoding="utf-8"))
        step, files = (
            record["step"],
            {str(name): (file["bytes"], file["sha256"]) for name, file in record["files"].items()},
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"its {RECORD} cannot be read ({type(error).__name__}: {in_one_line(error)})"
    if not all(type(size) is int and isinstance(digest, str) for size, digest in files.values()):
        return f"its {RECORD} names sizes or digests that are none"
    if folder.name != f"checkpoint-{step}":
        return f"its {RECORD} is that of step {step}"
    wrong = [_wrong_size(folder / name, name, size) for name, (size, _) in files.items()]
    if not any(wrong):
        with ThreadPoolExecutor(THREADS) as pool:
            checks = ((folder / name, name, digest) for name, (_, digest) in files.items())
            wrong = list(pool.map(lambda check: _wrong_content(*check), checks))
    return "; ".join(filter(None, wrong)) or None


def _wrong_size(path: Path, name: str, size: int) -> str | None:
    try:
        there = path.is_file()
    except OSError as error:
        return f"{name[:100]} cannot be read ({error.strerror})"
    if not there:
        return f"{name[:100]} is missing"
    if (found := path.stat().st_size) != size:
        return f"{name} has {found:,} bytes, and {size:,} were written"
    return None


def _wrong_content(path: Path, name: str, digest: str) -> str | None:
    try:
        found = sha256_of_file(path)
    except OSError as error:
        return f"{name} cannot be read ({error})"
    if found != digest:
        return f"{name} holds other bytes than were written (SHA-256 {found[:12]}..., and {digest[:12]}... was written)"
    return None


def config_digest(folder: Path) -> str | None:
    """SHA-256 of the run's config.json when a checkpoint was written. None: that is not recorded."""
    path = folder / RECORD
    record: dict[str, Any] = read_json_file(path, ANOTHER_CHECKPOINT) if path.is_file() else {}
    return record.get("config_sha256")


def size_of(paths: Sequence[Path]) -> int:
    """Bytes of all files below some folders."""
    return sum(path.stat().st_size for folder in paths for path in folder.rglob("*") if path.is_file())
