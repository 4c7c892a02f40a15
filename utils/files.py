"""Files that are whole or absent, and what they hold.

with whole_folder(Path("outputs/smol/model")) as folder:
    model.save_pretrained(folder)
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits; read in pieces, so a file of any size fits in memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Force every file and folder below `folder`, and itself, to the disk."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside `target` that takes its place, complete and synced, when the block ends well.

    If the block raises, `target` stays as it was and the temporary folder goes. A `target` that exists is replaced:
    it is set aside until the new one stands.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        folder.chmod(0o755)  # mkdtemp's 0700 would outlive the rename
        yield folder
        sync_tree(folder)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.rename(old / "old")
            folder.rename(target)
            shutil.rmtree(old)
        else:
            folder.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


_UNFINISHED = re.compile(r"\..+\.[a-z0-9_]{8}")
"""Names that `tempfile` gives below: a prefix, and eight characters of its own."""


def remove_unfinished(folder: Path) -> None:
    """Remove what a process has left in a folder that was killed while it wrote; nobody else may write there."""
    for path in folder.glob(".*"):
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_write_failure(error: Exception) -> bool:
    """Whether an error came from writing a file: torch and safetensors wrap the system's own in theirs."""
    signs = ("no space left", "file too large", "failed writing", "unexpected pos", "i/o error", "ioerror", "iostream")
    return isinstance(error, OSError) or any(sign in str(error).lower() for sign in signs)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, so that a reader finds the old file or the new one, never a part."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
