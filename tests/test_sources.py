"""Files and folders as rows, and what is said of those that cannot be read."""

import json

import datasets
import pytest

from config.schema import SourceConfig
from src.sources import open_source
from tests.toy_tokenizer import shared_file
from utils.errors import UserError

NESTED = [
    {"messages": [{"role": "user", "content": "a\u2028b"}], "tools": [{"x": {"deep": [1, None]}}, {"y": "z"}]},
    {"messages": [{"role": "user", "content": "ä 😀", "extra": 1.5}]},
]


def read(path, **fields):
    return open_source(SourceConfig(path=str(path), **fields), "data.train.0")


def values(found):
    return [row.values for row in found.rows]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.json", json.dumps(NESTED, indent=1)),
        ("rows.json", "\ufeff" + json.dumps(NESTED)),
        ("lines.json", "\n".join(json.dumps(row) for row in NESTED)),
        ("rows.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in NESTED) + "\n"),
    ],
)
def test_json_keeps_nested_values_exactly(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = read(tmp_path / name)
    assert values(found) == NESTED
    assert found.columns == ("messages", "tools")


def test_origins_count_lines_of_the_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert [row.origin.rsplit("/")[-1] for row in read(tmp_path / "rows.jsonl").rows] == [
        "rows.jsonl line 1",
        "rows.jsonl line 3",
    ]


def test_csv_values_are_text(tmp_path):
    (tmp_path / "rows.csv").write_text('prompt,completion\n1,"a, ""b""\nc"\nNA,\n')
    assert values(read(tmp_path / "rows.csv")) == [
        {"prompt": "1", "completion": 'a, "b"\nc'},
        {"prompt": "NA", "completion": ""},
    ]


def test_parquet_and_a_folder_of_files_give_the_rows_written(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set" / "train.parquet")
    assert values(read(tmp_path / "set" / "train.parquet")) == rows
    folder = read(tmp_path / "set", max_rows=1)
    assert values(folder) == rows[:1]
    assert list(folder.sha256) == [str(tmp_path / "set" / "train.parquet")]


def test_a_text_file_is_one_document_unless_separators_part_it(tmp_path):
    (tmp_path / "one.txt").write_text("First.\n\nStill the first.\n")
    (tmp_path / "two.txt").write_text("First.\n\nStill.\n<|endoftext|>\n\nSecond.\n<|endoftext|>\n")
    assert values(read(tmp_path / "one.txt")) == [{"text": "First.\n\nStill the first."}]
    assert values(read(tmp_path / "two.txt")) == [{"text": "First.\n\nStill."}, {"text": "Second."}]
    assert len(read(shared_file("datasets/tinystories/tinystories_sample.txt")).rows) == 5


def test_a_glob_reads_its_files_in_the_order_of_their_names(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n')
    found = read(tmp_path / "*.jsonl")
    assert values(found) == [{"text": "a"}, {"text": "b"}]
    assert [row.origin for row in found] == [f"{tmp_path / name}.jsonl line 1" for name in "ab"]
    assert list(found.sha256) == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert len(read(tmp_path / "*.jsonl", max_rows=1).rows) == 1
    with pytest.raises(UserError, match=r"x\*\.jsonl' fits no file"):
        read(tmp_path / "x*.jsonl")
    (tmp_path / "c.csv").write_text("text\nc\n")
    with pytest.raises(UserError, match=r"has files of types \.csv, \.json; give a glob"):
        read(tmp_path / "*")


def test_a_folder_gives_the_files_of_its_split(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("data/train-00", "data/train-01", "data/test-00"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / ".hidden.jsonl").write_text("oops")
    assert values(read(tmp_path)) == [{"text": "data/train-00"}, {"text": "data/train-01"}]
    assert values(read(tmp_path, split="test")) == [{"text": "data/test-00"}]
    with pytest.raises(UserError, match=r"split='validation' is none that .* say: test, train"):
        read(tmp_path, split="validation")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"is a folder without data files"):
        read(tmp_path / "empty")


def test_a_source_is_read_from_the_start_each_time_and_in_batches(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(2500)))
    found = read(tmp_path / "a.jsonl", columns={"m": "n"})
    assert len(found.head) == 1000
    assert [len(batch) for batch in found.batches(1024)] == [1024, 1024, 452]
    assert values(found) == values(found) == [{"m": n} for n in range(2500)]


def test_max_rows_takes_the_first_rows(tmp_path):
    rows = [{"text": str(n)} for n in range(5)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nnot JSON")
    (tmp_path / "c.csv").write_text("text\n" + "\n".join("01234"))
    for name in ("a.json", "b.jsonl", "c.csv"):
        assert values(read(tmp_path / name, max_rows=2)) == rows[:2]


def test_columns_are_renamed_and_may_take_the_place_of_others(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "prompt": "old", "id": 1}\n')
    assert values(read(tmp_path / "rows.jsonl", columns={"prompt": "question"})) == [{"prompt": "q", "id": 1}]


def test_columns_can_be_swapped(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1, "b": 2}\n')
    assert values(read(tmp_path / "rows.jsonl", columns={"a": "b", "b": "a"})) == [{"a": 2, "b": 1}]


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    with pytest.raises(
        UserError, match=r"data\.train\.0\.columns: prompt: 'quest' is no column of it; it has question, answer"
    ):
        read(tmp_path / "rows.jsonl", columns={"prompt": "quest"})


def test_a_missing_file_is_told_with_near_names(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"trian\.jsonl' does not exist; its folder has train\.jsonl"):
        read(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match=r"does not exist, nor does its folder"):
        read(tmp_path / "no" / "train.jsonl")


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.csv", "x.txt", "x.parquet"])
def test_an_empty_file_is_told(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"x\.\w+' is empty \(0 bytes\)"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"), [("x.json", "[]"), ("x.jsonl", "\n\n"), ("x.csv", "a,b\n"), ("x.txt", "\n \n")]
)
def test_a_file_without_rows_is_told(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"has no rows"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", '{"a": 1}\n{"a": 2}\n{"a": 3,}\n', r"not JSON at line 3: .* in '\{\"a\": 3,\}'; a file holds"),
        ("x.jsonl", '{"a": "' + "b" * 200 + "\n", r"not JSON at line 1: .*bbbb\.\.\.'"),
        ("x.json", '[\n{"a": 1},\n{"a": oops}\n]', r"not JSON at line 3, column 7: .* in '\{\"a\": oops\}'"),
        ("x.jsonl", '{"a": 1}\n5\n', r"x\.jsonl line 2 is '5'; each line must be an object"),
        ("x.json", '[{"a": 1}, ["b"]]', r"x\.json row 2 is .*must be an object"),
        ("x.csv", "a,b\n1,2,3\n1,2,3,4\n", r"cannot be read as csv"),
        ("x.parquet", "no parquet", r"cannot be read as parquet"),
        ("x.xml", "<a/>", r"ends in '\.xml'; use one of \.json, \.jsonl, \.csv, \.parquet, \.txt"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_with_its_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(UserError, match=r"x\.jsonl line 2 is not UTF-8 \(byte 7 of it\)"):
        read(tmp_path / "x.jsonl")


def test_a_hub_data_set_that_cannot_be_had_is_told():
    with pytest.raises(UserError, match=r"path='nobody/nothing' is no local file, and loading it as a data set failed"):
        open_source(SourceConfig(path="nobody/nothing"), "data.train.0")
