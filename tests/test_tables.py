"""Arrow tables: what entered as JSON comes out as that JSON, and padding is taken out and told."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from config.schema import SourceConfig
from src.formats import row_converter
from src.sources import open_source
from utils.errors import UserError

CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Oslo"}}}
PADDED = [
    {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"city": {"type": "string"}}}}],
    },
    {
        "messages": [{"role": "user", "content": "cold?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        "tools": [{"type": "function", "function": {"name": "g", "parameters": {"days": {"enum": [1, None]}}}}],
    },
]
"""Rows whose keys differ, so that Arrow pads them."""


def read(path, **fields):
    return open_source(SourceConfig(path=str(path), **fields), "data.train.0")


def padded_table():
    table = datasets.Dataset.from_list(PADDED)
    assert table[0]["tools"][0]["function"]["parameters"]["days"] is None, "Arrow pads no more"
    return table


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "arrow file", "saved"])
def test_padding_is_taken_out_of_tables_and_counted(tmp_path, kind, caplog):
    table, path = padded_table(), tmp_path / "rows.arrow"
    if kind == "parquet":
        path = tmp_path / "rows.parquet"
        table.to_parquet(path)
    elif kind == "saved":
        path = tmp_path / "saved"
        table.save_to_disk(path)
    else:
        writer = pyarrow.ipc.new_stream if kind == "arrow stream" else pyarrow.ipc.new_file
        plain = table.data.table
        with pyarrow.OSFile(str(path), "wb") as file, writer(file, plain.schema) as sink:
            sink.write_table(plain)
    found = read(path)
    assert [row.values for row in found] == PADDED
    assert f"{path}: 2 rows held keys without a value" in caplog.text
    assert [row_converter(found)(row).tools for row in found] == [tuple(row["tools"]) for row in PADDED]


def test_rows_that_no_other_rows_pad_are_not_told(tmp_path, caplog):
    rows = [{"messages": PADDED[0]["messages"], "id": None}, {"messages": PADDED[0]["messages"], "id": "1"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert [row.values for row in read(tmp_path / "rows.parquet")] == rows
    assert "without a value" not in caplog.text


def test_a_key_that_is_null_in_every_row_stays(tmp_path):
    rows = [{"tools": [{"name": "f", "default": None}]}, {"tools": [{"name": "g", "default": None}]}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert [row.values for row in read(tmp_path / "rows.parquet")] == rows


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_json_is_never_padded(tmp_path, ending, caplog):
    text = json.dumps(PADDED) if ending == "json" else "\n".join(map(json.dumps, PADDED))
    (tmp_path / f"rows.{ending}").write_text(text)
    assert [row.values for row in read(tmp_path / f"rows.{ending}")] == PADDED
    assert "without a value" not in caplog.text


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_json_columns_of_the_datasets_library_come_out_as_json(tmp_path, kind, caplog):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, PADDED)))
    table = datasets.load_dataset(
        "json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert "Json" in str(table.features)
    path = tmp_path / ("rows.parquet" if kind == "parquet" else "saved")
    table.to_parquet(path) if kind == "parquet" else table.save_to_disk(path)
    assert [row.values for row in read(path)] == PADDED
    assert "without a value" not in caplog.text


def test_a_split_of_a_saved_dictionary_is_taken_by_name(tmp_path):
    table = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict({"train": table, "held": table.map(lambda row: {"text": "b"})}).save_to_disk(tmp_path / "s")
    assert [row.values for row in read(tmp_path / "s", split="held")] == [{"text": "b"}]
    with pytest.raises(UserError, match=r"data\.train\.0\.split='test' is no split of .*; it has train, held"):
        read(tmp_path / "s", split="test")


def test_rows_of_many_batches_keep_their_order_and_numbers(tmp_path):
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [str(n) for n in range(2500)]}), tmp_path / "a.parquet", row_group_size=700
    )
    found = list(read(tmp_path / "a.parquet"))
    assert [row.values["text"] for row in found] == [str(n) for n in range(2500)]
    assert found[-1].origin.endswith("a.parquet row 2500")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_damaged_table_is_told(tmp_path, name):
    (tmp_path / name).write_bytes(b"no table at all")
    with pytest.raises(UserError, match=rf"{name} cannot be read as {name[2:]}"):
        read(tmp_path / name)
    if name == "a.parquet":
        (tmp_path / "a.parquet.gz").write_bytes(b"x")
        with pytest.raises(UserError, match=r"compressed from outside"):
            read(tmp_path / "a.parquet.gz")
