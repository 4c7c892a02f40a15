"""Readers of data: files, tables, rows, and rows through chat templates and the tokenizer."""

import contextlib
import functools
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from config.schema import DataConfig, SourceConfig
from src.contract import ContractError
from src.data import build_datasets
from src.formats import RowConverter, TextRow, row_converter
from src.preparation import _hashed
from src.refusal import Refusal
from src.sources import SourceRows, open_source
from src.tokenization import RowEncoder
from tests.fuzz.reader import Reader
from tests.fuzz.rows import row_files, row_lists
from tests.toy_tokenizer import CHATML, FAMILIES, SHARED, toy_tokenizer
from utils.errors import UserError

CHAT = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello 日本"}], "tools": None},
    {
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": [{"type": "text", "text": "what is 1+1?"}]},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": 2.5}}}],
            },
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "two", "reasoning_content": "one and one", "train": True},
        ],
        "tools": [{"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}],
    },
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": CHAT,
    "sharegpt": [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            ]
        },
    ],
    "alpaca": [{"instruction": "add", "input": "1 1", "output": "2", "history": [["a", "b"]]}],
    "prompt": [{"prompt": "a", "completion": "b"}, {"prompt": [{"role": "user", "content": "x"}], "completion": "y"}],
    "question": [{"question": "a", "answer": "b", "system": None}],
    "text": [{"text": "one text"}, {"text": "another\nwith lines"}],
    "ids": [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5]}],
}


def _source(folder: Path) -> SourceRows:
    """The one thing in a folder, open: its file, or the folder itself where it is a saved data set."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    path = folder if (folder / "state.json").is_file() or not files else files[0]
    return open_source(SourceConfig(path=str(path)), "data.train.0")


def read_rows(folder: Path) -> None:
    """Read every row, and turn each into a sample of the format that is told from the columns."""
    found = _source(folder)
    convert: RowConverter | None = None
    told: UserError | None = None
    try:
        convert = row_converter(found)
    except UserError as error:
        told = error
    for row in found:
        if convert:
            _hashed(convert.checked(row))
    if told:
        raise told


@functools.cache
def _encoders() -> tuple[RowEncoder, ...]:
    """Encoders with templates that write texts as they are, trim them, and write calls as JSON."""
    encoders = [RowEncoder.of(toy_tokenizer(CHATML))]
    for name in ("Qwen-Qwen3-0.6B", "meta-llama-Llama-3.1-8B-Instruct"):
        path = SHARED / "chat_templates" / f"{name}.jinja"
        if path.is_file():
            bos, eos, special = FAMILIES[name]
            encoders.append(RowEncoder.of(toy_tokenizer(path.read_text("utf-8"), bos=bos, eos=eos, special=special)))
    return tuple(encoders)


def encode_rows(folder: Path) -> None:
    """Read rows, and take each through templates and tokenizers, as a run does."""
    found = _source(folder)
    convert = row_converter(found)
    samples = [_hashed(convert.checked(row))[0] for row in found]
    kept = [sample for sample in samples if not isinstance(sample, Refusal)]
    if convert.format == "tokenized":
        return
    for encoder in _encoders():
        if convert.format == "text":
            texts = [sample for sample in kept if isinstance(sample, TextRow)]
            assert len(encoder.encode_texts(texts, 16)) >= len(texts)
        else:
            rows = encoder.encode_conversations(kept)
            assert {row.origin for row in rows} == {sample.origin for sample in kept}, "a row went unseen"


def build(folder: Path) -> None:
    """The whole pipeline, onto the disk and back."""
    config = DataConfig(train=(SourceConfig(path=str(folder / "rows.jsonl")),), max_length=256)
    data = build_datasets(config, _encoders()[0].tokenizer, context_length=256)
    assert all(len(row["input_ids"]) == len(row["labels"]) for row in data.train)


def render(folder: Path) -> None:
    """Look at a chat template as a run does, and take conversations through it."""
    text = (folder / "template.jinja").read_text("utf-8", "surrogateescape")
    encoder = RowEncoder.of(toy_tokenizer(text, bos="<s>", eos="<|im_end|>"))
    samples = [RowConverter("messages", "messages")(row) for row in _rows_of(CHAT)]
    encoder.encode_conversations(samples)
    template = encoder.template
    for sample in samples:
        template.follows_clock(sample)
        with contextlib.suppress(ContractError):
            template.render_each([sample], generation_prompt=True)


def _rows_of(rows: list[dict[str, Any]]) -> Iterator[Any]:
    from src.files import Row

    for number, values in enumerate(rows, start=1):
        yield Row(f"line {number}", json.loads(json.dumps(values)))


def _written(
    folder: Path, write: Callable[[Path, list[dict[str, Any]]], None], names: tuple[str, ...] = tuple(ROWS)
) -> None:
    for name in names:
        (folder / name).mkdir()
        write(folder / name, ROWS[name])


def _lines(place: Path, rows: list[dict[str, Any]]) -> None:
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _array(place: Path, rows: list[dict[str, Any]]) -> None:
    (place / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _csv(place: Path, rows: list[dict[str, Any]]) -> None:
    import csv

    with open(place / "rows.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _txt(place: Path, rows: list[dict[str, Any]]) -> None:
    text = "\n<|endoftext|>\n".join(str(row) for row in rows)
    (place / "rows.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())


def _gz(place: Path, rows: list[dict[str, Any]]) -> None:
    (place / "rows.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0)
    )


def _zst(place: Path, rows: list[dict[str, Any]]) -> None:
    import zstandard

    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (place / "rows.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(text))


def _table(rows: list[dict[str, Any]]) -> pyarrow.Table:
    return pyarrow.Table.from_pylist(rows)


TABLES = ("sharegpt", "alpaca", "question", "text", "ids")


def _parquet(place: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(_table(rows), place / "rows.parquet")


def _arrow(place: Path, rows: list[dict[str, Any]], *, indexed: bool) -> None:
    table = _table(rows)
    make = pyarrow.ipc.new_file if indexed else pyarrow.ipc.new_stream
    with make(str(place / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)


def _saved(place: Path, rows: list[dict[str, Any]]) -> None:
    import datasets

    datasets.Dataset(_table(rows)).save_to_disk(str(place))


def _templates(folder: Path) -> None:
    sources = [
        *sorted((SHARED / "chat_templates").glob("*.jinja")),
        *sorted(Path("config/chat_templates").glob("*.jinja")),
    ]
    for path in sources:
        (folder / path.stem).mkdir()
        (folder / path.stem / "template.jinja").write_bytes(path.read_bytes())


def _seeds(
    write: Callable[[Path, list[dict[str, Any]]], None], names: tuple[str, ...] = tuple(ROWS)
) -> Callable[[Path], None]:
    return functools.partial(_written, write=write, names=names)


def _row_tables(number: int) -> Iterator[dict[str, bytes]]:
    """Parquet files of odd rows, as far as Arrow takes them."""
    for rows in row_lists(number):
        out = pyarrow.BufferOutputStream()
        try:
            table = _table([row if isinstance(row, dict) else {"text": row} for row in rows])
            pyarrow.parquet.write_table(table, out)
        except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError):
            out = pyarrow.BufferOutputStream()
            pyarrow.parquet.write_table(_table(ROWS["alpaca"]), out)
        yield {"rows.parquet": out.getvalue().to_pybytes()}


READERS = (
    Reader("jsonl", _seeds(_lines), read_rows, 200, makes=row_files),
    Reader("json array", _seeds(_array), read_rows, 120),
    Reader("csv", _seeds(_csv, ("alpaca", "question", "text")), read_rows, 120),
    Reader("txt", _seeds(_txt), read_rows, 30),
    Reader("jsonl.gz", _seeds(_gz), read_rows, 60),
    Reader("jsonl.zst", _seeds(_zst), read_rows, 60),
    Reader("parquet", _seeds(_parquet, TABLES), read_rows, 50, makes=_row_tables),
    Reader("arrow stream", _seeds(functools.partial(_arrow, indexed=False), TABLES), read_rows, 50),
    Reader("arrow file", _seeds(functools.partial(_arrow, indexed=True), TABLES), read_rows, 50),
    Reader("saved data set", _seeds(_saved, TABLES), read_rows, 10),
    Reader("rows to tokens", _seeds(_lines), encode_rows, 30, makes=row_files),
    Reader(
        "rows to a data set", _seeds(_lines, ("alpaca", "prompt", "question", "text", "ids")), build, 3, makes=row_files
    ),
    Reader("chat templates", _templates, render, 20),
)
