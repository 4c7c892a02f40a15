"""Prepared rows are found again only by what they were made of, whole or not at all."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import src.cache
import src.preparation
from config.schema import DataConfig, SourceConfig
from src.cache import cache_key, load_rows, prepared, read_account
from src.data import build_datasets
from src.sources import open_source
from tests.toy_tokenizer import toy_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def write(path, count, answer="yes"):
    rows = [{"prompt": f"question {n}", "completion": f"{answer} {n}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(path=str(path))


def key(config, tokenizer):
    return cache_key(config, tokenizer, [open_source(source, "data.train") for source in config.train])


CHANGES = {
    "max_length": 65,
    "too_long": "truncate",
    "supervise": "all",
    "eval_fraction": 0.5,
    "template_date": "2025-01-01",
    "unlike_served": "drop",
    "allow_special_tokens_in_content": True,
    "seed": 7,
}


def test_every_field_that_changes_rows_changes_the_key(tmp_path):
    config, tokenizer = DataConfig(train=(write(tmp_path / "a.jsonl", 3),), max_length=64), toy_tokenizer()
    first = key(config, tokenizer)
    assert key(config, toy_tokenizer()) == first
    for name, value in {"workers": 2, "cache_folder": "elsewhere", "packing": False}.items():
        assert key(dataclasses.replace(config, **{name: value}), tokenizer) == first
    changed = [key(dataclasses.replace(config, **{name: value}), tokenizer) for name, value in CHANGES.items()]
    changed.append(key(dataclasses.replace(config, eval=config.train), tokenizer))
    assert len({first, *changed}) == len(CHANGES) + 2
    untouched = {"train", "workers", "cache_folder", "packing"}
    assert {field.name for field in dataclasses.fields(DataConfig)} <= {*CHANGES, "eval", *untouched}


def test_rows_tokenizer_template_and_code_change_the_key(tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", 3)
    config = DataConfig(train=(source,), max_length=64)
    keys = {key(config, toy_tokenizer())}
    keys.add(key(config, toy_tokenizer(merges_from="xyz")))
    tokenizer = toy_tokenizer()
    tokenizer.chat_template += " "
    keys.add(key(config, tokenizer))
    tokenizer = toy_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    keys.add(key(config, tokenizer))
    limited = dataclasses.replace(source, max_rows=2)
    keys.add(key(dataclasses.replace(config, train=(limited,)), toy_tokenizer()))
    monkeypatch.setattr(src.cache, "_code_sha256", lambda: "other code")
    keys.add(key(config, toy_tokenizer()))
    monkeypatch.undo()
    write(tmp_path / "a.jsonl", 3, answer="no")
    keys.add(key(config, toy_tokenizer()))
    assert len(keys) == 7


def test_the_key_knows_the_code_of_every_stage(tmp_path):
    for name in ("data", "sources", "files", "formats", "chat", "alignment", "tokenization", "preparation"):
        assert f"src.{name}" in src.cache.stages()
    assert "utils.files" in src.cache.stages()
    assert not any(name.startswith(("tests", "scripts")) for name in src.cache.stages())


def test_a_rerun_finds_the_same_rows_without_tokenizing(tmp_path, monkeypatch, caplog):
    config = DataConfig(train=(write(tmp_path / "a.jsonl", 60),), eval_fraction=0.3, max_length=64)
    first = build_datasets(config, toy_tokenizer(), cache_folder=tmp_path / "cache")

    def refuse(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(src.preparation, "_encode", refuse)
    again = build_datasets(config, toy_tokenizer(), cache_folder=tmp_path / "cache")
    assert again.train[:] == first.train[:]
    assert again.eval[:] == first.eval[:]
    assert again.eval_conversations == first.eval_conversations
    assert again.report == first.report


def test_a_damaged_shard_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(src.preparation, "SHARD_ROWS", 1000)
    config = DataConfig(train=(write(tmp_path / "a.jsonl", 2500),), max_length=64)
    first = build_datasets(config, toy_tokenizer(), cache_folder=tmp_path / "cache").train[:]
    shards = sorted((tmp_path / "cache").glob("*/source-000/shard-*"))
    assert [read_account(shard)["rows_read"] for shard in shards] == [1000, 1000, 500]
    kept = (shards[0] / "train.arrow").stat().st_mtime_ns
    with open(shards[1] / "train.arrow", "r+b") as file:
        file.truncate(100)
    assert read_account(shards[1]) is None
    again = build_datasets(config, toy_tokenizer(), cache_folder=tmp_path / "cache")
    assert again.train[:] == first
    assert (shards[0] / "train.arrow").stat().st_mtime_ns == kept


def test_a_shard_without_its_account_does_not_exist(tmp_path):
    assert read_account(tmp_path / "nowhere") is None
    (tmp_path / "account.json").write_text('{"bytes": {"train')
    assert read_account(tmp_path) is None
    assert load_rows([tmp_path], "train") is None


def test_one_prepares_while_the_others_wait(tmp_path):
    made, lock = [], threading.Barrier(3)

    def prepare(folder):
        made.append(folder)
        time.sleep(0.5)
        (folder / "rows").write_text("whole")

    def launch():
        lock.wait()
        found.append((prepared(tmp_path / "k", prepare) / "rows").read_text())

    found: list[str] = []
    threads = [threading.Thread(target=launch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert found == ["whole"] * 3


KILLED = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import src.preparation
from config.schema import DataConfig, SourceConfig
from src.data import build_datasets
from pathlib import Path
from tests.toy_tokenizer import toy_tokenizer

src.preparation.SHARD_ROWS = 1000
encode = src.preparation._encode
def slowly(*given):
    time.sleep(float(sys.argv[4]))
    return encode(*given)
src.preparation._encode = slowly
config = DataConfig(train=(SourceConfig(path=sys.argv[2]),), max_length=64)
data = build_datasets(config, toy_tokenizer(), cache_folder=Path(sys.argv[3]))
print(hash(tuple(map(tuple, data.train["input_ids"]))), data.report["train"]["rows_kept"])
"""


@pytest.mark.slow
def test_a_killed_process_loses_one_shard_at_most(tmp_path):
    write(tmp_path / "a.jsonl", 5500)

    def start(folder, pause):
        command = [sys.executable, "-c", KILLED, str(ROOT), str(tmp_path / "a.jsonl"), str(folder), str(pause)]
        environment = os.environ | {"PYTHONHASHSEED": "0"}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    whole = start(tmp_path / "whole", 0).communicate()[0]
    assert whole.endswith(" 5500\n")
    for shards in (1, 3):
        child = start(tmp_path / "cut", 0.4)
        while len(list((tmp_path / "cut").glob("*/source-000/shard-*"))) < shards and child.poll() is None:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        there = {path: path.stat().st_ino for path in (tmp_path / "cut").glob("*/source-000/shard-*")}
        assert shards <= len(there) < 6
    assert start(tmp_path / "cut", 0).communicate()[0] == whole
    assert all(path.stat().st_ino == number for path, number in there.items())
