"""What was not used for the longest time makes way, and never what a process uses."""

import dataclasses
import os
import subprocess
import sys
import threading

import pytest

import src.eviction
from config.schema import DataConfig
from src.cache import IN_USE, cache_key, prepared
from src.data import build_datasets
from src.eviction import GIB, keep_within
from src.sources import open_source
from tests.test_cache import ROOT, write
from tests.toy_tokenizer import toy_tokenizer


def entry(cache, number, size=100, used=None):
    """A prepared folder of `size` bytes that was used last at second `used`; None: never, as it seems."""
    folder = cache / f"{number:032x}"
    (folder / "source-000").mkdir(parents=True)
    (folder / "source-000" / "rows").write_bytes(b"x" * size)
    if used is not None:
        (folder / IN_USE).touch()
        os.utime(folder / IN_USE, (used, used))
    return folder


def left(cache):
    return {int(path.name, 16) for path in cache.iterdir()}


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(None, {1, 2, 3, 4}), (400, {1, 2, 3, 4}), (399, {1, 2, 3}), (299, {1, 3}), (100, {3}), (1, {3})],
)
def test_the_least_recently_used_go_first_and_this_run_s_own_stays(tmp_path, limit, expected):
    for number, used in {1: 3000, 2: 1000, 3: 2000, 4: None}.items():
        entry(tmp_path, number, used=used)
    keep_within(tmp_path, limit and limit / GIB, keep=tmp_path / f"{3:032x}")
    assert left(tmp_path) == expected


def test_what_is_no_entry_stays(tmp_path):
    entry(tmp_path, 1)
    others = [tmp_path / name for name in ("digests.json", "rows", "f" * 31, "g" * 32, "f" * 33)]
    for other in others[1:]:
        other.mkdir()
        (other / "mine").write_bytes(b"x" * 1000)
    others[0].write_text("{}")
    keep_within(tmp_path, 1 / GIB, keep=tmp_path / "none")
    assert set(tmp_path.iterdir()) == set(others)
    assert all((other / "mine").is_file() for other in others[1:])


def test_what_a_killed_process_was_removing_goes(tmp_path):
    rest = tmp_path / f"{src.eviction.REMOVED}{1:032x}-1"
    (rest / "source-000").mkdir(parents=True)
    keep_within(tmp_path, None, keep=tmp_path / "none")
    assert not rest.exists()


USE = """
import sys
from pathlib import Path
from src.cache import prepared
use = prepared(Path(sys.argv[1]), lambda folder: (folder / "rows").write_bytes(b"x" * 100))
print("ready", flush=True)
sys.stdin.readline()
"""


def test_what_another_process_uses_or_prepares_stays_until_that_ends(tmp_path, caplog):
    reading = tmp_path / f"{1:032x}"
    child = subprocess.Popen(
        [sys.executable, "-c", USE, str(reading)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "ready\n"
    begun, end = threading.Event(), threading.Event()

    def prepare(folder):
        (folder / "rows").write_bytes(b"x" * 100)
        begun.set()
        end.wait()

    preparing = threading.Thread(target=lambda: prepared(tmp_path / f"{2:032x}", prepare).release())
    preparing.start()
    begun.wait()
    entry(tmp_path, 3)
    with caplog.at_level("INFO", "smolfactory"):
        keep_within(tmp_path, 1 / GIB, keep=tmp_path / "none")
    assert left(tmp_path) == {1, 2}
    assert "removed 1 prepared data sets" in caplog.text
    assert "above data.cache_gib=" in caplog.text
    end.set()
    preparing.join()
    child.communicate("\n")
    keep_within(tmp_path, 1 / GIB, keep=tmp_path / "none")
    assert left(tmp_path) == set()


def test_a_run_removes_what_earlier_ones_left_and_prepares_again_what_was_removed(tmp_path):
    config = DataConfig(train=(write(tmp_path / "a.jsonl", 60),), max_length=64, cache_gib=1 / GIB)
    cache, tokenizer = tmp_path / "cache", toy_tokenizer()
    keys, first = [], None
    for length in (64, 65, 64):
        changed = dataclasses.replace(config, max_length=length)
        data = build_datasets(changed, tokenizer, cache_folder=cache)
        keys.append(cache_key(changed, tokenizer, [open_source(changed.train[0], "data.train.0")]))
        assert [path.name for path in cache.iterdir() if path.is_dir()] == [keys[-1]]
        first = first or data.train[:]
        assert data.train[:] == first
        del data
    assert keys[0] == keys[2] != keys[1]


def test_rows_that_are_read_stay_while_another_run_prepares(tmp_path):
    config = DataConfig(train=(write(tmp_path / "a.jsonl", 60),), max_length=64, cache_gib=1 / GIB)
    cache, tokenizer = tmp_path / "cache", toy_tokenizer()
    reading = build_datasets(config, tokenizer, cache_folder=cache)
    build_datasets(dataclasses.replace(config, max_length=65), tokenizer, cache_folder=cache)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2
    assert len(reading.train[:]["input_ids"]) == 60
    del reading
    build_datasets(dataclasses.replace(config, max_length=66), tokenizer, cache_folder=cache)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


RACE = """
import sys
from pathlib import Path
from src.cache import prepared
from src.eviction import keep_within

cache, made = Path(sys.argv[1]), 0
def prepare(folder):
    global made
    made += 1
    (folder / "rows").write_bytes(b"x" * 100)
for turn in range(int(sys.argv[2])):
    entry = cache / f"{turn % 3:032x}"
    with prepared(entry, prepare):
        keep_within(cache, 150 / 2**30, keep=entry)
        assert (entry / "rows").read_bytes() == b"x" * 100
        assert (entry / "complete.json").is_file()
print(made)
"""


def test_processes_that_prepare_and_remove_the_same_entries_never_read_half_of_one(tmp_path):
    command = [sys.executable, "-c", RACE, str(tmp_path), "30"]
    children = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    made = []
    for child in children:
        out, errors = child.communicate()
        assert child.returncode == 0, errors
        made.append(int(out))
    assert sum(made) > 3, "nothing was ever removed under another's hands"
