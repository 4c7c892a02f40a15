"""Prepared rows are found again only by what they were made of, whole or not at all."""

import dataclasses
import datetime
import gc
import json
import random
import shutil
import subprocess
import sys
import threading
import time
import types
from importlib import metadata
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from transformers import AutoTokenizer

import src.cache
import src.preparation
from config.schema import DataConfig, SourceConfig
from src.cache import (
    NO_MATTER,
    NO_MATTER_OF_SOURCE,
    cache_key,
    code_sha256,
    load_rows,
    prepared,
    read_account,
    stages,
)
from src.data import build_datasets
from src.formats import row_converter
from src.preparation import BATCH_ROWS, OpenSource, Preparation
from src.sources import open_source
from src.tokenization import RowEncoder
from tests.test_bad_input import small_disk
from tests.toy_tokenizer import toy_tokenizer
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def write(path, count, answer="yes"):
    rows = [{"prompt": f"question {n}", "completion": f"{answer} {n}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(path=str(path))


def key(config, tokenizer):
    return cache_key(config, tokenizer, [open_source(source, "data.train") for source in config.train])


def others(value, kind):
    """Other values that a field of this type may have: each choice, or one more, or a change of each of its parts."""
    if dataclasses.is_dataclass(value):
        return [dataclasses.replace(value, **{name: other}) for name, other in changes(value)]
    if get_origin(kind) is Literal:
        return [choice for choice in get_args(kind) if choice != value]
    if isinstance(kind, types.UnionType):
        inner = next(part for part in get_args(kind) if part is not types.NoneType)
        return [None, *others(value, inner)] if value is not None else [EXAMPLES[inner]]
    if isinstance(value, tuple):
        return [(*value, SourceConfig(path="another.jsonl"))]
    return (
        [not value] if kind is bool else [value | {"a": "b"}] if isinstance(value, dict) else [value + EXAMPLES[kind]]
    )


EXAMPLES = {int: 1, float: 0.25, str: "x"}


def changes(config):
    """The name of each field with each other value; a field of a type that is not known here is an error."""
    kinds = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        for other in others(getattr(config, field.name), kinds[field.name]):
            yield field.name, other


def test_every_field_but_those_that_do_not_matter_changes_the_key(tmp_path):
    source, tokenizer = write(tmp_path / "a.jsonl", 3), toy_tokenizer()
    config = DataConfig(train=(source,), max_length=64)
    opened = [open_source(source, "data.train.0")]
    first, seen = cache_key(config, tokenizer, opened), {}
    for name, other in changes(config):
        seen.setdefault(name, []).append(cache_key(dataclasses.replace(config, **{name: other}), tokenizer, opened))
    for name, other in changes(source):
        for side in ("train", "eval"):
            changed = {"eval": (source,)} | {side: (dataclasses.replace(source, **{name: other}),)}
            found = cache_key(dataclasses.replace(config, **changed), tokenizer, opened)
            seen.setdefault(f"{side}.{name}", []).append(found)
    with_eval = cache_key(dataclasses.replace(config, eval=(source,)), tokenizer, opened)
    idle = NO_MATTER | {f"{side}.{name}" for side in ("train", "eval") for name in NO_MATTER_OF_SOURCE}
    assert idle < seen.keys()
    for name, keys in seen.items():
        assert keys, name
        if name in idle:
            assert set(keys) <= {first, with_eval}, f"{name} prepares again for nothing"
    told = [found for name, keys in seen.items() if name not in idle for found in keys]
    assert len({first, with_eval, *told}) == len(told) + 2 - told.count(with_eval), "two settings share a key"
    fields = {field.name for field in dataclasses.fields(DataConfig)}
    assert fields <= seen.keys()
    assert len(told) > len(fields)


@pytest.mark.parametrize("name", sorted((NO_MATTER - {"workers"}) | NO_MATTER_OF_SOURCE))
def test_a_field_that_does_not_matter_changes_no_byte(tmp_path, name):
    source = write(tmp_path / "a.jsonl", 40)
    config = DataConfig(train=(source,), max_length=64)
    prepare(config, tmp_path / "first", 500)
    whole = config if name in NO_MATTER else source
    value = next(other for field, other in changes(whole) if field == name)
    changed = dataclasses.replace(whole, **{name: value})
    prepare(changed if name in NO_MATTER else dataclasses.replace(config, train=(changed,)), tmp_path / "other", 500)
    assert bytes_below(tmp_path / "first") == bytes_below(tmp_path / "other")


def test_a_template_that_writes_the_clocks_date_has_another_key_each_day(tmp_path, monkeypatch):
    config = DataConfig(train=(write(tmp_path / "a.jsonl", 3),), max_length=64)
    dated = toy_tokenizer("{{ strftime_now('%d %b %Y') }}{{ messages[0]['content'] }}")
    cases = [
        (dataclasses.replace(config, template_date=day), tokenizer)
        for day in (None, "2024-07-26")
        for tokenizer in (dated, toy_tokenizer())
    ]
    keys = [key(*case) for case in cases]

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return datetime.date.today() + datetime.timedelta(days=1)

    monkeypatch.setattr(src.cache, "date", Tomorrow)
    assert [key(*case) != first for case, first in zip(cases, keys, strict=True)] == [True, False, False, False]


def test_rows_tokenizer_template_and_code_change_the_key(tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", 3)
    config = DataConfig(train=(source,), max_length=64)
    keys = [key(config, toy_tokenizer())]
    assert key(config, toy_tokenizer()) == keys[0]
    keys.append(key(config, toy_tokenizer(merges_from="xyz")))
    tokenizer = toy_tokenizer()
    tokenizer.chat_template += " "
    keys.append(key(config, tokenizer))
    tokenizer = toy_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    keys.append(key(config, tokenizer))
    tokenizer = toy_tokenizer()
    tokenizer.eos_token = "<|im_start|>"  # a token that is there, with another meaning
    keys.append(key(config, tokenizer))
    tokenizer = toy_tokenizer()
    tokenizer.split_special_tokens = True
    keys.append(key(config, tokenizer))
    for library in src.cache.LIBRARIES:
        other = {name: "0" if name == library else metadata.version(name) for name in src.cache.LIBRARIES}
        monkeypatch.setattr(metadata, "version", other.__getitem__)
        keys.append(key(config, toy_tokenizer()))
        monkeypatch.undo()
    write(tmp_path / "a.jsonl", 3, answer="no")  # as long as before
    keys.append(key(config, toy_tokenizer()))
    assert len(set(keys)) == len(keys)


def test_files_of_a_tokenizer_change_the_key(tmp_path):
    config = DataConfig(train=(write(tmp_path / "a.jsonl", 3),), max_length=64)
    toy_tokenizer().save_pretrained(tmp_path / "t")
    keys = [key(config, AutoTokenizer.from_pretrained(tmp_path / "t")) for _ in range(2)]
    assert keys[0] == keys[1]
    kept = {path.name: path.read_text() for path in (tmp_path / "t").iterdir()}
    assert kept.keys() >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    vocabulary = json.loads(kept["tokenizer.json"])
    vocabulary["model"]["merges"].pop()
    settings = json.loads(kept["tokenizer_config.json"]) | {"eos_token": "<|im_start|>"}
    for name, text in {
        "tokenizer.json": json.dumps(vocabulary),
        "tokenizer_config.json": json.dumps(settings),
        "chat_template.jinja": kept["chat_template.jinja"].replace("assistant", "model"),
    }.items():
        (tmp_path / "t" / name).write_text(text)
        keys.append(key(config, AutoTokenizer.from_pretrained(tmp_path / "t")))
        (tmp_path / "t" / name).write_text(kept[name])
    assert len(set(keys[1:])) == 4


def test_the_code_of_every_stage_changes_the_key_and_no_other(tmp_path):
    for folder in ("config", "src", "utils"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "data"))
    names = stages(tmp_path).keys()
    assert {f"src.{name}" for name in ("data", "sources", "files", "formats", "chat", "alignment")} < names
    assert {"src.tokenization", "src.preparation", "config.schema", "utils.files"} < names
    digests = [code_sha256(stages(tmp_path))]
    assert digests[0] == code_sha256(stages(ROOT))
    for name in names:
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.write_text(path.read_text() + "# another line\n")
        digests.append(code_sha256(stages(tmp_path)))
    assert len(set(digests)) == len(names) + 1
    (tmp_path / "src" / "trainer.py").write_text("")
    assert code_sha256(stages(tmp_path)) == digests[-1]


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
    return prepare_sources(config, [open_source(source, "data.train") for source in config.train], folder, shard_rows)


def prepare_sources(config, sources, folder, shard_rows):
    encoder = RowEncoder.of(toy_tokenizer())

    def write(place):
        preparation = Preparation(config, encoder, place, shard_rows=shard_rows)
        for index, found in enumerate(sources):
            preparation.write(OpenSource(found, row_converter(found, "auto"), index, "train"))

    with prepared(folder, write):
        return sorted(folder.glob("source-*/shard-*"))


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


def test_a_file_that_changes_while_it_is_read_leaves_no_shard(tmp_path):
    config = DataConfig(train=(write(tmp_path / "a.jsonl", 30),), max_length=64)
    source = open_source(config.train[0], "data.train.0")
    assert len(source.sha256) == 1  # as the key has it
    write(tmp_path / "a.jsonl", 31)
    with pytest.raises(UserError, match=r"data\.train\.0: .*a\.jsonl was changed while it was read; start again"):
        prepare_sources(config, [source], tmp_path / "cache", 500)
    assert not list((tmp_path / "cache").glob("source-*/*"))
    assert not (tmp_path / "cache" / "complete.json").exists()


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
        with prepared(tmp_path / "k", prepare):
            found.append((tmp_path / "k" / "rows").read_text())

    found: list[str] = []
    threads = [threading.Thread(target=launch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert found == ["whole"] * 3


def test_a_disk_that_fills_up_is_told_and_the_next_run_goes_on(tmp_path):
    rows = [{"prompt": f"question {n}", "completion": "yes " * 40 + str(n)} for n in range(2000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, disk = DataConfig(train=(SourceConfig(path=str(tmp_path / "a.jsonl")),), max_length=512), tmp_path / "disk"
    whole = prepare(config, tmp_path / "whole", 500)
    size = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    with small_disk(disk, int(0.6 * size)):
        with pytest.raises(OSError, match="No space left on device"):
            prepare(config, disk / "some", 500)
        there = sorted(path.relative_to(disk / "some") for path in (disk / "some").glob("source-*/*"))
        assert there == [path.relative_to(tmp_path / "whole") for path in whole[: len(there)]]
        assert 0 < len(there) < len(whole)
        assert all(read_account(disk / "some" / shard) is not None for shard in there)
        with pytest.raises(
            UserError, match=r"could not be written to .*No space left.*free some space, or give another"
        ):
            build_datasets(config, toy_tokenizer(), cache_folder=disk)
        subprocess.run(["mount", "-o", f"remount,size={9 * size}", str(disk)], check=True)
        prepare(config, disk / "some", 500)
        assert bytes_below(disk / "some") == bytes_below(tmp_path / "whole")
        assert len(build_datasets(config, toy_tokenizer(), cache_folder=disk).train) == 2000


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


def test_the_garbage_collector_is_spared_old_objects_while_rows_are_prepared_alone(tmp_path, monkeypatch):
    freeze, frozen = gc.freeze, []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(freeze()))
    config = DataConfig(train=(write(tmp_path / "a.jsonl", 2 * BATCH_ROWS),), max_length=64)
    tokenizer = toy_tokenizer()
    gc.unfreeze()  # what tests/conftest.py has frozen
    build_datasets(config, tokenizer, cache_folder=tmp_path / "cache")
    assert (len(frozen), gc.get_freeze_count()) == (1, 0)
    freeze()  # another's choice, which stays
    build_datasets(config, tokenizer, cache_folder=tmp_path / "other")
    assert len(frozen) == 1
    assert gc.get_freeze_count() > 0
