"""Sources: files, folders, globs, saved data sets or a Hub data set -> rows as plain dicts, each with its place.

    found = open_source(SourceConfig(path="gsm8k/train.jsonl", columns={"prompt": "question"}), "data.train.0")
    found.columns, found.head                # told from the first rows
    for row in found:                        # reads from the start, each time; one row is held at a time
        row.origin, row.values               # "gsm8k/train.jsonl line 1", {"prompt": "Natalia sold clips ...", ...}

Local files are read without the datasets cache and with no network, so that nested JSON keeps its exact shape; so are
the json and parquet files of a Hub data set, once they are downloaded.
"""

import difflib
import functools
import glob
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from datasets.exceptions import DatasetsError
from huggingface_hub import HfFileSystem, hf_hub_download

from config.schema import SourceConfig
from src.files import COMPRESSIONS, FILE_TYPES, Row, file_rows, file_type, open_rows, shorten, shown_names
from src.tables import data_set_rows
from utils.digests import Digests
from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)

HEAD_ROWS = 1000
"""Rows from which columns and the format are told."""

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the name of a folder's file that say which split it is, as the datasets library reads them."""

Files = tuple[tuple[Path, str], ...]
"""Files to read in order, each with its name in origins and errors."""


@dataclass(frozen=True)
class SourceRows:
    """One source, open for reading; iterating gives all its rows, from the start, as often as it is done.

    `name` is the config's name of it, such as `data.train.0`; `head` are its first rows, at most HEAD_ROWS; `columns`
    are those of `head` together, after renaming. `roles` maps names in the file to roles. `files` are the local files,
    and `revision` is the Hub commit. `read` gives the rows; `digests` knows what the files held when they were first
    asked for.
    """

    name: str
    path: str
    columns: tuple[str, ...]
    head: list[Row]
    read: Callable[[], Iterable[Row]]
    roles: dict[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    revision: str | None = None
    digests: Digests = field(default_factory=Digests)

    def __iter__(self) -> Iterator[Row]:
        """Every row; once all are read, it is told how many held keys without a value that were taken out.

        Raises:
            UserError: a row cannot be read; it names the place.
        """
        cleaned = 0
        first = ""
        for row in self.read():
            if row.cleaned:
                first = first or row.origin
                cleaned += 1
            yield row
        if cleaned:
            log.warning(
                "%s: %d rows held keys without a value, which a table has for keys of other rows; these keys are left "
                "out, as templates would write them (%s)",
                self.path,
                cleaned,
                first,
            )

    def batches(self, rows: int = HEAD_ROWS) -> Iterator[list[Row]]:
        """All rows in lists of `rows`; the last may be shorter."""
        source = iter(self)
        while batch := list(itertools.islice(source, rows)):
            yield batch

    @property
    def rows(self) -> list[Row]:
        """All rows at once, in memory."""
        return list(self)

    @functools.cached_property
    def sha256(self) -> dict[str, str]:
        """The digest of each local file's bytes, by its path."""
        return {str(file): self.digests.sha256(file) for file in self.files}

    def check_unchanged(self) -> None:
        """
        Raises:
            UserError: a local file is not what it was when `sha256` was taken, so that its rows may be of both.
        """
        if self.sha256 and (changed := self.digests.changed(self.files)):
            raise UserError(
                f"{self.name}: {changed[0]} was changed while it was read; start again once nothing writes to it"
            )


def open_source(
    source: SourceConfig, name: str, digests: Digests | None = None, *, streams: bool = False
) -> SourceRows:
    """Find a source and look at its first rows.

    A path is a file; a glob such as `logs/*.jsonl`; a folder, of which the files are taken whose names say `split`, or
    all if none says a split; a folder that `save_to_disk` wrote; or a Hub data set. The files of a folder or a glob are
    read in the order of their names, and must be of one type.

    Args:
        digests: what is known of the files from earlier runs; None: nothing.
        streams: whether a Hub data set is read from the Hub each time, and not downloaded.
    Raises:
        UserError: the source is missing, empty or unreadable, or `columns` names a column that it does not have.
    """
    path = Path(source.path).expanduser()
    files: Files = ()
    revision = None
    if path.is_file():
        files = ((path, source.path),)
    elif path.is_dir() and _is_saved(path):
        read = functools.partial(_table, _saved(path, source, name), source.path)
    elif path.is_dir():
        files = _of_folder(path, source, name)
    elif glob.has_magic(source.path):
        files = _of_glob(str(path), name)
    elif _may_be_on_hub(source.path):
        read, revision = _on_hub(source, name, streams=streams)
    else:
        raise UserError(f"{name}.path={source.path!r} does not exist{_near_names(path)}")
    if files:
        read = functools.partial(_rows_of_files, files, name)
    limited = functools.partial(_limited, read, source.max_rows)
    head = list(itertools.islice(limited(), HEAD_ROWS))
    if not head:
        raise UserError(f"{name}.path={source.path!r} has no rows; give a file with at least one, or leave it out")
    if source.columns:
        _check_columns(head, source.columns, name)
        limited = functools.partial(_renamed, limited, source.columns)
        head = list(_renamed(lambda: head, source.columns))
    columns = tuple(dict.fromkeys(column for row in head for column in row.values))
    paths = tuple(file for file, _ in files)
    known = digests or Digests()
    return SourceRows(name, source.path, columns, head, limited, dict(source.roles), paths, revision, known)


def _limited(read: Callable[[], Iterable[Row]], max_rows: int | None) -> Iterator[Row]:
    return itertools.islice(read(), max_rows)


def _rows_of_files(files: Files, name: str) -> Iterator[Row]:
    for path, shown in files:
        try:
            yield from file_rows(path, shown)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error


def _table(table: datasets.Dataset | datasets.IterableDataset, shown: str) -> Iterator[Row]:
    for number, (values, cleaned) in enumerate(data_set_rows(table, shown), start=1):
        yield Row(f"{shown} row {number}", values, cleaned)


def _check_columns(head: list[Row], names: dict[str, str], name: str) -> None:
    columns = dict.fromkeys(column for row in head for column in row.values)
    for expected, given in names.items():
        if given not in columns:
            raise UserError(f"{name}.columns: {expected}: {given!r} is no column of it; it has {shown_names(columns)}")


def _renamed(read: Callable[[], Iterable[Row]], names: dict[str, str]) -> Iterator[Row]:
    """Give each row's values their expected names; a column of that name that was there before is replaced."""
    moved = set(names.values()) | set(names)
    expected_of = {given: expected for expected, given in names.items()}
    for row in read():
        values = {column: value for column, value in row.values.items() if column not in moved}
        values |= {expected: row.values[given] for expected, given in names.items() if given in row.values}
        yield Row(row.origin, values, frozenset(_renamed_key(name, expected_of) for name in row.cleaned))


def _renamed_key(name: str, expected_of: dict[str, str]) -> str:
    column, dot, key = name.partition(".")
    return expected_of.get(column, column) + dot + key


def _may_be_on_hub(path: str) -> bool:
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path) is not None
    return is_id and file_type(Path(path)) is None


def _near_names(path: Path) -> str:
    """The end of a message about a missing file: what its folder has instead."""
    folder = path.parent
    if not folder.is_dir():
        return f", nor does its folder {str(folder)!r}; relative paths start at the folder the command runs in"
    names = sorted(file.name for file in folder.iterdir() if file.is_dir() or file_type(file))
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5) or names[:5]
    return f"; its folder has {', '.join(near)}" if near else "; its folder has no data files"


def _one_type(files: list[Path], what: str) -> Files:
    """The files with their names, once they are found to be of one type; json and jsonl are one."""
    types = sorted({(file_type(file) or file.suffix).replace("jsonl", "json") for file in files})
    if len(types) > 1:
        raise UserError(f"{what} has files of types {', '.join(types)}; give a glob that takes those of one type")
    return tuple((file, str(file)) for file in files)


def _of_glob(pattern: str, name: str) -> Files:
    files = [path for path in sorted(map(Path, glob.glob(pattern, recursive=True))) if path.is_file()]
    if not files:
        raise UserError(f"{name}.path={pattern!r} fits no file; in a glob, * stands for any letters and ** for folders")
    return _one_type(files, f"{name}.path={pattern!r}")


def _split_of(file: Path) -> str | None:
    words = re.split(r"[^a-z]+", str(file).lower())
    return next((split for split, signs in SPLIT_WORDS.items() if set(signs) & set(words)), None)


def _of_folder(folder: Path, source: SourceConfig, name: str) -> Files:
    """The data files of a folder that belong to the split."""
    below = sorted(path for path in folder.rglob("*") if path.is_file() and file_type(path))
    below = [path for path in below if not any(part[0] in "._" for part in path.relative_to(folder).parts)]
    if not below:
        allowed = f"{', '.join(FILE_TYPES)}, also with {' or '.join(COMPRESSIONS)}"
        raise UserError(f"{name}.path={source.path!r} is a folder without data files ({allowed})")
    splits = {path: _split_of(path.relative_to(folder)) for path in below}
    if not any(splits.values()) and source.split == "train":
        return _one_type(below, f"{name}.path={source.path!r}")
    taken = [path for path in below if splits[path] == source.split]
    if not taken:
        there = sorted({split for split in splits.values() if split}) or ["train"]
        raise UserError(
            f"{name}.split={source.split!r} is none that the names of the files in {source.path!r} say: "
            f"{', '.join(there)}; change it, or give a glob as {name}.path"
        )
    if len(taken) < len(below):
        log.info("%s: %d files of split %s taken, %d others left", source.path, len(taken), source.split, len(below))
    return _one_type(taken, f"{name}.path={source.path!r}")


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _saved(folder: Path, source: SourceConfig, name: str) -> datasets.Dataset:
    """A data set, or a split of several, that `save_to_disk` wrote."""
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets trusts the folder's JSON files, and fails in whatever they hold
        told = f"{type(error).__name__}: {shorten(str(error), 300)}"
        raise UserError(f"{name}.path={source.path!r} cannot be read as a saved data set: {told}") from error
    if isinstance(found, datasets.Dataset):
        return found
    if source.split not in found:
        raise UserError(f"{name}.split={source.split!r} is no split of {source.path!r}; it has {', '.join(found)}")
    return found[source.split]


def _on_hub(source: SourceConfig, name: str, *, streams: bool) -> tuple[Callable[[], Iterable[Row]], str | None]:
    """What reads a Hub data set, and the Hub commit that the rows are from."""
    try:
        builder = datasets.load_dataset_builder(source.path, source.subset, revision=source.revision)
        urls = (builder.config.data_files or {}).get(source.split, [])
        if urls and all(file_type(Path(url)) in (".json", ".jsonl", ".parquet") for url in urls):
            shown = [f"{source.path} {url.rsplit('/', 1)[-1]}" for url in urls]
            if streams:
                return functools.partial(_rows_of_urls, urls, shown, name), builder.hash
            files = tuple(zip(map(_downloaded, urls), shown, strict=True))
            return functools.partial(_rows_of_files, files, name), builder.hash
        if streams:
            table = builder.as_streaming_dataset(split=source.split)
        else:
            builder.download_and_prepare()
            table = builder.as_dataset(split=source.split)
    except (DatasetsError, OSError, ValueError) as error:
        raise UserError(
            f"{name}.path={source.path!r} is no local file, and loading it as a data set failed: "
            f"{shorten(str(error.__cause__ or error), 300)}; check its name, subset={source.subset!r}, "
            f"split={source.split!r}, revision, your login (`hf auth login`) and the network"
        ) from error
    return functools.partial(_table, table, source.path), builder.hash


def _rows_of_urls(urls: Sequence[str], shown: Sequence[str], name: str) -> Iterator[Row]:
    """The rows of files on the Hub, each read while its rows are asked for."""
    for url, file_shown in zip(urls, shown, strict=True):
        try:
            with HfFileSystem().open(url, "rb") as file:
                yield from open_rows(file, Path(url).suffix.lower(), file_shown)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error


def _downloaded(url: str) -> Path:
    """The local copy of a file that a `hf://` address names."""
    place = HfFileSystem().resolve_path(url)
    return Path(hf_hub_download(place.repo_id, place.path_in_repo, repo_type=place.repo_type, revision=place.revision))
