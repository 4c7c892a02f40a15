"""Data files as rows, one at a time, so that a file of any size is read in little memory.

    for row in file_rows(Path("chat.jsonl.gz"), "chat.jsonl.gz"):
        row.origin, row.values               # "chat.jsonl.gz line 1", {"messages": [...]}

A json file holds an array of objects, or an object a line, as a jsonl file does; nested values keep their exact shape.
In a csv file every value is text, and an empty field is "". A txt file is one document; lines that hold only
`<|endoftext|>` part it into several. Each of these may be compressed (.gz, .zst). Of parquet and arrow files see
`src.tables`.
"""

import csv
import gzip
import importlib
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from src.tables import arrow_rows, parquet_rows
from utils.errors import UserError
from utils.json_text import parse_json

COMPRESSIONS = (".gz", ".zst")
FILE_TYPES = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".arrow")
DOCUMENT_SEPARATOR = "<|endoftext|>"
CHUNK = 1 << 20
"""Characters of a JSON array that are read at once."""

PADDED_TOOLS = re.compile(r"(?:^|\.)(?:tools|tool_calls)\.")
"""In the dotted name of a key: it is one within tools or tool calls."""

_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class Row:
    """One row as it was read; `origin` says where, as `file line N` (counted from 1) or `file row N`.

    `cleaned` are the dotted names of the keys without a value that were taken out of it, which Arrow puts where another
    row has the key.
    """

    origin: str
    values: dict[str, Any]
    cleaned: frozenset[str] = frozenset()

    def had_padded_tools(self) -> bool:
        """Whether keys without a value stood in its tools or its tool calls."""
        return any(PADDED_TOOLS.search(name) for name in self.cleaned)


def file_type(path: Path) -> str | None:
    """The ending in FILE_TYPES of a file's name, before that of a compression; None: no data file."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return name.suffix.lower() if name.suffix.lower() in FILE_TYPES else None


def file_rows(path: Path, shown: str) -> Iterator[Row]:
    """The rows of a data file, in order.

    Args:
        shown: the file's name in origins and errors.
    Raises:
        UserError: its type is unknown, it is empty or damaged, or a row cannot be read; it names the line.
    """
    kind = file_type(path)
    if kind is None:
        endings = f"{', '.join(FILE_TYPES)}, all but parquet and arrow also with {' or '.join(COMPRESSIONS)}"
        raise UserError(f"{shown!r} ends in {path.suffix!r}; use one of {endings}")
    if path.stat().st_size == 0:
        raise UserError(f"{shown!r} is empty (0 bytes); give a file with at least one row")
    compressed = path.suffix.lower() in COMPRESSIONS
    if kind in (".parquet", ".arrow"):
        if compressed:
            raise UserError(f"{shown!r} is compressed from outside, which {kind} files do inside; unpack it")
        yield from _numbered(parquet_rows(path, shown) if kind == ".parquet" else arrow_rows(path, shown), shown)
        return
    readers: dict[str, Callable[[BinaryIO, str], Iterator[Row]]] = {".csv": _csv_rows, ".txt": _documents}
    opened, failures = _opener(path, shown)
    try:
        with opened() as file:
            yield from readers.get(kind, _json_rows)(file, shown)
    except failures as error:
        raise UserError(f"{shown} is damaged: it cannot be unpacked ({error}); make or copy it again") from error


def open_rows(file: BinaryIO, kind: str, shown: str) -> Iterator[Row]:
    """The rows of a json, jsonl or parquet file that is open, such as one on another machine.

    Args:
        kind: its ending.
        shown: its name in origins and errors.
    Raises:
        UserError: it is damaged, or a row cannot be read; it names the line.
    """
    return _numbered(parquet_rows(file, shown), shown) if kind == ".parquet" else _json_rows(file, shown)


def _numbered(rows: Iterable[tuple[dict[str, Any], frozenset[str]]], shown: str) -> Iterator[Row]:
    for number, (values, cleaned) in enumerate(rows, start=1):
        yield Row(f"{shown} row {number}", values, cleaned)


def _opener(path: Path, shown: str) -> tuple[Callable[[], BinaryIO], tuple[type[Exception], ...]]:
    """What opens a file for reading its unpacked bytes, and the errors that tell of damage."""
    ending = path.suffix.lower()
    if ending == ".gz":
        return lambda: gzip.open(path, "rb"), (gzip.BadGzipFile, EOFError, zlib.error)
    if ending == ".zst":
        try:
            zstandard = importlib.import_module("zstandard")
        except ImportError as error:
            raise UserError(f"{shown!r} needs zstandard, which is not installed; `pip install zstandard`") from error
        decompressor = zstandard.ZstdDecompressor()
        return lambda: io.BufferedReader(_Frames(open(path, "rb"), decompressor.decompressobj), CHUNK), (
            zstandard.ZstdError,
            EOFError,
        )
    return lambda: open(path, "rb"), ()


class _Frames(io.RawIOBase):
    """The unpacked bytes of zstd frames that stand one after the other; the library's own reader takes the end of the
    file for the end of a frame, so that rows which were cut off would be missed by nobody.

    Raises:
        EOFError: the file ends within a frame.
    """

    def __init__(self, file: BinaryIO, frame: Callable[[], Any]) -> None:
        """
        Args:
            frame: makes what unpacks one frame: zstandard's `decompressobj`.
        """
        self.file, self.new_frame = file, frame
        self.frame, self.packed, self.unpacked = frame(), b"", b""

    def readable(self) -> bool:
        """It can be read, and nothing else."""
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Fill `buffer` with the next bytes, and return their number; 0 at the end."""
        while not self.unpacked:
            self.packed = self.packed or self.file.read(io.DEFAULT_BUFFER_SIZE)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self.frame = self.frame or self.new_frame()
            self.unpacked, self.packed = self.frame.decompress(self.packed), b""
            if self.frame.eof:
                self.packed, self.frame = self.frame.unused_data, None
        given = self.unpacked[: len(buffer)]
        buffer[: len(given)] = given
        self.unpacked = self.unpacked[len(given) :]
        return len(given)

    def close(self) -> None:
        """Close the file below too."""
        self.file.close()
        super().close()


def shorten(text: str, limit: int = 60) -> str:
    """A text in quotes, without what is beyond `limit` characters."""
    text = text.strip()
    return repr(text if len(text) <= limit else text[:limit] + "...")


def shown_names(names: Iterable[str]) -> str:
    """Names of columns for a message, the first ones where there are many."""
    found = list(names)
    cut = [name if len(name) <= 60 else name[:60] + "..." for name in found[:30]]
    return ", ".join(cut) + (f" and {len(found) - 30} more" if len(found) > 30 else "")


def _text_of(file: BinaryIO) -> io.TextIOWrapper:
    """A file's characters, with line ends as they are."""
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="")


def _refuse_encoding(error: UnicodeDecodeError, shown: str) -> UserError:
    wrong = error.object[error.start : error.end]
    return UserError(f"{shown} is not UTF-8 ({error.reason}, {wrong!r}); save the file as UTF-8")


def _json_rows(file: BinaryIO, shown: str) -> Iterator[Row]:
    if not isinstance(file, io.BufferedReader):
        file = io.BufferedReader(file, CHUNK)
    start = file.peek(64)[:64].removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        try:
            yield from _array_rows(_text_of(file), shown)
        except UnicodeDecodeError as error:
            raise _refuse_encoding(error, shown) from error
        return
    yield from _line_rows(file, shown)


def _line_rows(lines: Iterable[bytes], shown: str) -> Iterator[Row]:
    """Lines end at a line feed only: JSON strings may hold other separators, such as U+2028."""
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{shown} line {number} is not UTF-8 (byte {error.start} of it); save the file as UTF-8"
            ) from error
        if text.isspace():
            continue
        try:
            values = parse_json(text)
        except ValueError as error:
            raise UserError(
                f"{shown} is not JSON at line {number}: {getattr(error, 'msg', error)} in {shorten(text)}; "
                "a file holds an array of objects, or an object a line"
            ) from error
        if not isinstance(values, dict):
            raise UserError(f"{shown} line {number} is {shorten(text)}; each line must be an object")
        yield Row(f"{shown} line {number}", values)


class _Window:
    """The part of a text that is read but not used yet, and the place in the file where it begins."""

    def __init__(self, file: io.TextIOWrapper, shown: str) -> None:
        self.file, self.shown = file, shown
        self.text, self.at = file.read(CHUNK), 0
        self.line, self.column = 1, 1

    def more(self) -> bool:
        """Drop what is used and read on, at least as much again as is held; False at the end of the file."""
        used, self.text = self.text[: self.at], self.text[self.at :]
        self.line += used.count("\n")
        self.column = len(used) - used.rfind("\n") if "\n" in used else self.column + len(used)
        self.at = 0
        read = self.file.read(max(CHUNK, len(self.text)))
        self.text += read
        return bool(read)

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        self.at = _SPACE.match(self.text, self.at).end()
        while self.at == len(self.text):
            if not self.more():
                return ""
            self.at = _SPACE.match(self.text, self.at).end()
        return self.text[self.at]

    def value(self) -> Any:
        """The next JSON value."""
        decoder = json.JSONDecoder()
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # A string that goes on, or a token cut by the window's end, may be whole once more is read.
                cut = error.msg.startswith("Unterminated") or error.pos + 16 > len(self.text)
                distance = error.pos - self.at
                if not (cut and self.more()):
                    self.refuse(error.msg, self.at + distance if cut else error.pos)
                continue
            except (ValueError, RecursionError) as error:  # an integer of thousands of digits; nested too deeply
                self.refuse(str(error), self.at)
            self.at = end
            return value

    def refuse(self, message: str, position: int) -> NoReturn:
        self.text += self.file.read(100)  # for the reader of the message
        line = self.line + self.text.count("\n", 0, position)
        start = self.text.rfind("\n", 0, position)
        column = position - start if start >= 0 else self.column + position
        shown = self.text[start + 1 :][:200].split("\n")[0]
        raise UserError(f"{self.shown} is not JSON at line {line}, column {column}: {message} in {shorten(shown)}")


def _array_rows(text: io.TextIOWrapper, shown: str) -> Iterator[Row]:
    """The objects of a JSON array, without holding the whole of it."""
    window = _Window(text, shown)
    window.at = window.text.index("[") + 1
    number = 0
    while (sign := window.peek()) != "]":
        if number:
            if sign != ",":
                window.refuse("Expecting ',' delimiter", window.at)
            window.at += 1
            window.peek()
        number += 1
        value = window.value()
        if not isinstance(value, dict):
            raise UserError(
                f"{shown} row {number} is {shorten(json.dumps(value))}; each item of the array must be an object"
            )
        yield Row(f"{shown} row {number}", value)
    window.at += 1
    if window.peek():
        window.refuse("Extra data", window.at)


def _csv_rows(file: BinaryIO, shown: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # the module's limit of 131,072 characters would cut long documents off
    lines = csv.reader(_text_of(file), strict=True)
    try:
        header = next(lines, [])
        if len(set(header)) < len(header):
            raise UserError(f"{shown} names a column twice: {shown_names(header)}; rename one of them")
        number = 0
        for values in lines:
            if not values:
                continue
            if len(values) != len(header):
                raise UserError(
                    f"{shown} cannot be read as csv: line {lines.line_num} ends a row of {len(values)} values, and "
                    f"the first line names {len(header)} columns; quote values that hold a comma"
                )
            number += 1
            yield Row(f"{shown} row {number}", dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise UserError(f"{shown} cannot be read as csv: line {lines.line_num}: {error}") from error
    except UnicodeDecodeError as error:
        raise _refuse_encoding(error, shown) from error


def _documents(file: BinaryIO, shown: str) -> Iterator[Row]:
    """One document at a time; those of white space alone are not counted."""
    number, lines = 0, []
    try:
        for line in _lines_and_end(_text_of(file)):
            if line is not None and line.strip() != DOCUMENT_SEPARATOR:
                lines.append(line)
                continue
            document, lines = "".join(lines).strip("\n"), []
            if document.strip():
                number += 1
                yield Row(f"{shown} document {number}", {"text": document})
    except UnicodeDecodeError as error:
        raise _refuse_encoding(error, shown) from error


def _lines_and_end(text: io.TextIOWrapper) -> Iterator[str | None]:
    """Lines with line feeds for their ends, then None."""
    for line in text:
        yield line[:-2] + "\n" if line.endswith("\r\n") else line
    yield None
