"""Data files of every kind, packed or not, read row by row; and what is said of damaged ones."""

import gzip
import itertools
import json
import random
import sys

import pytest

from src import files
from src.files import file_rows
from utils.errors import UserError

ROWS = [{"a": 1, "text": 'quote " and \\ and ]},{[', "n": {"deep": [None, {"x": []}]}}, {"b": "ä\u2028😀"}, {}]


def values(path):
    return [row.values for row in file_rows(path, path.name)]


@pytest.mark.parametrize("indent", [None, 0, 3])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_a_json_array_is_the_same_however_little_is_held(tmp_path, monkeypatch, indent, chunk):
    monkeypatch.setattr(files, "CHUNK", chunk)
    (tmp_path / "a.json").write_text(json.dumps(ROWS * 20, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert values(tmp_path / "a.json") == ROWS * 20


def test_random_json_arrays_read_as_the_json_library_reads_them(tmp_path, monkeypatch):
    rng = random.Random(0)
    letters = '"\\{}[],: \n\t1eé😀'
    monkeypatch.setattr(files, "CHUNK", 11)
    for _ in range(100):
        rows = [{"".join(rng.choices(letters, k=3)): "".join(rng.choices(letters, k=40))} for _ in range(4)]
        text = json.dumps(rows, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        assert values(tmp_path / "a.json") == json.loads(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}', r"line 1, column 10: Expecting ',' delimiter"),
        ('[{"a": 1},\n{"b": "x', r"line 2, column 7: Unterminated string"),
        ('[{"a": 1}\n{"b": 2}]', r"line 2, column 1: Expecting ',' delimiter in '\{\"b\": 2\}\]'"),
        ('[{"a": 1},]', r"line 1, column 11: Expecting value"),
        ('[{"a": 1}] x', r"line 1, column 12: Extra data"),
        ('[\n{"a": 1},\n{"a": oops}\n]', r"line 3, column 7: Expecting value in '\{\"a\": oops\}'"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_a_broken_array_is_told_with_line_and_column(tmp_path, monkeypatch, text, message, chunk):
    monkeypatch.setattr(files, "CHUNK", chunk)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=message):
        values(tmp_path / "a.json")


def test_rows_before_a_broken_line_are_given(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2}\noops\n')
    assert [row.values for row in itertools.islice(file_rows(tmp_path / "a.jsonl", "a"), 2)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_packed_file_gives_the_rows_of_the_plain_one(tmp_path, name, packing):
    content = {
        "a.jsonl": "\n".join(map(json.dumps, ROWS)),
        "a.json": json.dumps(ROWS),
        "a.csv": 'x,y\n1,"a,\r\nb"\n',
        "a.txt": "One.\r\n<|endoftext|>\nTwo.\n",
    }[name].encode()
    (tmp_path / name).write_bytes(content)
    if packing == ".gz":
        packed = gzip.compress(content)
    else:
        packed = pytest.importorskip("zstandard").ZstdCompressor().compress(content)
    (tmp_path / (name + packing)).write_bytes(packed)
    assert values(tmp_path / (name + packing)) == values(tmp_path / name) != []


def test_a_damaged_packed_file_is_told(tmp_path):
    packed = gzip.compress(json.dumps({"a": "b" * 1000}).encode())
    for content in (packed[:-20], b"no gzip at all", packed[:10] + b"\xff" * 30):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.jsonl\.gz is damaged: it cannot be unpacked"):
            values(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("cut", [slice(None, -20), slice(0, 8), slice(3, None)])
def test_a_damaged_zst_file_is_told(tmp_path, cut):
    rows = "".join(json.dumps({"a": random.Random(n).random()}) + "\n" for n in range(5000))
    packed = pytest.importorskip("zstandard").ZstdCompressor().compress(rows.encode())
    (tmp_path / "a.jsonl.zst").write_bytes(packed[cut])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst is damaged: it cannot be unpacked"):
        values(tmp_path / "a.jsonl.zst")


def test_a_zst_file_may_be_of_several_frames_and_one_that_is_cut_is_told(tmp_path):
    packer = pytest.importorskip("zstandard").ZstdCompressor()
    rows = [{"a": "x" * 100_000, "n": n} for n in range(30)]
    frames = [packer.compress((json.dumps(row) + "\n").encode()) for row in rows]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert values(tmp_path / "a.jsonl.zst") == rows
    # Every row of the frames before is whole, and still the file is not.
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames[:20]) + frames[20][:7])
    with pytest.raises(UserError, match="is damaged: it cannot be unpacked"):
        values(tmp_path / "a.jsonl.zst")


def test_zst_without_zstandard_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)  # as where it is not installed
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a\.jsonl\.zst' needs zstandard, which is not installed; `pip install zstand"):
        values(tmp_path / "a.jsonl.zst")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n1,2,3\n", r"line 3 ends a row of 3 values, and the first line names 2 columns"),
        ("a,b\n1\n", r"line 2 ends a row of 1 values"),
        ('a,b\n1,"x\n', r"line 2: unexpected end of data"),
        ("a,a\n1,2\n", r"names a column twice: a, a"),
    ],
)
def test_a_csv_row_that_does_not_fit_its_columns_is_told(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        values(tmp_path / "a.csv")


def test_csv_fields_may_be_long_and_hold_lines(tmp_path):
    long = "x" * 200_000
    (tmp_path / "a.csv").write_text(f'\ufeffa,b\n{long},"1\n2"\n\n,\n', encoding="utf-8")
    assert values(tmp_path / "a.csv") == [{"a": long, "b": "1\n2"}, {"a": "", "b": ""}]


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.txt"])
def test_a_file_that_is_not_utf8_is_told(tmp_path, name):
    (tmp_path / name).write_bytes({"a.json": b'[{"a": "\xff"}]', "a.csv": b"a,b\n1,\xff\n", "a.txt": b"a\xff"}[name])
    with pytest.raises(UserError, match=r"a\.\w+ is not UTF-8 \(.*b'\\xff'\); save the file as UTF-8"):
        values(tmp_path / name)
