"""A stream gives the rows that preparation gives, in an order of data and seed alone, from any step on."""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import islice

import datasets
import numpy as np
import pytest

from config.schema import ContractConfig, DataConfig, SourceConfig
from src.batches import StepSplit
from src.contract import ContractError
from src.data import build_datasets
from src.files import Row
from src.mixing import rows_of_a_window
from src.streaming import RowStream, StreamFeed, stream_datasets
from tests.hub_server import HubServer
from tests.test_ahead import threads_of_ahead
from tests.test_tables import PADDED
from tests.tiny_run import (
    ROOT,
    assert_same_run,
    chat_rows,
    conversation,
    metrics_of,
    run_train,
    stop_after,
    two_epochs,
    write_rows,
)
from tests.toy_tokenizer import toy_tokenizer
from utils.ahead import Halt
from utils.errors import UserError

CARD = """---
configs:
- config_name: json
  data_files: [{split: train, path: train-*.jsonl}]
- config_name: table
  data_files: [{split: train, path: test.parquet}]
---
"""


def stream_config(folder, *, window=7, **fields):
    """Chats of which one is too long, and texts that are split; 4 windows of 7 of their 26 rows."""
    chats = chat_rows()
    chats[3] = conversation("say much", " ".join(["much"] * 80))
    texts = [{"text": " ".join(["the cat sat on the mat"] * (1 + 4 * number))} for number in range(6)]
    sources = (
        SourceConfig(path=str(write_rows(folder / "chats.jsonl", chats))),
        SourceConfig(path=str(write_rows(folder / "texts.jsonl", texts))),
    )
    fields = {"train": sources, "max_length": 64, "contract": ContractConfig(too_long=1.0)} | fields
    return DataConfig(streaming=True, stream_window_rows=window, **fields)


def stream_of(config) -> RowStream:
    return stream_datasets(config, toy_tokenizer())[0]


def epochs_of(stream, count):
    """The rows of the first epochs, and the tokens of each of their packs."""
    rows, tokens = [[] for _ in range(count)], [[] for _ in range(count)]
    for place, packs, _ in stream.windows(stream.start):
        if place.epoch == count:
            return rows, tokens
        for pack in packs:
            ends = np.cumsum(pack["lengths"])
            parts = [np.split(pack[name], ends[:-1]) for name in ("input_ids", "labels")]
            rows[place.epoch] += [
                (tuple(ids.tolist()), tuple(labels.tolist())) for ids, labels in zip(*parts, strict=True)
            ]
            tokens[place.epoch].append(int(ends[-1]))
    raise AssertionError("a stream ended")


def fed(feed, count):
    """A feed's next micro-batches, as lists of the ids of their packs."""
    return [[pack["input_ids"].tolist() for pack in packs] for packs in islice(feed, count)]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("window", [1, 7, 26, 1000])
def test_every_epoch_has_the_rows_and_masks_of_prepared_data(tmp_path, packing, window):
    config = stream_config(tmp_path, window=window, packing=packing)
    prepared = build_datasets(replace(config, streaming=False), toy_tokenizer())
    expected = Counter((tuple(row["input_ids"]), tuple(row["labels"])) for row in prepared.train)
    stream = stream_of(config)
    rows, tokens = epochs_of(stream, 2)
    assert [Counter(epoch) for epoch in rows] == [expected, expected]
    assert max(map(max, tokens)) <= 64
    if not packing:
        assert rows[0] == [(tuple(row["input_ids"]), tuple(row["labels"])) for row in prepared.train]


def test_rows_that_fill_no_pack_wait_for_the_next_window(tmp_path):
    rows = [{"input_ids": [n] * length} for n in range(40) for length in (40, 24)]
    path = write_rows(tmp_path / "rows.jsonl", sorted(rows, key=lambda row: -len(row["input_ids"])))
    config = DataConfig(
        train=(SourceConfig(path=str(path)),), max_length=64, streaming=True, stream_window_rows=40, supervise="all"
    )
    # A window of rows of 40 tokens, then one of 24: a pair fills a pack, which neither window could alone.
    stream = stream_of(config)
    (_, first, _), (_, second, _) = islice(stream.windows(stream.start), 2)
    assert first == []
    assert sorted(len(pack["input_ids"]) for pack in second) == [64] * 40


def test_no_row_is_read_before_its_window_is_asked_for(tmp_path):
    read = []

    def rows():
        for number in range(10_000):
            read.append(number)
            yield Row(f"row {number}", {"input_ids": [5, 6, 7 + number % 50]})

    stream = stream_of(stream_config(tmp_path, window=50))
    source = stream.sources[0]
    found = replace(source.found, read=rows)
    ids = write_rows(tmp_path / "ids.jsonl", [{"input_ids": [1, 2]}])
    tokenized = stream_of(DataConfig(train=(SourceConfig(path=str(ids)),), streaming=True)).sources[0]
    stream = RowStream(
        replace(stream.config, train=(SourceConfig(path="x"),)), [replace(tokenized, found=found)], stream.preparation
    )
    for window, _ in enumerate(islice(stream.windows(stream.start), 4), start=1):
        assert len(read) == 50 * window


@pytest.mark.parametrize("limit", [{"rows": 2}, {"tokens": 130}])
def test_the_order_does_not_depend_on_the_layout(tmp_path, limit):
    config = stream_config(tmp_path, packing=False)
    alone = StreamFeed(stream_of(config), StepSplit(**limit, accumulation_steps=4), seed=3, steps=9)
    expected = fed(alone, 36)
    assert alone.mark.place.epoch > 0
    for processes in (2, 4):
        shares = []
        for process in range(processes):
            split = StepSplit(**limit, accumulation_steps=4 // processes, processes=processes, process=process)
            shares.append(fed(StreamFeed(stream_of(config), split, seed=3, steps=9), 36 // processes))
        assert [batch for each in zip(*shares, strict=True) for batch in each] == expected
    other = fed(StreamFeed(stream_of(config), StepSplit(**limit, accumulation_steps=4), seed=4, steps=9), 36)
    assert other != expected


@pytest.mark.parametrize("limit", [{"rows": 2}, {"tokens": 130}])
def test_a_stream_goes_on_exactly_from_any_step(tmp_path, limit):
    config, split = stream_config(tmp_path), StepSplit(**limit, accumulation_steps=2)
    whole = fed(StreamFeed(stream_of(config), split, seed=3, steps=30), 60)
    feed, states, places = StreamFeed(stream_of(config), split, seed=3, steps=30), [], set()
    batches = iter(feed)
    for _ in range(30):
        states.append(json.dumps(feed.state()))
        place = feed.mark.place
        places.add((place.epoch, place.window, bool(place.left_over)))
        list(islice(batches, 2))
    assert {epoch for epoch, _, _ in places} >= {0, 1, 2}
    assert any(left_over for _, _, left_over in places), "the case needs rows that are kept for a next window"
    for step, state in enumerate(states):
        resumed = StreamFeed(stream_of(config), split, seed=3, steps=30)
        resumed.load_state(json.loads(state))
        resumed.go_to(step)
        assert fed(resumed, 60 - 2 * step) == whole[2 * step :]
    replayed = StreamFeed(stream_of(config), split, seed=3, steps=30)
    replayed.go_to(11)
    assert fed(replayed, 60 - 22) == whole[22:], "without a state, the stream is read up to the step"


@pytest.mark.parametrize("limit", [{"rows": 2}, {"tokens": 130}])
def test_windows_made_meanwhile_change_neither_packs_nor_states(tmp_path, limit):
    config, split = stream_config(tmp_path), StepSplit(**limit, accumulation_steps=2)
    plain, ahead = (StreamFeed(stream_of(config), split, seed=3, steps=20) for _ in range(2))
    halt = Halt()
    with contextlib.closing(ahead.marked_steps(halt)) as steps:
        for (packs, mark), (others, other) in islice(zip(plain.marked_steps(), steps, strict=True), 20):
            assert [[one["input_ids"].tolist() for one in batch] for batch in packs] == [
                [one["input_ids"].tolist() for one in batch] for batch in others
            ]
            for feed, place in ((plain, mark), (ahead, other)):
                feed.stand_at(place)
            assert plain.state() == ahead.state()
    assert ahead.mark.place.epoch > 0
    assert threads_of_ahead() == []


def test_no_more_than_one_window_is_made_ahead(tmp_path):
    made = []

    class Counting(RowStream):
        def windows(self, place, check=lambda: None):
            for window in super().windows(place, check):
                made.append(window[0].window)
                yield window

    stream = stream_of(stream_config(tmp_path, packing=False))
    stream = Counting(stream.config, stream.sources, stream.preparation)
    feed = StreamFeed(stream, StepSplit(rows=1), seed=3, steps=20)
    with contextlib.closing(feed.marked_steps(Halt())) as steps:
        taken = set()
        for _, mark in islice(steps, 15):
            taken.add((mark.place.epoch, mark.place.window))
            time.sleep(0.01)
            assert len(made) <= len(taken) + 1


def test_weights_are_shares_of_the_rows_of_each_window(tmp_path):
    paths = [
        str(write_rows(tmp_path / f"{first}.jsonl", [{"input_ids": [first, 100 + n % 200]} for n in range(count)]))
        for first, count in ((5, 90), (6, 1000))
    ]
    sources = (SourceConfig(path=paths[0], weight=3.0), SourceConfig(path=paths[1], weight=1.0))
    config = DataConfig(train=sources, streaming=True, stream_window_rows=10, packing=False, supervise="all")
    stream = stream_of(config)
    counts = [
        Counter(int(pack["input_ids"][0]) for pack in packs)
        for place, packs, _ in islice(stream.windows(stream.start), 13)
        if place.epoch == 0
    ]
    assert all(count[5] in (7, 8) and count[6] in (2, 3) for count in counts[:-1])
    assert counts[-1] == {}, "nothing is left of the first source"
    total = sum(counts, Counter())
    assert (total[5], total[6]) == (90, 30)


def test_each_source_gives_its_share_of_any_number_of_windows():
    given = np.array([rows_of_a_window([1.0, 2.0, 4.0], window, 10) for window in range(70)])
    assert given.sum(axis=0).tolist() == [100, 200, 400]
    assert abs(given.cumsum(axis=0) - np.outer(np.arange(1, 71), [10 / 7, 20 / 7, 40 / 7])).max() <= 0.5


def test_rows_that_are_evaluated_on_are_left_out_and_counted(tmp_path):
    config = stream_config(tmp_path, max_length=128, contract=ContractConfig(too_long=1.0, leak=1.0))
    evaluated = write_rows(tmp_path / "eval.jsonl", chat_rows()[:2])
    config = replace(config, eval=(SourceConfig(path=str(evaluated)),))
    for _ in range(2):  # the second time the evaluation rows are found prepared
        stream, data = stream_datasets(config, toy_tokenizer(), cache_folder=tmp_path / "cache")
        assert len(data.eval) == 2
        assert len(data.eval_conversations) == 2
        rows, _ = epochs_of(stream, 1)
        assert not {tuple(row["input_ids"]) for row in data.eval} & {ids for ids, _ in rows[0]}
    without, _ = epochs_of(stream_of(replace(config, eval=())), 1)
    assert len(without[0]) == len(rows[0]) + 2
    _, _, after = next(stream.windows(stream.start))
    assert stream.report(data.report, after.tallies)["train"]["sources"][0]["rows_in_train_and_eval"] == 2


def test_rows_of_the_first_window_that_break_the_contract_end_the_run(tmp_path):
    config = stream_config(tmp_path, contract=ContractConfig())
    stream = stream_of(config)
    with pytest.raises(ContractError, match=r"too_long: \d of 7 rows of .*chats.jsonl"):
        next(stream.windows(stream.start))


def test_a_stream_without_a_row_to_train_on_ends_with_an_error(tmp_path):
    config = replace(stream_config(tmp_path), max_length=8)
    config = replace(config, train=config.train[:1])
    stream = stream_of(config)
    with pytest.raises(UserError, match="no training row is left of the 20 that were read"):
        next(iter(StreamFeed(stream, StepSplit(), seed=0, steps=1)))


def test_a_streamed_run_resumed_in_any_window_ends_as_one_never_stopped(tmp_path):
    recipe = two_epochs(
        tmp_path,
        "full",
        data={"streaming": True, "stream_window_rows": 8},
        training={"max_steps": 8, "save_every_steps": 1, "accumulation_steps": 1},
    )
    run, whole = tmp_path / "outputs" / "run", tmp_path / "whole"
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    places = [json.loads((run / f"checkpoint-{step}" / "stream.json").read_text()) for step in range(1, 8)]
    middle = next(place["step"] for place in places if place["given"] > 1 and place["place"]["window"] > 0)
    later = next(place["step"] for place in places if place["place"]["epoch"] > 0)
    shutil.copytree(run, whole)
    for step in (later, middle):
        stop_after(run, step)
        done = run_train("--config", recipe, "--resume")
        assert done.code == 0, done.stderr
        assert f"step {step + 1}/8  loss" in done.stderr
        assert_same_run(run, whole)
    assert [line["epoch"] for line in metrics_of(run) if "loss" in line][-1] >= 1
    account = json.loads((run / "data.json").read_text())["train"]["sources"][0]
    assert (account["rows_read"], account["rows_kept"]) == (20, 20)


READ = """
import json, sys
from config.schema import SourceConfig
from src.sources import open_source
for streams in (True, False):
    for fields in json.loads(sys.argv[1]):
        found = open_source(SourceConfig(**fields), "data.train.0", streams=streams)
        print(json.dumps([found.revision, found.head[0].origin, [row.values for row in found]]))
    print(json.dumps(sorted(file.name for file in Path.home().rglob("*") if file.suffix in (".jsonl", ".parquet"))))
"""


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_streamed_as_it_would_be_downloaded(tmp_path):
    folder, home = tmp_path / "rows", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    # The datasets library's own reader of JSON refuses the second file, whose keys the first has not.
    for number, row in enumerate(PADDED):
        (folder / f"train-{number}.jsonl").write_text((json.dumps(row) + "\n") * 3)
    datasets.Dataset.from_list(PADDED * 5).to_parquet(folder / "test.parquet")
    (folder / "README.md").write_text(CARD)
    words = tmp_path / "words"
    words.mkdir()
    (words / "train.csv").write_text("text,length\nHello,5\n")
    rows, table = ({"path": "me/rows", "subset": name} for name in ("json", "table"))
    sources = [rows, table, {"path": "me/words"}, {**rows, "max_rows": 4}]
    with HubServer(tmp_path / "hub") as hub:
        hub.add_user("hf_secret", "me")
        hub.add_repo("me/rows", folder, repo_type="dataset", private=True)
        hub.add_repo("me/words", words, repo_type="dataset")
        environment = hub.environment(home, token="hf_secret") | {"PYTHONPATH": str(ROOT), "HOME": str(home)}
        command = [sys.executable, "-c", "from pathlib import Path" + READ, json.dumps(sources)]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[0][2] == [PADDED[0]] * 3 + [PADDED[1]] * 3
    assert lines[:4] == lines[5:9]
    assert lines[4] == [], "streaming left a file on the disk"
    assert lines[9] != []
