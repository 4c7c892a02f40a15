"""Token rows on disk: written in shards, found again by what they were made of, and read without being loaded.

    key = cache_key(config, tokenizer, sources)
    use = prepared(folder := cache / key, prepare)   # prepare(folder) runs in one process at most, the others wait
    with whole_folder(folder / shard_name(0, 0)) as shard:
        with ShardWriter(shard) as writer:
            writer.write("train", rows)
    rows = load_rows([folder / shard_name(0, 0)], "train")

A shard is a folder that appears whole, under its own name; `account.json` in it says how long its files are and what
they hold, and one whose files are not so is made again. So a process that is killed loses the shard it was at, and no
run trains on rows that a disk has changed. To check them takes about a second for each GB and thread.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from transformers import PreTrainedTokenizerBase

from config.schema import DataConfig
from src.sources import SourceRows
from src.tokenization import IGNORED, TokenRow
from utils.files import sha256_of_file, sync, write_json
from utils.json_text import parse_json
from utils.locks import Lock
from utils.logging import get_logger

log = get_logger(__name__)

IDS = pyarrow.list_(pyarrow.int32())
SCHEMA = pyarrow.schema([("input_ids", IDS), ("labels", IDS), ("origin", pyarrow.string())])
ACCOUNT = "account.json"
COMPLETE = "complete.json"
IN_USE = "in_use"
"""File in a prepared folder that whoever uses it holds locked, shared; its time is that of the last use."""

LATER_NS = 1_000_000
"""Nanoseconds between the times of two uses at least, as file systems keep them."""

HASH_THREADS = 4
"""Files of prepared rows that are read at once to be checked; hashing lets go of the interpreter's lock."""

POLL_S = 0.2
"""Seconds between two looks at whether another process is done."""

NO_MATTER = frozenset(
    {"workers", "cache_folder", "cache_gib", "packing", "streaming", "stream_window_rows", "seed", "contract"}
)
"""Fields of DataConfig that change no token row, or only the order in which rows are taken; every other one is in the
key."""

NO_MATTER_OF_SOURCE = frozenset({"epochs", "weight"})
"""The same of SourceConfig."""

IMPORTS = re.compile(r"^\s*(?:from|import) ((?:src|config|utils)\.[\w.]+)", re.MULTILINE)
"""Modules of this project that a source file imports."""

ROOT = Path(__file__).resolve().parent.parent

LIBRARIES = ("tokenizers", "transformers", "jinja2", "datasets")


def cache_key(config: DataConfig, tokenizer: PreTrainedTokenizerBase, sources: Sequence[SourceRows]) -> str:
    """32 hexadecimal digits that change with anything which may change a token row.

    That is the content of the sources' files (of a Hub data set: its commit), every field of the config but those
    that do not matter, the tokenizer with its special tokens and templates, the day where a template writes the
    clock's, the code of the pipeline and the releases of the libraries that it stands on.
    """
    parts = {
        "config": _what_matters(config),
        "sources": [content_of(source) for source in sources],
        "tokenizer": _tokenizer_sha256(tokenizer),
        "day": _day(config, tokenizer),
        "code": code_sha256(stages(ROOT)),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _what_matters(config: DataConfig) -> dict[str, Any]:
    told = {name: value for name, value in asdict(config).items() if name not in NO_MATTER}
    for source in (*told["train"], *told["eval"]):
        for name in NO_MATTER_OF_SOURCE:
            del source[name]
    return told


def _day(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Today's date, where a chat template may write it."""
    asks = config.template_date is None and "strftime_now" in str(tokenizer.chat_template)
    return date.today().isoformat() if asks else None


def content_of(source: SourceRows) -> list[Any]:
    """The digests of a source's files, those of a saved data set among them; of a Hub data set its commit."""
    folder = Path(source.path).expanduser()
    saved = [] if source.files or not folder.is_dir() else _files(folder)
    return [source.sha256 | {str(file): source.digests.sha256(file) for file in saved}, source.revision]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    told = {
        "class": type(tokenizer).__name__,
        "backend": tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else None,
        "special": tokenizer.special_tokens_map,
        "split_special_tokens": tokenizer.split_special_tokens,
        "chat_template": tokenizer.chat_template,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def stages(root: Path) -> dict[str, bytes]:
    """The source of the modules below `root` that `src.data` imports, at first or second hand, and its own, by name."""
    found: dict[str, bytes] = {}
    names = ["src.data"]
    while names:
        name = names.pop()
        path = root.joinpath(*name.split(".")).with_suffix(".py")
        if name not in found and path.is_file():
            found[name] = path.read_bytes()
            names += IMPORTS.findall(found[name].decode())
    return found


def code_sha256(modules: dict[str, bytes]) -> str:
    """The digest of the modules that `stages` found."""
    digest = hashlib.sha256()
    for name, source in sorted(modules.items()):
        digest.update(f"{name} {len(source)}\n".encode() + source)
    return digest.hexdigest()


def prepared(folder: Path, prepare: Callable[[Path], None]) -> Lock:
    """Have a folder with all that `prepare` writes into it, which one process does while others wait without a limit.

    The system frees the lock of a process that is killed, and the next one goes on from the shards it finds.

    Returns:
        What keeps the folder from being removed by `src.eviction` until it is released, or this process ends.
    Raises:
        UserError: as `prepare` does.
    """
    while (use := _use(folder)) is None:
        time.sleep(POLL_S)
    told = False
    try:
        while not _is_complete(folder) or _damaged(folder):
            lock = Lock.take(folder / "lock")
            if lock is not None:
                with lock:
                    _remove_damaged(folder)
                    _complete(folder, prepare)
                continue
            if not told:
                log.info("another process prepares the data in %s; waiting for it", folder)
            told = True
            time.sleep(POLL_S)
    except BaseException:
        use.release()
        raise
    _mark_used(folder)
    return use


def _mark_used(folder: Path) -> None:
    """Note that a folder is used after all that were used before it, wherever the clock stands by now."""
    times = [mark.stat().st_mtime_ns for mark in folder.parent.glob(f"*/{IN_USE}")]
    now = max([time.time_ns(), *(used + LATER_NS for used in times)])
    os.utime(folder / IN_USE, ns=(now, now))


def _use(folder: Path) -> Lock | None:
    """The lock of those who use a folder, which is made if need be; None while another process removes it."""
    folder.mkdir(parents=True, exist_ok=True)
    return Lock.take(folder / IN_USE, shared=True)


def _complete(folder: Path, prepare: Callable[[Path], None]) -> None:
    """Prepare what is missing, unless another process did while this one came to hold the lock."""
    if _is_complete(folder):
        return
    for unfinished in folder.glob("*/.shard-*"):
        shutil.rmtree(unfinished)
    prepare(folder)
    shards = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/shard-*"))
    write_json(folder / COMPLETE, {"shards": shards})


def _is_complete(folder: Path) -> bool:
    """Whether all shards were written, and are as long as they were then."""
    shards = _shards(folder)
    return shards is not None and all(read_account(shard) is not None for shard in shards)


def _shards(folder: Path) -> list[Path] | None:
    """The shards of prepared rows; None where not all were written."""
    try:
        names = parse_json((folder / COMPLETE).read_text(encoding="utf-8"))["shards"]
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return [folder / name for name in names]


def _damaged(folder: Path) -> list[Path]:
    """The files of all shards that hold other bytes than were written; each is read, once a run and process."""
    digests = {
        shard / name: digest
        for shard in _shards(folder) or ()
        if (account := read_account(shard)) is not None
        for name, digest in account["sha256"].items()
    }
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        found = pool.map(sha256_of_file, digests)
        return [file for (file, digest), now in zip(digests.items(), found, strict=True) if now != digest]


def _remove_damaged(folder: Path) -> None:
    """Remove the shards with a damaged file, so that they are made again; who has mapped one keeps it until it ends."""
    for file in _damaged(folder):
        log.warning("%s holds other bytes than were written, as by a fault of the disk; it is made again", file)
        shutil.rmtree(file.parent, ignore_errors=True)


def shard_name(source: int, shard: int) -> str:
    """The folder of a source's shard, both counted from 0, below that of the data."""
    return f"source-{source:03d}/shard-{shard:06d}"


class ShardWriter:
    """Writes token rows and what is known of them into a folder, a file for each side that has rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tables: dict[str, Any] = {}

    def write(self, side: str, rows: Sequence[TokenRow]) -> None:
        """Add rows to a side, `train` or `eval`, straight from their ids to Arrow's buffers."""
        if not rows:
            return
        if side not in self._tables:
            self._tables[side] = pyarrow.ipc.new_stream(str(self.folder / f"{side}.arrow"), SCHEMA)
        offsets = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum([len(row.input_ids) for row in rows], out=offsets[1:])
        ids = np.concatenate([row.input_ids for row in rows])
        labels = np.concatenate([row.labels for row in rows])
        counted = np.add.reduceat(labels != IGNORED, offsets[:-1])
        assert counted.all(), f"{rows[int(counted.argmin())].origin}: a row without supervised tokens"
        assert ((labels == ids) | (labels == IGNORED)).all(), "a label is not the id of its own token"
        columns = [pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(flat)) for flat in (ids, labels)]
        columns.append(pyarrow.array([row.origin for row in rows], pyarrow.string()))
        self._tables[side].write_batch(pyarrow.record_batch(columns, schema=SCHEMA))

    def close(self, account: dict[str, Any]) -> None:
        """End the files and write `account.json`: what `account` says, and each file's length in bytes and SHA-256."""
        for table in self._tables.values():
            table.close()
        files = sorted(self.folder.iterdir())
        told = {
            "bytes": {path.name: path.stat().st_size for path in files},
            "sha256": {path.name: sha256_of_file(path) for path in files},
        }
        (self.folder / ACCOUNT).write_text(json.dumps(account | told), encoding="utf-8")
        sync(self.folder)


def read_account(shard: Path) -> dict[str, Any] | None:
    """What a shard's `account.json` says; None where it is missing, or a file is not as long as then."""
    try:
        account = parse_json((shard / ACCOUNT).read_text(encoding="utf-8"))
        whole = type(account["rows_read"]) is int and all(
            (shard / name).stat().st_size == size for name, size in account["bytes"].items()
        )
        whole = whole and account["sha256"].keys() == account["bytes"].keys()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return account if whole else None


def load_rows(shards: Sequence[Path], side: str) -> datasets.Dataset | None:
    """The token rows of a side, in the shards' order, mapped from disk; None where no shard has any."""
    files = [shard / f"{side}.arrow" for shard in shards]
    tables = [datasets.Dataset.from_file(str(file)) for file in files if file.is_file()]
    return datasets.concatenate_datasets(tables) if tables else None
