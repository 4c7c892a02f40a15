"""Prepared rows are found again only by what they were made of, whole or not at all."""

import dataclasses
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import src.cache
import src.preparation
from config.schema import ContractConfig, DataConfig, SourceConfig
from src.cache import cache_key, load_rows, prepared, read_account
from src.data import build_datasets
from src.formats import row_converter
from src.preparation import OpenSource, Preparation
from src.sources import open_source
from src.tokenization import RowEncoder
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
    for name, value in {
        "workers": 2,
        "cache_folder": "elsewhere",
        "packing": False,
        "contract": ContractConfig(too_long=1.0),
    }.items():
        assert key(dataclasses.replace(config, **{name: value}), tokenizer) == first
    changed = [key(dataclasses.replace(config, **{name: value}), tokenizer) for name, value in CHANGES.items()]
    changed.append(key(dataclasses.replace(config, eval=config.train), tokenizer))
    assert len({first, *changed}) == len(CHANGES) + 2
    untouched = {"train", "workers", "cache_folder", "packing", "contract"}
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


def prepare(config, folder, shard_rows):
    """The shards of a config's training sources, of `shard_rows` rows each."""
    encoder, sources = RowEncoder.of(toy_tokenizer()), [open_source(source, "data.train") for source in config.train]

    def write(place):
        preparation = Preparation(config, encoder, place, shard_rows=shard_rows)
        for index, found in enumerate(sources):
            preparation.write(OpenSource(found, row_converter(found, "auto"), index, "train"))

    return sorted(prepared(folder, write).glob("source-*/shard-*"))


def test_a_damaged_shard_is_made_again(tmp_path):
    config = DataConfig(train=(write(tmp_path / "a.jsonl", 2500),), max_length=64)
    shards = prepare(config, tmp_path / "cache", 1000)
    assert [read_account(shard)["rows_read"] for shard in shards] == [1000, 1000, 500]
    first = load_rows(shards, "train")[:]
    kept = (shards[0] / "train.arrow").stat().st_mtime_ns
    with open(shards[1] / "train.arrow", "r+b") as file:
        file.truncate(100)
    assert read_account(shards[1]) is None
    assert prepare(config, tmp_path / "cache", 1000) == shards
    assert load_rows(shards, "train")[:] == first
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
import json, os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from config.schema import DataConfig, SourceConfig
from tests.test_cache import prepare

config = DataConfig(train=(SourceConfig(path=sys.argv[2]),), max_length=64, eval_fraction=0.2)
started = time.perf_counter()
shards = prepare(config, Path(sys.argv[3]) / "whole", 500)
seconds = time.perf_counter() - started
cut, rng, there, log = Path(sys.argv[3]) / "cut", random.Random(int(sys.argv[4])), {}, []
for kill in range(int(sys.argv[5])):
    child = os.fork()
    if child == 0:
        prepare(config, cut, 500)
        os._exit(0)
    wanted = len(there) + rng.randrange(3)
    look = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while len(list(cut.glob("source-*/shard-*"))) < wanted and not os.waitid(os.P_PID, child, look):
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 1.5 * seconds / len(shards)))
    os.kill(child, signal.SIGKILL)
    ended = os.waitpid(child, 0)[1]
    now = {path.name: path.stat().st_ino for path in cut.glob("source-*/shard-*")}
    unfinished = len(list(cut.glob("source-*/.shard-*")))
    log.append([os.WIFSIGNALED(ended), len(now), unfinished, there.items() <= now.items()])
    there = now
prepare(config, cut, 500)
now = {path.name: path.stat().st_ino for path in cut.glob("source-*/shard-*")}
print(json.dumps({"kills": log, "kept": there.items() <= now.items(), "shards": len(now)}))
"""


def bytes_below(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_twenty_kills_lose_one_shard_each_at_most_and_leave_no_trace(tmp_path):
    write(tmp_path / "a.jsonl", 15_250)
    kills, seed = 20, random.randrange(1000)
    command = [sys.executable, "-c", KILLED, str(ROOT), str(tmp_path / "a.jsonl"), str(tmp_path), str(seed), str(kills)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    killed = [shards for died, shards, _, _ in found["kills"] if died]
    assert len(killed) > kills / 2, f"seed {seed}: {found}"
    assert len(set(killed)) > 5, f"seed {seed}: they died at the same shards: {found}"
    # What was whole at a kill is the same file ever after, and no more than one other was begun.
    assert all(unfinished <= 1 and kept for _, _, unfinished, kept in found["kills"]), f"seed {seed}: {found}"
    assert found["kept"]
    assert found["shards"] == 31
    assert bytes_below(tmp_path / "cut") == bytes_below(tmp_path / "whole")
