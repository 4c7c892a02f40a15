"""Sources: a file, a folder of files or a Hub data set -> rows as plain dicts, each with its place for error messages.

    found = read_source(SourceConfig(path="gsm8k/train.jsonl", columns={"prompt": "question"}), "data.train.0")
    found.rows[0]  # Row(origin="gsm8k/train.jsonl line 1", values={"prompt": "Natalia sold clips ...", ...})

Local files are read without the datasets cache and with no network, so that nested JSON keeps its exact shape.
"""

import difflib
import json
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas
from datasets.exceptions import DatasetsError

from config.schema import SourceConfig
from utils.errors import UserError
from utils.files import sha256_of_file

FILE_TYPES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
DOCUMENT_SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Row:
    """One row as it was read; `origin` says where, as `file line N` (counted from 1) or `file row N`."""

    origin: str
    values: dict[str, Any]


@dataclass(frozen=True)
class SourceRows:
    """All rows taken from one source.

    `name` is the config's name of it, such as `data.train.0`; `columns` are those of all rows together, after
    renaming; `sha256` maps each file to the digest of its bytes (empty for the Hub); `revision` is the Hub commit.
    """

    name: str
    path: str
    columns: tuple[str, ...]
    rows: list[Row]
    sha256: dict[str, str]
    revision: str | None = None


def read_source(source: SourceConfig, name: str) -> SourceRows:
    """Read the first `max_rows` rows of a source and rename their columns.

    A json or jsonl file holds an array of objects, or an object a line. A txt file is one document; lines that hold
    only `<|endoftext|>` part it into several. In a csv file every value is text, and an empty field is "".

    Raises:
        UserError: the source is missing, empty or unreadable, or `columns` names a column that it does not have.
    """
    path = Path(source.path).expanduser()
    revision, sha256 = None, {}
    if path.is_file():
        rows = _read_file(path, source, name)
        sha256 = {source.path: sha256_of_file(path)}
    elif path.is_dir() or _may_be_on_hub(source.path):
        rows, revision = _read_data_set(source, name)
        if path.is_dir():
            sha256 = {str(file): sha256_of_file(file) for file in sorted(path.rglob("*")) if file.suffix in FILE_TYPES}
            revision = None
    else:
        raise UserError(f"{name}.path={source.path!r} does not exist{_near_names(path)}")
    if not rows:
        raise UserError(f"{name}.path={source.path!r} has no rows; give a file with at least one, or leave it out")
    columns = tuple(dict.fromkeys(column for row in rows for column in row.values))
    if source.columns:
        rows = _rename(rows, columns, source.columns, name)
        columns = tuple(dict.fromkeys(column for row in rows for column in row.values))
    return SourceRows(name, source.path, columns, rows, sha256, revision)


def _may_be_on_hub(path: str) -> bool:
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path) is not None
    return is_id and not path.lower().endswith(FILE_TYPES)


def _near_names(path: Path) -> str:
    """The end of a message about a missing file: what its folder has instead."""
    folder = path.parent
    if not folder.is_dir():
        return f", nor does its folder {str(folder)!r}; relative paths start at the folder the command runs in"
    names = sorted(file.name for file in folder.iterdir() if file.is_dir() or file.suffix in FILE_TYPES)
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5) or names[:5]
    return f"; its folder has {', '.join(near)}" if near else "; its folder has no data files"


def _read_file(path: Path, source: SourceConfig, name: str) -> list[Row]:
    readers = {
        ".json": _read_json,
        ".jsonl": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
        ".txt": _read_text,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{name}.path={source.path!r} ends in {path.suffix!r}; use one of {', '.join(FILE_TYPES)}")
    if path.stat().st_size == 0:
        raise UserError(f"{name}.path={source.path!r} is empty (0 bytes); give a file with at least one row")
    return reader(path, source)


def _shorten(text: str, limit: int = 60) -> str:
    text = text.strip()
    return repr(text if len(text) <= limit else text[:limit] + "...")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start} of it); save the file as UTF-8") from error


def _read_json(path: Path, source: SourceConfig) -> list[Row]:
    with open(path, "rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(0)
        if start.startswith(b"["):
            return _read_json_array(_decode(file.read(), source.path), source)
        return _read_json_lines(file, source)


def _read_json_array(text: str, source: SourceConfig) -> list[Row]:
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1]
        raise UserError(
            f"{source.path} is not JSON at line {error.lineno}, column {error.colno}: {error.msg} in {_shorten(line)}"
        ) from error
    rows = []
    for number, item in enumerate(items[: source.max_rows], start=1):
        origin = f"{source.path} row {number}"
        if not isinstance(item, dict):
            raise UserError(f"{origin} is {_shorten(json.dumps(item))}; each item of the array must be an object")
        rows.append(Row(origin, item))
    return rows


def _read_json_lines(lines: Iterable[bytes], source: SourceConfig) -> list[Row]:
    """Lines end at a line feed only: JSON strings may hold other separators, such as U+2028."""
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if len(rows) == source.max_rows:
            break
        origin = f"{source.path} line {number}"
        text = _decode(line, origin)
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{source.path} is not JSON at line {number}: {error.msg} in {_shorten(text)}; "
                "a file holds an array of objects, or an object a line"
            ) from error
        if not isinstance(values, dict):
            raise UserError(f"{origin} is {_shorten(text)}; each line must be an object")
        rows.append(Row(origin, values))
    return rows


def _read_csv(path: Path, source: SourceConfig) -> list[Row]:
    try:
        table = pandas.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", nrows=source.max_rows)
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{source.path} cannot be read as csv: {error}") from error
    return _numbered(table.to_dict("records"), source.path)


def _read_parquet(path: Path, source: SourceConfig) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            table = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=folder)
        except (DatasetsError, OSError, ValueError) as error:
            cause = error.__cause__ or error
            raise UserError(f"{source.path} cannot be read as parquet: {cause}") from error
        return _numbered(_first(table, source.max_rows), source.path)


def _read_text(path: Path, source: SourceConfig) -> list[Row]:
    documents: list[list[str]] = [[]]
    for line in _decode(path.read_bytes(), source.path).replace("\r\n", "\n").split("\n"):
        if line.strip() == DOCUMENT_SEPARATOR:
            documents.append([])
        else:
            documents[-1].append(line)
    texts = ["\n".join(lines).strip("\n") for lines in documents]
    rows = [
        Row(f"{source.path} document {number}", {"text": text})
        for number, text in enumerate((text for text in texts if text.strip()), start=1)
    ]
    return rows[: source.max_rows]


def _first(table: datasets.Dataset, max_rows: int | None) -> Iterable[dict[str, Any]]:
    return iter(table if max_rows is None else table.select(range(min(max_rows, len(table)))))


def _numbered(rows: Iterable[dict[str, Any]], path: str) -> list[Row]:
    return [Row(f"{path} row {number}", dict(values)) for number, values in enumerate(rows, start=1)]


def _read_data_set(source: SourceConfig, name: str) -> tuple[list[Row], str | None]:
    """Rows of a Hub data set, or of a folder that `datasets.load_dataset` takes; and the Hub commit they are from."""
    try:
        builder = datasets.load_dataset_builder(source.path, source.subset, revision=source.revision)
        builder.download_and_prepare()
        table = builder.as_dataset(split=source.split)
    except (DatasetsError, OSError, ValueError) as error:
        raise UserError(
            f"{name}.path={source.path!r} is no local file, and loading it as a data set failed: "
            f"{_shorten(str(error), 300)}; check its name, subset={source.subset!r}, split={source.split!r}, "
            "revision, your login (`hf auth login`) and the network"
        ) from error
    return _numbered(_first(table, source.max_rows), source.path), builder.hash


def _rename(rows: list[Row], columns: tuple[str, ...], names: dict[str, str], name: str) -> list[Row]:
    """Give each row's values their expected names; a column of that name that was there before is replaced."""
    for expected, given in names.items():
        if given not in columns:
            raise UserError(f"{name}.columns: {expected}: {given!r} is no column of it; it has {', '.join(columns)}")
    moved = set(names.values()) | set(names)
    renamed = []
    for row in rows:
        values = {column: value for column, value in row.values.items() if column not in moved}
        values |= {expected: row.values[given] for expected, given in names.items() if given in row.values}
        renamed.append(Row(row.origin, values))
    return renamed
